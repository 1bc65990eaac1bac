"""The rows of bench_layer.py: one transformer layer as we and as others compute it, each on the same batch.

A row that cannot be made here raises `UnavailableError` with the reason.
"""

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from bench_task import Row, Task, UnavailableError
from torch import Tensor, nn

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, TransformerLayer
from xformer_train.kernels.fp8.linear import fp8_path
from xformer_train.kernels.layers.layer import invertible_norms

PLAIN = "torch, written out"
BASELINE = "torch.compile of it"
OURS = "ours"
CAPTURED = f"{OURS}, CUDA graph"
CAPTURED_BASELINE = "torch.compile, CUDA graph"
ENGINE = "Transformer Engine, pre-LN"
EMULATED = " (emulated)"  # what FP8 rows are called besides where the device has no FP8 products
# of output and input gradient, relative: the noise of E4M3 and E5M2 in a sum with a residual that has none
FP8_ERROR = 0.1


def layer_rows(task: Task) -> dict[str, Callable[[], Row]]:
    """How to make each row, by name; ours first."""
    stock = _gpt2_block if task.shape.causal else _bert_layer
    return {
        OURS: lambda: ours(task),
        f"{OURS}, all memory flags": lambda: ours(
            task, normalize_invertible=True, gelu_checkpoint=True, attn_dropout_checkpoint=True
        ),
        f"{OURS}, unpadded": lambda: _ours_unpadded(task),
        CAPTURED: lambda: ours_captured(task),
        f"{OURS}, stack's CUDA graph": lambda: _ours_in_a_stack(task),
        f"{OURS}, FP8{emulated(task)}": lambda: ours_in_fp8(task),
        PLAIN: lambda: plain(task),
        BASELINE: lambda: compiled_plain(task),
        CAPTURED_BASELINE: lambda: captured_plain(task),
        f"transformers {'GPT2Block' if task.shape.causal else 'BertLayer'}": lambda: stock(task),
        "nn.TransformerEncoderLayer": lambda: _encoder_layer(task),
        "torch, Liger's LayerNorm": lambda: _liger(task),
        "DeepSpeed's kernel, fp16": lambda: _deepspeed(task),
        ENGINE: lambda: transformer_engine(task),
    }


def ours(task: Task, **flags: bool) -> Row:
    """Our layer on the padded batch."""
    layer = _our_layer(replace(task.config, **flags), task)  # type: ignore[arg-type]
    mask = AttentionMask(causal=task.shape.causal, key_mask=task.key_mask if task.padded else None)
    # Asked beforehand, because the host waits for the answer; a stack asks once in a step, for all its layers.
    (invertible,) = invertible_norms([layer])
    return Row(layer, lambda x: layer(x, mask, invertible=invertible))


def _ours_unpadded(task: Task) -> Row:
    layer = _our_layer(task.config, task)
    borders = F.pad(task.key_mask.sum(1).cumsum(0), (1, 0)).int()
    mask = AttentionMask(cu_seqlens=borders, max_length=task.shape.length, causal=task.shape.causal)
    return Row(layer, lambda x: layer(x, mask), packed=True)


def ours_captured(task: Task) -> Row:
    """Our layer on the padded batch, its step captured by the benchmark."""
    _need_cuda(task)
    return replace(ours(task), captured=True, counts_memory=False)


def _ours_in_a_stack(task: Task) -> Row:
    """With the copies in and out that a whole stack makes once, and autograd's copy of every gradient."""
    _need_cuda(task)
    with task.device:
        stack = LayerStack(task.config, 1, cuda_graph=True).to(task.dtype)
    stack[0].load_state_dict(task.weights)
    mask = AttentionMask(causal=task.shape.causal, key_mask=task.key_mask if task.padded else None)
    return Row(stack, lambda x: stack(x, mask), counts_memory=False)


def ours_in_fp8(task: Task) -> Row:
    """Our layer with FP8 products on the padded batch."""
    with task.device:
        stack = LayerStack(task.config, 1, fp8=True).to(task.dtype)
    stack[0].load_state_dict(task.weights)
    mask = AttentionMask(causal=task.shape.causal, key_mask=task.key_mask if task.padded else None)
    return Row(stack, lambda x: stack(x, mask), allowed_error=FP8_ERROR)


def emulated(task: Task) -> str:
    """Return EMULATED or nothing."""
    return EMULATED if "emulated" in fp8_path(task.device) else ""


def _our_layer(config: LayerConfig, task: Task) -> TransformerLayer:
    with task.device:
        layer = TransformerLayer(config).to(task.dtype)
    layer.load_state_dict(task.weights)
    return layer


def self_attention(qkv: Tensor, heads: int, p: float, causal: bool, bias: Tensor | None = None) -> Tensor:
    """(B, S, H) by torch's own function, of qkv (B, S, 3 H): all queries, all keys, all values."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=p, is_causal=causal).transpose(1, 2).flatten(2)


class PlainLayer(nn.Module):
    """The layer as one would write it with torch's own functions, or with modules of the same arguments."""

    def __init__(
        self,
        config: LayerConfig,
        causal: bool,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        linear: Callable[..., nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.heads, self.p, self.causal = config.num_attention_heads, config.hidden_dropout_prob, causal
        self.pre_layer_norm = config.pre_layer_norm
        self.approximate = "tanh" if config.hidden_act == "gelu_tanh" else "none"
        self.qkv, self.attention_output = linear(size, 3 * size), linear(size, size)
        self.intermediate, self.output = linear(size, width), linear(width, size)
        self.attention_norm, self.mlp_norm = (norm(size, eps=config.layer_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, S, H) from (B, S, H) and an additive mask (B, 1, 1, S)."""
        if self.pre_layer_norm:
            x = x + self._attend(self.attention_norm(x), bias)
            return x + self._feed_forward(self.mlp_norm(x))
        x = self.attention_norm(x + self._attend(x, bias))
        y: Tensor = self.mlp_norm(x + self._feed_forward(x))
        return y

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        context = self_attention(self.qkv(x), self.heads, self.p, self.causal, bias)
        return F.dropout(self.attention_output(context), self.p)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.output(F.gelu(self.intermediate(x), approximate=self.approximate)), self.p)


def plain_layer(task: Task, *modules: Callable[..., nn.Module]) -> PlainLayer:
    """The written-out layer with the weights of the task, whose names it shares; modules: its norm, its linear."""
    with task.device:
        layer = PlainLayer(task.config, task.shape.causal, *modules).to(task.dtype)
    layer.load_state_dict(task.weights)
    return layer


def plain(task: Task) -> Row:
    """The written-out layer on the padded batch."""
    layer, bias = plain_layer(task), task.additive_mask()
    return Row(layer, lambda x: layer(x, bias))


def compiled_plain(task: Task, mode: str | None = None) -> Row:
    """The written-out layer, compiled."""
    if task.device.type == "cpu" and shutil.which("c++") is None:
        raise UnavailableError("needs a C++ compiler")
    layer, bias = plain_layer(task), task.additive_mask()
    # One shape per compilation: traced for all shapes after a second one, the kernels would be slower.
    compiled = torch.compile(layer, dynamic=False, mode=mode)
    return Row(layer, lambda x: compiled(x, bias))


def captured_plain(task: Task) -> Row:
    """The written-out layer, compiled and captured by the compiler."""
    _need_cuda(task)
    row = compiled_plain(task, mode="reduce-overhead")

    def call(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return row.call(x)

    return replace(row, call=call, counts_memory=False)


def _bert_layer(task: Task) -> Row:
    _need("transformers")
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(
        hidden_size=task.config.hidden_size,
        num_attention_heads=task.config.num_attention_heads,
        intermediate_size=task.config.intermediate_size,
        hidden_dropout_prob=task.config.hidden_dropout_prob,
        attention_probs_dropout_prob=task.config.attention_probs_dropout_prob,
        attn_implementation="sdpa",
    )
    layer, bias = _ready(BertLayer(config), task), task.additive_mask()
    return Row(layer, lambda x: _first(layer(x, bias)))


def _gpt2_block(task: Task) -> Row:
    _need("transformers")
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    p = task.config.hidden_dropout_prob
    config = GPT2Config(
        n_embd=task.config.hidden_size,
        n_head=task.config.num_attention_heads,
        n_inner=task.config.intermediate_size,
        n_positions=task.shape.length,
        resid_pdrop=p,
        attn_pdrop=p,
        activation_function="gelu_pytorch_tanh",  # "gelu_new" is the same function, written out in eight operations
        attn_implementation="sdpa",
    )
    layer = _ready(GPT2Block(config, layer_idx=0), task)
    return Row(layer, lambda x: _first(layer(x)))


def _encoder_layer(task: Task) -> Row:
    config, causal = task.config, task.shape.causal
    layer = _ready(
        nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            F.gelu if config.hidden_act == "gelu" else lambda x: F.gelu(x, approximate="tanh"),
            batch_first=True,
            norm_first=config.pre_layer_norm,
        ),
        task,
    )
    order, padding = None, ~task.key_mask if task.padded else None
    if causal:
        order = nn.Transformer.generate_square_subsequent_mask(task.shape.length, task.device, task.dtype)
    return Row(layer, lambda x: layer(x, src_mask=order, src_key_padding_mask=padding, is_causal=causal))


def _liger(task: Task) -> Row:
    _need("liger_kernel")
    _need_cuda(task)
    from liger_kernel.transformers import LigerLayerNorm  # type: ignore[import-not-found]

    layer, bias = plain_layer(task, LigerLayerNorm), task.additive_mask()
    return Row(layer, lambda x: layer(x, bias))


def _deepspeed(task: Task) -> Row:
    """DeepSpeed's layer, compiled at its first use; without bf16, and so in fp16 whatever the others have."""
    _need("deepspeed")
    _need_cuda(task)
    if task.shape.causal:
        raise UnavailableError("has no causal attention")
    from deepspeed.ops.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

    config = DeepSpeedTransformerConfig(
        batch_size=task.shape.batch,
        hidden_size=task.config.hidden_size,
        intermediate_size=task.config.intermediate_size,
        heads=task.config.num_attention_heads,
        attn_dropout_ratio=task.config.attention_probs_dropout_prob,
        hidden_dropout_ratio=task.config.hidden_dropout_prob,
        num_hidden_layers=1,
        initializer_range=task.config.initializer_range,
        seed=0,
        fp16=True,
        pre_layer_norm=False,
    )
    half = replace(task, dtype=torch.float16)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its config
        layer = _ready(DeepSpeedTransformerLayer(config), half)
    bias = torch.zeros(task.key_mask.shape, device=task.device, dtype=torch.float16)
    bias = bias.masked_fill_(~task.key_mask, -10000.0)[:, None, None]
    # what it keeps stands on the context of its Function, where no hook sees it
    return Row(layer, lambda x: _first(layer(x, bias)), dtype=torch.float16, counts_memory=False)


def transformer_engine(task: Task) -> Row:
    """The package of that name, with weights of its own."""
    _need("transformer_engine")
    _need_cuda(task)
    from transformer_engine.pytorch import TransformerLayer as EngineLayer  # type: ignore[import-not-found]

    p = task.config.hidden_dropout_prob
    layer = EngineLayer(
        task.config.hidden_size,
        task.config.intermediate_size,
        task.config.num_attention_heads,
        hidden_dropout=p,
        attention_dropout=task.config.attention_probs_dropout_prob,
        self_attn_mask_type="causal" if task.shape.causal else "padding" if task.padded else "no_mask",
        attn_input_format="bshd",
        fuse_qkv_params=True,
        params_dtype=task.dtype,
        device=task.device,
    ).train()
    hidden = ~task.key_mask[:, None, None] if task.padded else None
    return Row(layer, lambda x: layer(x, attention_mask=hidden))


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UnavailableError("not installed")


def _need_cuda(task: Task) -> None:
    if task.device.type != "cuda":
        raise UnavailableError("needs CUDA")


def _ready(module: nn.Module, task: Task) -> nn.Module:
    return module.to(task.device, task.dtype).train()


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
