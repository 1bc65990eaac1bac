"""Launches that between them pick every kernel variant of the sizes that people train.

A case calls a launch function with CPU tensors, as training would with CUDA tensors; scripts/bench/count_instructions.py
compiles what it launches. Numbers of rows of a tensor do not select a variant, so they are small here.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from xformer_train.kernels.fp8.cast_triton import quantize
from xformer_train.kernels.fp8.mlp_triton import gelu_backward_quantize, gelu_quantize
from xformer_train.kernels.ops.attention import attention_backward_triton, attention_triton
from xformer_train.kernels.ops.choices import Activation
from xformer_train.kernels.ops.loss import cross_entropy_triton
from xformer_train.kernels.ops.mlp import activation_triton
from xformer_train.kernels.ops.norm import head_norm_triton, residual_norm_triton
from xformer_train.kernels.ops.norm.residual_norm import Options, Saved

HIDDEN_SIZES = (768, 1024, 1600, 2048)
_EVERY_OPTION_AT = 1024  # the other sizes of today's norms and gates are compiled as models have them
VOCAB_SIZES = (30522, 30528, 50257, 50304)  # as BERT and GPT-2 were published, and padded for the tensor cores
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ROWS = 64
_SEED = torch.tensor(1)
_AMAX = torch.zeros(())
_FP8_CAPABILITY = 89


@dataclass(frozen=True)
class Case:
    """One launch.

    launch: calls one launch function. dot_kernels: names of its kernels that must use the tensor cores.
    narrow_kernels: names of its kernels that need no 128-bit loads.
    """

    name: str
    launch: Callable[[], object]
    dot_kernels: frozenset[str] = frozenset()
    narrow_kernels: frozenset[str] = frozenset()


def cases(capability: int) -> Iterator[Case]:
    """All cases of a GPU of this compute capability, times ten."""
    yield from _residual_norm_cases()
    yield from _other_norm_cases()
    yield from _head_norm_cases()
    yield from _mlp_cases()
    yield from _cross_entropy_cases()
    yield from _attention_cases()
    yield from _model_attention_cases()
    yield from _stack_cases()
    if capability >= _FP8_CAPABILITY:
        yield from _fp8_cases()


def _sizes() -> Iterator[tuple[str, int, torch.dtype]]:
    """Every hidden size in bf16, one in the other types."""
    for H in HIDDEN_SIZES:
        yield f"H{H} bf16", H, torch.bfloat16
    for name in ("fp16", "fp32"):
        yield f"H1024 {name}", 1024, DTYPES[name]


def _residual_norm_cases() -> Iterator[Case]:
    module = residual_norm_triton
    for size, H, dtype in _sizes():
        x, vector, row = torch.empty(_ROWS, H, dtype=dtype), torch.empty(H, dtype=dtype), torch.empty(_ROWS)
        for p in (0.1, 0.0) if dtype == torch.bfloat16 else (0.1,):
            seed = _SEED if p else None
            name, options = f"{size} p={p}", Options(1e-12, p, 2, False, "auto")
            yield Case(
                f"residual_norm_forward {name}",
                partial(module.residual_norm_forward, x, vector, x, vector, vector, seed, options),
            )
            yield Case(
                f"residual_norm_forward {name} amax",
                partial(module.residual_norm_forward, x, vector, x, vector, vector, seed, options, _AMAX),
            )
            yield Case(
                f"residual_add_forward {name}", partial(module.residual_add_forward, x, vector, x, seed, options)
            )
            yield Case(f"residual_add_backward {name}", partial(module.residual_add_backward, x, vector, seed, options))
            for inverted in (False, True):
                saved = Saved(x, None if inverted else row, row, vector, vector, vector, seed)
                for dz in (x, None):
                    yield Case(
                        f"residual_norm_backward {name} inverted={inverted} dz={dz is not None}",
                        partial(module.residual_norm_backward, dz, x, saved, Options(1e-12, p, 2, inverted, "auto")),
                    )
        yield Case(
            f"norm_forward {size}",
            partial(module.residual_norm_forward, None, None, x, vector, vector, None, options),
        )
        yield Case(
            f"norm_forward {size} amax",
            partial(module.residual_norm_forward, None, None, x, vector, vector, None, options, _AMAX),
        )
        for inverted in (False, True):
            saved = Saved(x, None if inverted else row, row, vector, vector, None, None)
            yield Case(
                f"norm_backward {size} inverted={inverted}",
                partial(module.residual_norm_backward, None, x, saved, Options(1e-12, 0.0, 2, inverted, "auto")),
            )


def _other_norm_cases() -> Iterator[Case]:
    """Norms without a bias: their kernels are those of LayerNorm with parts left out."""
    for size, H, dtype in _sizes():
        x, vector, row = torch.empty(_ROWS, H, dtype=dtype), torch.empty(H, dtype=dtype), torch.empty(_ROWS)
        both = H == _EVERY_OPTION_AT and dtype == torch.bfloat16
        for kind, p in itertools.product(("rms_norm", "layer_norm"), (0.1, 0.0)) if both else [("rms_norm", 0.0)]:
            seed, name = _SEED if p else None, f"{kind} without bias {size} p={p}"
            options = Options(1e-5, p, 2, False, "auto", kind=kind)
            parts = x, None, x, vector, None, seed, options
            yield Case(f"forward of {name}", partial(residual_norm_triton.residual_norm_forward, *parts))
            yield Case(f"forward of {name} amax", partial(residual_norm_triton.residual_norm_forward, *parts, _AMAX))
            for inverted in (False, True):
                mean = None if inverted or kind == "rms_norm" else row
                saved, how = Saved(x, mean, row, vector, None, None, seed), options._replace(inverted=inverted)
                backward = partial(residual_norm_triton.residual_norm_backward, x, x, saved, how)
                yield Case(f"backward of {name} inverted={inverted}", backward)


def _head_norm_cases() -> Iterator[Case]:
    for (name, dtype), (heads, key_heads, D) in itertools.product(
        DTYPES.items(), ((36, 12, 64), (15, 3, 64), (32, 8, 128), (15, 3, 80))
    ):
        qkv, weight = torch.empty(_ROWS, heads, D, dtype=dtype), torch.empty(D, dtype=dtype)
        rstd, case = torch.empty(_ROWS, heads - key_heads), f"{heads} heads D{D} {name}"
        forward = partial(head_norm_triton.head_norm_forward, qkv, weight, weight, 1e-6, key_heads)
        backward = partial(head_norm_triton.head_norm_backward, qkv, qkv, rstd, weight, weight, key_heads)
        yield Case(f"head_norm forward {case}", forward)
        yield Case(f"head_norm backward {case}", backward)


def _mlp_cases() -> Iterator[Case]:
    for size, H, dtype in _sizes():
        f = torch.empty(_ROWS, 4 * H, dtype=dtype)
        gates = get_args(Activation) if H == _EVERY_OPTION_AT else ("silu",)
        for activation, with_bias in itertools.product(gates, (True, False)):
            yield from _gate_cases(f, activation, with_bias, f"{size} {activation} bias={with_bias}")
        for activation in ("silu", "relu2"):
            forward = partial(activation_triton.activation_forward, f, activation, False)
            yield Case(f"activation_forward {size} {activation}", forward)
            backward = partial(activation_triton.activation_backward, f, f, activation, True, False)
            yield Case(f"activation_backward {size} {activation} recompute=True bias=False", backward)
        for activation in ("gelu", "gelu_tanh"):
            yield Case(
                f"gelu_forward {size} {activation}", partial(activation_triton.activation_forward, f, activation, False)
            )
            for recompute in (False, True):
                yield Case(
                    f"gelu_backward {size} {activation} recompute={recompute}",
                    partial(activation_triton.activation_backward, f, f, activation, recompute),
                )


def _gate_cases(f: torch.Tensor, activation: Activation, with_bias: bool, name: str) -> Iterator[Case]:
    da = f[:, : f.shape[1] // 2].contiguous()
    if with_bias:
        yield Case(f"gate_forward {name}", partial(activation_triton.activation_forward, f, activation, True))
    for recompute in (False, True):
        backward = partial(activation_triton.gate_backward, da, f, activation, recompute, with_bias)
        yield Case(f"gate_backward {name} recompute={recompute}", backward)


def _cross_entropy_cases() -> Iterator[Case]:
    labels = torch.zeros(_ROWS, dtype=torch.int64)
    for V in VOCAB_SIZES:
        for name, dtype in DTYPES.items():
            logits = torch.empty(_ROWS, V, dtype=dtype)
            # Rows of an odd length start at odd addresses, where no load can be wide.
            narrow = frozenset({"_softmax_loss_kernel"}) if V % 8 else frozenset()
            yield Case(
                f"softmax_loss_ V{V} {name}",
                partial(cross_entropy_triton.softmax_loss_, logits, labels),
                narrow_kernels=narrow,
            )


# Which keys a query sees; masks by token are cut to S. Number of heads and of sequences select no variant, nor do 512 and 1024
# tokens differ.
_ATTENTION_MASKS = {
    "lengths": {"lengths": torch.ones(2, dtype=torch.int32)},
    "causal": {"causal": True},
    "packed": {"cu_seqlens": torch.zeros(3, dtype=torch.int32)},
    "causal packed": {"cu_seqlens": torch.zeros(3, dtype=torch.int32), "causal": True},
    "key_mask": {"key_mask": torch.ones(2, 512, dtype=torch.bool)},
    "bias": {"key_bias": torch.zeros(2, 512)},
    "causal segments": {"segment_ids": torch.zeros(2, 512, dtype=torch.int32), "causal": True},
}
_ATTENTION_DOTS = frozenset({"attention_forward", "attention_backward_queries", "attention_backward_keys"})


def _attention_cases() -> Iterator[Case]:
    for S, D, names, probabilities in (
        (64, 64, ("lengths", "bias", "causal segments"), (0.1,)),
        (128, 64, tuple(_ATTENTION_MASKS), (0.1,)),
        (128, 64, ("lengths", "causal", "bias"), (0.0,)),
        (512, 64, tuple(_ATTENTION_MASKS), (0.1,)),
        (512, 64, ("lengths", "causal", "bias"), (0.0,)),
        (512, 128, ("lengths", "causal", "bias", "causal segments"), (0.1, 0.0)),
    ):
        for name in names:
            for p in probabilities:
                yield _attention_case(S, D, name, p, torch.bfloat16)
    for name in ("lengths", "bias"):
        yield _attention_case(512, 64, name, 0.1, torch.bfloat16, stochastic=True)
    for name in ("causal", "bias"):
        yield _attention_case(512, 64, name, 0.1, torch.float16)
        yield _attention_case(512, 64, name, 0.1, torch.float32)


def _attention_case(S: int, D: int, mask: str, p: float, dtype: torch.dtype, stochastic: bool = False) -> Case:
    N = 1024 // D
    packed = "cu_seqlens" in _ATTENTION_MASKS[mask]
    qkv = torch.empty(2 * S, 3, N, D, dtype=dtype) if packed else torch.empty(2, S, 3, N, D, dtype=dtype)
    options = attention_triton.Options(**_masks_of(mask, S), max_length=S, p=p, seed=_SEED, site=1)
    # wgmma takes at least 64 rows, for which fp32 products have too few registers
    dots = frozenset() if dtype == torch.float32 else _ATTENTION_DOTS
    name = f"attention S{S} D{D} {mask} p={p} {dtype} stochastic={stochastic}"
    return Case(name, partial(_attend, qkv, options, stochastic), dot_kernels=dots)


def _masks_of(mask: str, S: int) -> dict[str, Any]:
    by_token = ("key_mask", "segment_ids", "key_bias")
    return {name: given[:, :S] if name in by_token else given for name, given in _ATTENTION_MASKS[mask].items()}


def _attend(qkv: torch.Tensor, options: attention_triton.Options, stochastic: bool = False) -> None:
    out, lse = attention_triton.forward(qkv, options)
    attention_backward_triton.backward(out, qkv, out, lse, options, stochastic=stochastic)


# Columns of a head, query heads to a key head, window; all of them turn queries and keys.
_ATTENTION_MODELS = {
    "Llama": (64, 3, None),
    "Llama in fp32": (64, 3, None),
    "Mistral": (128, 4, 4095),
    "Qwen3": (128, 2, None),
    "ModernBERT local": (64, 1, 64),
    "ModernBERT global": (64, 1, None),
}


def _model_attention_cases() -> Iterator[Case]:
    """Attention of today's models."""
    for model, mask, lengths in (
        ("Llama", "causal segments", (128, 512)),
        ("Llama", "causal", (512,)),
        ("Llama in fp32", "causal", (512,)),
        ("Mistral", "causal", (512,)),
        ("Mistral", "causal segments", (512,)),
        ("Qwen3", "causal", (512,)),
        ("ModernBERT local", "key_mask", (64, 128, 512)),
        ("ModernBERT local", "packed", (128, 512)),
        ("ModernBERT global", "key_mask", (128,)),
        ("ModernBERT global", "packed", (512,)),
    ):
        for S, p in itertools.product(lengths, (0.1, 0.0)):
            D, share, window = _ATTENTION_MODELS[model]
            tokens = (2 * S,) if mask == "packed" else (2, S)
            key_heads = 2 if share > 1 else None
            heads = (2 * (share + 2),) if share > 1 else (3, 12)
            options = attention_triton.Options(
                **_masks_of(mask, S),
                max_length=S,
                p=p,
                seed=_SEED,
                site=1,
                key_heads=key_heads,
                rotary=torch.empty(S, D),
                window=window,
            )
            dtype = torch.float32 if model.endswith("fp32") else torch.bfloat16
            qkv = torch.empty(*tokens, *heads, D, dtype=dtype)
            dots = frozenset() if dtype == torch.float32 else _ATTENTION_DOTS
            name = f"attention of {model} S{S} {mask} p={p}"
            yield Case(name, partial(_attend, qkv, options), dot_kernels=dots)


def _stack_cases() -> Iterator[Case]:
    """Launches that must share their kernels: two layers of a stack, whose seeds lie eight bytes apart, and packed batches.

    Their sizes and masks are those of no other case.
    """
    x, vector, row = (
        torch.empty(_ROWS, 512, dtype=torch.bfloat16),
        torch.empty(512, dtype=torch.bfloat16),
        torch.empty(_ROWS),
    )
    options, seeds = Options(1e-12, 0.1, 2, False, "auto"), torch.zeros(2, dtype=torch.int64).unbind()
    module = residual_norm_triton

    def norms() -> None:
        for seed in seeds:
            module.residual_norm_forward(x, vector, x, vector, vector, seed, options)
            module.residual_norm_backward(x, x, Saved(x, row, row, vector, vector, vector, seed), options)

    def adds() -> None:
        for seed in seeds:
            module.residual_add_forward(x, vector, x, seed, options)
            module.residual_add_backward(x, vector, seed, options)

    def attention() -> None:
        qkv = torch.empty(2, 512, 3, 2, 64, dtype=torch.bfloat16)
        for seed in seeds:
            options = attention_triton.Options(p=0.1, seed=seed)
            out, lse = attention_triton.forward(qkv, options)
            attention_backward_triton.backward(out, qkv, out, lse, options)

    def packed_attention() -> None:
        borders = torch.zeros(3, dtype=torch.int32)
        options = attention_triton.Options(cu_seqlens=borders, max_length=512, p=0.1, seed=_SEED)
        for num_tokens in (16, 1000, 1024):
            qkv = torch.empty(num_tokens, 3, 2, 32, dtype=torch.bfloat16)
            out, lse = attention_triton.forward(qkv, options)
            attention_backward_triton.backward(out, qkv, out, lse, options)

    yield Case("attention of three packed batches", packed_attention, dot_kernels=_ATTENTION_DOTS)
    yield Case("norms of two layers", norms)
    yield Case("additions of two layers", adds)
    yield Case("attention of two layers", attention, dot_kernels=_ATTENTION_DOTS)


def _fp8_cases() -> Iterator[Case]:
    fp8_dtypes, layouts = (torch.float8_e4m3fn, torch.float8_e5m2), ((True, True), (True, False), (False, True))
    products = itertools.product
    for fp8_dtype, (name, dtype), delayed, (rows, columns) in products(
        fp8_dtypes, DTYPES.items(), (True, False), layouts
    ):
        x, scale = torch.empty(_ROWS, 1024, dtype=dtype), torch.ones(()) if delayed else None
        yield Case(
            f"quantize {name} to {fp8_dtype} delayed={delayed} rows={rows} columns={columns}",
            partial(quantize, x, scale, None, fp8_dtype, rows, columns),
        )
    for (name, dtype), delayed, activation in products(DTYPES.items(), (True, False), ("gelu", "gelu_tanh")):
        f, scale = torch.empty(_ROWS, 1024, dtype=dtype), torch.ones(()) if delayed else None
        for rows, columns in layouts if dtype == torch.bfloat16 else layouts[:1]:
            ending = f"{activation} {name} delayed={delayed} rows={rows} columns={columns}"
            if rows:
                forward = partial(gelu_quantize, f, scale, activation, fp8_dtypes[0], columns)
                yield Case(f"quantize {ending}", forward)
            backward = partial(gelu_backward_quantize, f, f, scale, activation, fp8_dtypes[1], rows, columns)
            yield Case(f"backward quantize {ending}", backward)
