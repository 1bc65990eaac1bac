"""Rows of bench_layer.py on the way of Transformer Engine's tutorial: from plain torch to a whole layer in FP8.

All are one GPT layer, pre-LN and causal, with the weights of the task. quickstart_te.py shows the same stages to read.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_rows import (
    BASELINE,
    CAPTURED,
    CAPTURED_BASELINE,
    ENGINE,
    FP8_ERROR,
    OURS,
    PLAIN,
    captured_plain,
    compiled_plain,
    emulated,
    ours,
    ours_captured,
    ours_in_fp8,
    plain,
    plain_layer,
    self_attention,
    transformer_engine,
)
from bench_task import Row, Task
from torch import Tensor, nn

from xformer_train.kernels import LayerConfig, te

TE = "te."  # how the names of rows made of te modules begin

_FUSED_NAMES = {
    "attention_norm.": "norm_qkv.layer_norm_",
    "qkv.": "norm_qkv.",
    "attention_output.": "projection.",
    "mlp_norm.": "norm_mlp.layer_norm_",
    "intermediate.": "norm_mlp.fc1_",
    "output.": "norm_mlp.fc2_",
}
_WHOLE_NAMES = {
    "attention_norm.": "self_attention.layernorm_qkv.layer_norm_",
    "qkv.": "self_attention.layernorm_qkv.",
    "attention_output.": "self_attention.proj.",
    "mlp_norm.": "layernorm_mlp.layer_norm_",
    "intermediate.": "layernorm_mlp.fc1_",
    "output.": "layernorm_mlp.fc2_",
}


def te_rows(task: Task) -> dict[str, Callable[[], Row]]:
    """How to make each row, by name, in the order of the tutorial; then the layer of this project."""
    delayed = te.DelayedScaling(fp8_format=te.Format.HYBRID, amax_history_len=16, amax_compute_algo="max")
    ending = emulated(task)
    return {
        PLAIN: lambda: plain(task),
        BASELINE: lambda: compiled_plain(task),
        f"{TE}Linear, {TE}LayerNorm": lambda: _swapped(task),
        f"{TE}LayerNormLinear, {TE}LayerNormMLP": lambda: _fused(task),
        f"{TE}TransformerLayer": lambda: _whole(task),
        f"{TE}TransformerLayer, FP8 delayed{ending}": lambda: _in_fp8(_whole(task), task, delayed),
        f"{TE}TransformerLayer, FP8 current{ending}": lambda: _in_fp8(_whole(task), task, te.Float8CurrentScaling()),
        OURS: lambda: ours(task),
        f"{OURS}, FP8{ending}": lambda: ours_in_fp8(task),
        CAPTURED: lambda: ours_captured(task),
        CAPTURED_BASELINE: lambda: captured_plain(task),
        ENGINE: lambda: transformer_engine(task),
    }


def _swapped(task: Task) -> Row:
    layer = plain_layer(task, te.LayerNorm, te.Linear)
    return Row(layer, lambda x: layer(x, None))


class _FusedLayer(nn.Module):
    """Of modules that begin with their LayerNorm."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.p = config.num_attention_heads, config.hidden_dropout_prob
        self.norm_qkv = te.LayerNormLinear(size, 3 * size, eps)
        self.projection = te.Linear(size, size)
        self.norm_mlp = te.LayerNormMLP(size, config.intermediate_size, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) from the same."""
        context = self_attention(self.norm_qkv(x), self.heads, self.p, causal=True)
        x = x + F.dropout(self.projection(context), self.p)
        return x + F.dropout(self.norm_mlp(x), self.p)


def _fused(task: Task) -> Row:
    with task.device:
        layer = _FusedLayer(task.config).to(task.dtype)
    layer.load_state_dict(_renamed(task.weights, _FUSED_NAMES))
    return Row(layer, layer)


def _whole(task: Task) -> Row:
    config = task.config
    layer = te.TransformerLayer(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        layernorm_epsilon=config.layer_norm_eps,
        hidden_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        self_attn_mask_type="causal",
        fuse_qkv_params=True,
        attn_input_format="bshd",
        device=task.device,
        params_dtype=task.dtype,
    )
    weights = dict(task.weights)
    for name in ("qkv.weight", "qkv.bias"):  # from all queries, all keys, all values to head by head
        parts = weights[name].unflatten(0, (3, config.num_attention_heads, -1))
        weights[name] = parts.transpose(0, 1).flatten(0, 2)
    layer.load_state_dict(_renamed(weights, _WHOLE_NAMES))
    return Row(layer, layer)


def _in_fp8(row: Row, task: Task, recipe: te.DelayedScaling | te.Float8CurrentScaling) -> Row:
    """The row with FP8 products, after a step from which delayed scaling knows its scales."""

    def call(x: Tensor) -> Tensor:
        with te.fp8_autocast(fp8_recipe=recipe):
            return row.call(x)

    x = torch.randn(*task.key_mask.shape, task.shape.hidden_size, device=task.device, dtype=task.dtype)
    call(x).backward(torch.randn_like(x))
    row.module.zero_grad()
    return Row(row.module, call, allowed_error=FP8_ERROR)


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """names: of the task's modules -> of other ones, or prefixes within their names."""
    parts = {key: key.partition(".") for key in weights}
    return {names[f"{module}."] + kind: weights[key] for key, (module, _, kind) in parts.items()}
