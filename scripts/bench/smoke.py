"""Every kernel once, at sizes of BERT-Large, against the same formula in fp64; the first thing to run on a new GPU.

Each line says how far output and gradients are off, relative and at the worst tensor, and how far torch is in the same dtype.
An op may have twice torch's error and one rounding; FP8 may have FP8_ERROR. Dropout is on where the op has one: the mask is
read off the op itself, so that the formula uses the same decisions. On a CPU the same ops run on their reference path at small
sizes, which shows that this file still fits them and nothing of the kernels.

A line is printed as soon as its op has run, the exit status is 1 if one was wrong or failed. --out gets the lines as JSON.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_device import default_device, machine_line, synchronize
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
    """Norms and additions with dropout."""
    rows, vector = (sizes.batch * sizes.lengths[1], sizes.hidden), (sizes.hidden,)
    seed = torch.tensor(3, device=device)
    options: dict[str, Any] = {"p": P, "seed": seed, "site": SITE}
    kept = residual_add(torch.ones(rows, device=device), None, torch.zeros(rows, device=device), **options) != 0

    def added(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + (x + bias) * kept * keep_scale(P)

    def normed(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.layer_norm(z, vector, weight, bias, 1e-5)

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


def feed_forward_cases(sizes: Sizes) -> Iterator[Case]:
    """GELU within its half of the layer."""
    H, F = sizes.hidden, 4 * sizes.hidden
    shapes = ((sizes.batch * sizes.lengths[1], H), (F, H), (F,), (H, F))
    for activation in ("gelu", "gelu_tanh"):
        for recompute in (False, True):

            def op(*x: Tensor, kernels: Kernels = "auto", a: Any = activation, again: bool = recompute) -> list[Tensor]:
                return [mlp(*x, a, gelu_checkpoint=again, kernels=kernels)]

            name = f"feed-forward, {activation}{', GELU again in backward' if recompute else ''}"
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


def results(op: Op, inputs: Sequence[Tensor], dys: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and input gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)])
    return [y.detach() for y in outputs] + list(gradients)


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """The record of a case: the largest relative errors of ours and of torch, and whether all of ours are allowed."""
    torch.manual_seed(0)
    started_s = time.monotonic()
    normal = (torch.randn(shape, device=device) for shape in case.shapes)
    inputs = [(1 + 0.1 * x if x.dim() == 1 else case.spread * x).to(case.dtype) for x in normal]
    with torch.no_grad():
        dys = [torch.randn_like(y) for y in case.op(*inputs)]
    exact = results(case.formula, [x.double() for x in inputs], dys)
    torchs = results(case.formula, inputs, dys)
    ours = results(case.op, inputs, dys)
    synchronize(device)
    errors, right = [], True
    for mine, theirs, wanted in zip(ours, torchs, exact, strict=True):
        size = wanted.norm()
        error, usual = ((result.double() - wanted).norm() / size for result in (mine, theirs))
        allowed = 2 * usual + torch.finfo(case.dtype).eps if case.allowed_error is None else case.allowed_error
        right = right and bool(error <= allowed)
        errors.append((error.item(), usual.item()))
    error, usual = max(errors)
    return {"case": case.name, "right": right, "error": error, "torchs": usual, "s": time.monotonic() - started_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines go here; the file is written anew")
    arguments = parser.parse_args()
    device = default_device()
    torch.backends.cuda.matmul.allow_tf32 = False
    records: list[dict[str, Any]] = []
    print(machine_line(), flush=True)
    for case in cases(GPU_SIZES if device.type == "cuda" else CPU_SIZES, device):
        try:
            record = check(case, device)
            words = f"off by {record['error']:.1e}, torch by {record['torchs']:.1e}, {record['s']:.1f} s"
        except Exception as failure:  # of whatever kind: the other kernels go on
            traceback.print_exc()
            words = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            record = {"case": case.name, "right": False, "failed": words}
        records.append(record)
        print(f"{'right' if record['right'] else 'WRONG'}  {case.name}: {words}", flush=True)
        if arguments.out is not None:
            arguments.out.write_text("".join(json.dumps(one) + "\n" for one in records))
    if not all(record["right"] for record in records):
        sys.exit("a kernel is wrong or failed")


if __name__ == "__main__":
    main()
