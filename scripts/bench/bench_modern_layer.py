"""One training step of one of today's layers: ours against that of transformers, in turns, in one process.

Both have the same weights, and rows without padding or dropout, as today's models are trained. Before anything is timed, output
and input gradient of both are compared; the exit status is 1 where they differ by more than the dtype's rounding. What a model
makes once for all its layers, tables of angles and masks, is made before.

The table has medians over the rounds in ms, what forward keeps for backward without parameters, and by how much ours is faster.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_device import machine_line
from bench_steps import EagerStep, Inputs, run_once, saved_bytes, time_steps
from bench_task import Row
from torch import Tensor, nn

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer

WARM_UPS = 2
NO_BIAS = {"norm_bias": False, "attention_bias": False, "mlp_bias": False}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Kind:
    """A layer of ours, its stock twin on sequences of a length, and the names of the twin's weights by ours."""

    config: LayerConfig
    causal: bool
    stock: Callable[[LayerConfig, int], tuple[nn.Module, dict[str, Any]]]
    names: dict[str, tuple[str, ...]]


def llama(config: LayerConfig, length: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a LlamaDecoderLayer, and what its model hands to each layer."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    stock = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.key_heads,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.layer_norm_eps,
        attn_implementation="sdpa",
    )
    angles = LlamaRotaryEmbedding(stock)(torch.zeros(1), torch.arange(length)[None])
    return LlamaDecoderLayer(stock, 0), {"position_embeddings": angles}


def modernbert(config: LayerConfig, length: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a ModernBertEncoderLayer that has a norm before attention, and what its model hands to each layer."""
    from transformers import ModernBertConfig
    from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer, ModernBertRotaryEmbedding

    window = config.attention_window
    kind = "full_attention" if window is None else "sliding_attention"
    stock = ModernBertConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=2,
        layer_types=[kind] * 2,
        norm_eps=config.layer_norm_eps,
        attn_implementation="sdpa",
    )
    places = torch.arange(length)
    angles = ModernBertRotaryEmbedding(stock)(torch.zeros(1), places[None], kind)
    near = None if window is None else ((places[:, None] - places).abs() <= window)[None, None]
    return ModernBertEncoderLayer(stock, 1), {"position_embeddings": angles, "attention_mask": near}


LLAMA = LayerConfig(
    576,
    9,
    1536,
    num_key_value_heads=3,
    hidden_act="silu",
    gated_mlp=True,
    norm="rms_norm",
    rope_theta=10_000.0,
    layer_norm_eps=1e-6,
    **NO_BIAS,
    **NO_DROPOUT,
)
MODERNBERT = LayerConfig(
    768, 12, 1152, gated_mlp=True, rope_theta=160_000.0, layer_norm_eps=1e-5, **NO_BIAS, **NO_DROPOUT
)
LOCAL = LayerConfig(
    768,
    12,
    1152,
    gated_mlp=True,
    rope_theta=10_000.0,
    attention_window=64,
    layer_norm_eps=1e-5,
    **NO_BIAS,
    **NO_DROPOUT,
)
OF_LLAMA = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "intermediate": ("mlp.gate_proj", "mlp.up_proj"),
    "output": ("mlp.down_proj",),
}
OF_MODERNBERT = {
    "attention_norm": ("attn_norm",),
    "qkv": ("attn.Wqkv",),
    "attention_output": ("attn.Wo",),
    "mlp_norm": ("mlp_norm",),
    "intermediate": ("mlp.Wi",),
    "output": ("mlp.Wo",),
}
KINDS = {
    "llama-135m": Kind(LLAMA, True, llama, OF_LLAMA),
    "modernbert-base": Kind(MODERNBERT, False, modernbert, OF_MODERNBERT),
    "modernbert-base-local": Kind(LOCAL, False, modernbert, OF_MODERNBERT),
}


def rows_of(kind: Kind, length: int, dtype: torch.dtype) -> dict[str, Row]:
    """Return our layer and the stock one with the same weights."""
    torch.manual_seed(0)
    ours = TransformerLayer(kind.config).to(dtype)
    stock, given = kind.stock(kind.config, length)
    of_ours = ours.state_dict()
    weights = {}
    for name, theirs in kind.names.items():
        sizes = [stock.get_parameter(f"{other}.weight").shape[0] for other in theirs]
        parts = of_ours[f"{name}.weight"].split(sizes)
        weights |= {f"{other}.weight": part for other, part in zip(theirs, parts, strict=True)}
    stock.load_state_dict(weights)
    stock.to(dtype).train()
    mask = AttentionMask(causal=kind.causal)
    angles = tuple(part.to(dtype) for part in given["position_embeddings"])
    given = given | {"position_embeddings": angles}
    return {
        "ours": Row(ours, lambda x: ours(x, mask)),
        f"transformers {type(stock).__name__}": Row(stock, lambda x: _first(stock(x, **given))),
    }


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def measure(name: str, batch: int, length: int, dtype: torch.dtype, rounds: int) -> bool:
    """Print the table of one kind of layer; return whether both rows compute the same."""
    kind = KINDS[name]
    torch.manual_seed(1)
    x, dy = (torch.randn(batch, length, kind.config.hidden_size).to(dtype) for _ in range(2))
    rows = rows_of(kind, length, dtype)
    inputs = {row: Inputs([x.clone().requires_grad_()], [dy]) for row in rows}
    steps = {row: EagerStep(rows[row], inputs[row]) for row in rows}
    ours, theirs = (run_once(step) for step in steps.values())
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(ours, theirs, strict=True)]
    times: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for turn in range(WARM_UPS + rounds):
        for row, step in steps.items():
            pairs = time_steps(step, inputs[row])
            if turn >= WARM_UPS:
                times[row] += pairs
    print(f"\n{name}, {batch} x {length}, {str(dtype).removeprefix('torch.')}; largest difference {max(errors):.0e}")
    print(f"{'row':40}{'fwd ms':>10}{'bwd ms':>10}{'both ms':>10}{'kept MiB':>10}{'ours is':>10}")
    both_s = {row: statistics.median(sum(pair) for pair in pairs) for row, pairs in times.items()}
    for row, pairs in times.items():
        forward_s, backward_s = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        kept = saved_bytes(rows[row], inputs[row].x[0]) / 2**20
        ratio = both_s[row] / both_s["ours"]
        figures = f"{1e3 * forward_s:10.2f}{1e3 * backward_s:10.2f}{1e3 * both_s[row]:10.2f}{kept:10.1f}{ratio:10.2f}"
        print(f"{row:40}{figures}", flush=True)
    return max(errors) <= LARGEST_ERROR[dtype]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{machine_line()}; medians of {arguments.rounds} rounds")
    correct = [
        measure(name, arguments.batch, arguments.length, getattr(torch, dtype), arguments.rounds)
        for name in arguments.kinds
        for dtype in arguments.dtypes
    ]
    if not all(correct):
        sys.exit("a layer of ours does not compute what that of transformers does")


if __name__ == "__main__":
    main()
