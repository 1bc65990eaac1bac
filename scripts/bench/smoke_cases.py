"""What smoke.py runs: every kernel once, each with the formula that it must follow."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer, te
from xformer_train.kernels.fp8.linear import Fp8State, fp8_linear
from xformer_train.kernels.fp8.mlp import fp8_mlp
from xformer_train.kernels.ops.attention.attention import attention
from xformer_train.kernels.ops.attention.rotary import rotary_table
from xformer_train.kernels.ops.choices import IGNORED, Kernels
from xformer_train.kernels.ops.dropout import keep_scale
from xformer_train.kernels.ops.loss.cross_entropy import linear_cross_entropy
from xformer_train.kernels.ops.mlp.mlp import mlp
from xformer_train.kernels.ops.norm.head_norm import head_norm
from xformer_train.kernels.ops.norm.residual_norm import norm, residual_add, residual_norm

P, SITE = 0.1, 1
# Rounding to E4M3 is off by 2.6 % (root mean square), to E5M2 by 5 %; backward of two products in a row adds up to 9 %.
FP8_ERROR = 0.15
Op = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """An op, and the formula that it must follow.

    shapes: of its float inputs: vectors near 1, and else normal values times `spread`. op, formula: outputs from these
    inputs; the formula runs in fp64, and in the dtype of the op for torch's own error. allowed_error: None for twice torch's.
    """

    name: str
    shapes: Sequence[tuple[int, ...]]
    op: Op
    formula: Op
    dtype: torch.dtype = torch.bfloat16
    spread: float = 1.0
    allowed_error: float | None = None


@dataclass(frozen=True)
class Sizes:
    """What the cases are made of: of BERT-Large on a GPU, small ones on a CPU."""

    batch: int
    hidden: int
    heads: int
    lengths: tuple[int, int]
    """A sequence that one program of backward holds whole, and one that it does not."""
    vocabulary: int


GPU_SIZES = Sizes(16, 1024, 16, (128, 512), 30528)
CPU_SIZES = Sizes(2, 32, 2, (8, 20), 50)


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """All kernels, the cheapest first."""
    yield from norm_cases(sizes, device)
    yield from feed_forward_cases(sizes)
    yield vocabulary_case(sizes, device)
    yield from attention_cases(sizes, device)
    yield from layer_cases(sizes)
    yield from fp8_cases(sizes)


def norm_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Norms and additions with dropout, and norms of heads."""
    rows, vector = (sizes.batch * sizes.lengths[1], sizes.hidden), (sizes.hidden,)
    seed = torch.tensor(3, device=device)
    options: dict[str, Any] = {"p": P, "seed": seed, "site": SITE}
    kept = residual_add(torch.ones(rows, device=device), None, torch.zeros(rows, device=device), **options) != 0

    def added(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + (x + bias) * kept * keep_scale(P)

    def normed(z: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return (
            torch.layer_norm(z, vector, weight, *bias, 1e-5) if bias else torch.rms_norm(z, weight.shape, weight, 1e-5)
        )

    def both(x: Tensor, bias: Tensor, residual: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
        z = added(x, bias, residual)
        return z, normed(z, *norm)

    yield Case("norm", (rows, vector, vector), lambda *x: [norm(*x, eps=1e-5)], lambda *x: [normed(*x)])
    yield Case(
        "residual add, dropout",
        (rows, vector, rows),
        lambda *x: [residual_add(*x, **options)],
        lambda *x: [added(*x)],
    )
    for dtype in (torch.bfloat16, torch.float32):
        yield Case(
            f"residual add and norm, dropout, {dtype}",
            (rows, vector, rows, vector, vector),
            lambda *x: residual_norm(*x, eps=1e-5, **options),
            both,
            dtype,
        )
    yield Case(
        "residual add and RMSNorm, dropout",
        (rows, vector, rows, vector),
        lambda *x: residual_norm(*x, None, eps=1e-5, kind="rms_norm", **options),
        both,
    )
    D, keys = sizes.hidden // sizes.heads, sizes.heads // 2
    yield Case(
        "norms of query and key heads",
        ((rows[0], 2 * sizes.heads, D), (D,), (D,)),
        lambda *x: [head_norm(*x, eps=1e-5, key_heads=keys)],
        lambda x, q, k: [
            torch.cat((normed(x[:, : -2 * keys], q), normed(x[:, -2 * keys : -keys], k), x[:, -keys:]), 1)
        ],
    )


def feed_forward_cases(sizes: Sizes) -> Iterator[Case]:
    """Activations and gates within their half of the layer."""
    H, F = sizes.hidden, 4 * sizes.hidden
    for activation, gated in (("gelu", False), ("gelu_tanh", False), ("gelu", True), ("silu", True)):
        wide = 2 * F if gated else F
        shapes = ((sizes.batch * sizes.lengths[1], H), (wide, H), (wide,), (H, F))
        for recompute in (False, True):
            flags: dict[str, Any] = {"gated": gated, "gelu_checkpoint": recompute}

            def op(*x: Tensor, kernels: Kernels = "auto", a: Any = activation, flags: Any = flags) -> list[Tensor]:
                return [mlp(*x, a, kernels=kernels, **flags)]

            name = f"feed-forward, {'gate of ' * gated}{activation}{', again in backward' * recompute}"
            yield Case(name, shapes, op, lambda *x, op=op: op(*x, kernels="reference"), spread=H**-0.25)


def vocabulary_case(sizes: Sizes, device: torch.device) -> Case:
    """The loss over the vocabulary, in chunks."""
    rows = sizes.batch * sizes.lengths[1] // 8
    labels = torch.randint(sizes.vocabulary, (rows,), device=device)
    labels[::7] = IGNORED
    return Case(
        "loss over the vocabulary",
        ((rows, sizes.hidden), (sizes.vocabulary, sizes.hidden), (sizes.vocabulary,)),
        lambda *x: [linear_cross_entropy(*x, labels)],
        lambda h, w, b: [
            torch.nn.functional.cross_entropy(h @ w.t() + b, labels, ignore_index=IGNORED, reduction="sum")
        ],
        spread=sizes.hidden**-0.25,
    )


@dataclass(frozen=True)
class Pattern:
    """How heads see keys beyond the mask; fields as in `attention`."""

    key_heads: int | None = None
    rotary: Tensor | None = None
    window: int | None = None


def attention_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """One-kernel backward and two-kernel backward, heads of 64 and 128 columns, plain, causal and with padding; with rotary
    embedding, shared key heads and windows, as today's models have them."""
    for length in sizes.lengths:
        key_mask = torch.arange(length, device=device) < length - length // 3
        key_mask = key_mask.expand(sizes.batch // 2, -1).contiguous()
        documents = (torch.arange(length, device=device) // (length // 3))[None]
        whole, half = sizes.heads, sizes.heads // 2
        turned = [rotary_table(length, sizes.hidden // heads, 1e4, device) for heads in (whole, half)]
        for words, heads, mask, pattern in (
            ("", whole, AttentionMask(), Pattern()),
            (", padding", whole, AttentionMask(key_mask=key_mask), Pattern()),
            (", causal", half, AttentionMask(causal=True), Pattern()),
            (
                ", shared keys, rotary, documents",
                whole,
                AttentionMask(causal=True, segment_ids=documents),
                Pattern(whole // 2, turned[0]),
            ),
            (
                ", rotary, window, padding",
                whole,
                AttentionMask(key_mask=key_mask),
                Pattern(None, turned[0], length // 2),
            ),
            (
                ", shared keys, rotary, causal window",
                half,
                AttentionMask(causal=True),
                Pattern(1, turned[1], length // 2),
            ),
        ):
            yield attention_case(f"{length} tokens", words, (length, heads), mask, pattern, sizes)


def attention_case(
    name: str, words: str, shape: tuple[int, int], mask: AttentionMask, pattern: Pattern, sizes: Sizes
) -> Case:
    """One case of (tokens, heads)."""
    length, heads = shape
    parts = (3, heads) if pattern.key_heads is None else (heads + 2 * pattern.key_heads,)
    width = sizes.hidden // heads

    def op(qkv: Tensor) -> list[Tensor]:
        return [attend(qkv, mask, pattern)]

    def formula(qkv: Tensor) -> list[Tensor]:
        return [written_out(qkv, mask, pattern, kept_probabilities(qkv, mask, pattern))]

    return Case(
        f"attention, {name}, heads of {width}{words}, dropout",
        ((sizes.batch // 2, length, *parts, width),),
        op,
        formula,
    )


def attend(qkv: Tensor, mask: AttentionMask, pattern: Pattern) -> Tensor:
    """The op."""
    seed = torch.tensor(5, device=qkv.device)
    given = {"key_heads": pattern.key_heads, "rotary": pattern.rotary, "window": pattern.window}
    return attention(qkv, mask, P, seed, SITE, **given)  # type: ignore[arg-type]


def parts_of(qkv: Tensor, pattern: Pattern) -> list[Tensor]:
    """Queries, keys and values, (B, S, N or G, D)."""
    if pattern.key_heads is None:
        return list(qkv.unbind(2))
    return list(qkv.split([qkv.shape[2] - 2 * pattern.key_heads, pattern.key_heads, pattern.key_heads], 2))


def kept_probabilities(qkv: Tensor, mask: AttentionMask, pattern: Pattern) -> Tensor:
    """Which of (B, N, S, S) the op keeps: with the unit vectors for values its output is the probabilities after dropout.

    In as many calls as it takes to show all keys by the columns of a head. What the mask hides counts as not kept.
    """
    batch, length, width = *qkv.shape[:2], qkv.shape[-1]
    columns = []
    for first in range(0, length, width):
        probe = torch.zeros(qkv.shape, dtype=torch.float32, device=qkv.device)
        keys = min(width, length - first)
        parts_of(probe, pattern)[2][:, first : first + keys] = torch.eye(keys, width, device=qkv.device)[None, :, None]
        out = attend(probe, mask, pattern)
        columns.append(out.view(batch, length, -1, width)[..., :keys] != 0)
    return torch.cat(columns, -1).transpose(1, 2)


def written_out(qkv: Tensor, mask: AttentionMask, pattern: Pattern, kept: Tensor) -> Tensor:
    """(B, S, N * D) by the formula."""
    q, k, v = parts_of(qkv, pattern)
    if pattern.rotary is not None:
        q, k = (turned(x, pattern.rotary) for x in (q, k))
    q, k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    places = torch.arange(qkv.shape[1], device=qkv.device)
    distance = places[:, None] - places
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=qkv.device)
    if mask.causal:
        hidden = distance < 0
    if pattern.window is not None:
        hidden = hidden | (distance.abs() > pattern.window)
    if mask.key_mask is not None:
        hidden = hidden | ~mask.key_mask[:, None, None]
    if mask.segment_ids is not None:
        hidden = hidden | (mask.segment_ids[:, :, None] != mask.segment_ids[:, None])[:, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1) * kept * keep_scale(P)
    return (weights @ v).transpose(1, 2).flatten(2)


def turned(x: Tensor, rotary: Tensor) -> Tensor:
    """x (B, S, heads, D) turned by the angles of its places, in fp32 at least."""
    cos, sin = rotary[:, None].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    x0, x1 = x.chunk(2, -1)
    return torch.cat([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).to(x.dtype)


def layer_cases(sizes: Sizes) -> Iterator[Case]:
    """Whole layers without dropout, with all memory flags, as functions of their input and parameters."""
    for pre_layer_norm in (True, False):
        config = LayerConfig(
            sizes.hidden,
            sizes.heads,
            4 * sizes.hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pre_layer_norm=pre_layer_norm,
            normalize_invertible=True,
            gelu_checkpoint=True,
        )
        with torch.device("meta"):
            layer = TransformerLayer(config)
        names = [name for name, _ in layer.named_parameters()]

        def op(
            x: Tensor, *values: Tensor, kernels: Kernels = "auto", config: Any = config, names: Any = names
        ) -> list[Tensor]:
            with torch.device("meta"):
                layer = TransformerLayer(replace(config, kernels=kernels))
            y = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, AttentionMask()))
            return [y]

        shapes = [(sizes.batch, sizes.lengths[1], sizes.hidden), *(tuple(p.shape) for p in layer.parameters())]
        yield Case(
            f"layer, {'pre' if pre_layer_norm else 'post'}-LN, memory flags",
            shapes,
            op,
            lambda *x, op=op: op(*x, kernels="reference"),
            spread=sizes.hidden**-0.25,
        )


def fp8_cases(sizes: Sizes) -> Iterator[Case]:
    """Casts and FP8 products, under current scaling, against products in full precision."""
    H, F = sizes.hidden, 4 * sizes.hidden
    rows = (sizes.batch * sizes.lengths[1], H)

    def linear(*x: Tensor) -> list[Tensor]:
        with te.fp8_autocast(fp8_recipe=te.Float8CurrentScaling()):
            return [fp8_linear(*x, Fp8State())]

    def feed_forward(*x: Tensor) -> list[Tensor]:
        with te.fp8_autocast(fp8_recipe=te.Float8CurrentScaling()):
            return [fp8_mlp(*x, "gelu", Fp8State(), Fp8State())]

    spread = H**-0.25
    yield Case(
        "FP8 product",
        (rows, (F, H), (F,)),
        linear,
        lambda x, w, b: [x @ w.t() + b],
        spread=spread,
        allowed_error=FP8_ERROR,
    )
    yield Case(
        "FP8 feed-forward",
        (rows, (F, H), (F,), (H, F)),
        feed_forward,
        lambda *x: [mlp(*x, "gelu", gelu_checkpoint=False, kernels="reference")],
        spread=spread,
        allowed_error=FP8_ERROR,
    )
