"""The rows of bench_layer.py: one transformer layer as we and as others compute it, each on the same batch.

A row that cannot be made here raises `UnavailableError` with the reason.
"""

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, TransformerLayer
from xformer_train.kernels.layer import invertible_norms

BASELINE = "torch.compile of it"
OURS = "ours"


class UnavailableError(Exception):
    """Why a row cannot be run here."""


@dataclass(frozen=True)
class Shape:
    """A batch and a layer of four times its width: BERT's (post-LN, erf GELU), or if causal GPT's (pre-LN, tanh GELU).

    padding: `none`; `some`, an eighth of every fourth sequence or so; `natural`, lengths spread evenly from 1 to `length`.
    """

    hidden_size: int
    num_attention_heads: int
    batch: int
    length: int
    causal: bool = False
    padding: Literal["none", "some", "natural"] = "none"

    def lengths(self) -> Tensor:
        """Real tokens of each sequence, (batch,) int64, always the same ones."""
        full = torch.full((self.batch,), self.length)
        if self.padding == "some":
            full[:: max(2, self.batch // 4)] -= self.length // 8
        if self.padding == "natural":
            spread = torch.linspace(1, self.length, self.batch).round().long()
            return spread[torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))]
        return full


SHAPES = {
    "bert-tiny": Shape(128, 2, 16, 128, padding="some"),
    "bert-tiny-natural": Shape(128, 2, 16, 128, padding="natural"),
    "bert-base": Shape(768, 12, 8, 128, padding="some"),
    "bert-large-128": Shape(1024, 16, 64, 128),
    "bert-large-512": Shape(1024, 16, 16, 512),
    "bert-large-1k-tokens": Shape(1024, 16, 8, 128),
    "bert-large-128-natural": Shape(1024, 16, 64, 128, padding="natural"),
    "bert-large-512-natural": Shape(1024, 16, 16, 512, padding="natural"),
    "gpt2-medium": Shape(1024, 16, 8, 1024, causal=True),
    "gpt-1.3b": Shape(2048, 16, 4, 2048, causal=True),
}
CPU_SHAPES = ["bert-tiny", "bert-base"]
GPU_SHAPES = [name for name, shape in SHAPES.items() if shape.hidden_size >= 1024]


@dataclass(frozen=True)
class Task:
    """What every row of a shape computes: this layer, with these weights, on sequences of these lengths."""

    shape: Shape
    config: LayerConfig
    dtype: torch.dtype
    key_mask: Tensor
    """(B, S) bool on the device, True = a token."""
    weights: dict[str, Tensor]
    """Of a `TransformerLayer`."""

    @property
    def device(self) -> torch.device:
        return self.key_mask.device

    @property
    def padded(self) -> bool:
        """Whether the rows need the mask; without padding all go without one, which frees the choice of their kernels."""
        return self.shape.padding != "none"

    def additive_mask(self) -> Tensor | None:
        """(B, 1, 1, S), 0 at tokens and far below it at padding; None without padding."""
        if not self.padded:
            return None
        bias = torch.zeros(self.key_mask.shape, device=self.device, dtype=self.dtype)
        return bias.masked_fill_(~self.key_mask, torch.finfo(self.dtype).min / 2)[:, None, None]

    def without_dropout(self) -> "Task":
        return replace(self, config=replace(self.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def make_task(shape: Shape, dtype: torch.dtype, device: torch.device, p: float) -> Task:
    """The layer of `shape` at dropout p."""
    config = LayerConfig(
        shape.hidden_size,
        shape.num_attention_heads,
        4 * shape.hidden_size,
        hidden_act="gelu_tanh" if shape.causal else "gelu",
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        pre_layer_norm=shape.causal,
    )
    torch.manual_seed(0)
    weights = TransformerLayer(config).to(device, dtype).state_dict()
    for value in weights.values():
        if value.dim() == 1:  # a bias of 0 or a scale of 1 could be left out unseen
            value.add_(torch.randn_like(value), alpha=0.1)
    key_mask = torch.arange(shape.length) < shape.lengths()[:, None]
    return Task(shape, config, dtype, key_mask.to(device), weights)


@dataclass(frozen=True)
class Row:
    """One way to compute the layer, ready to run.

    call: hidden states (B, S, H) to the same; of a packed row (T, H), the real tokens alone.
    dtype: None for that of the task. captured: bench_layer captures its step as a CUDA graph. counts_memory: whether what it
    saves goes through autograd and what a step takes through the allocator, where they can be counted.
    """

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    packed: bool = False
    dtype: torch.dtype | None = None
    captured: bool = False
    counts_memory: bool = True


def rows_of(task: Task) -> dict[str, Callable[[], Row]]:
    """How to make each row, by name; ours first."""
    stock = _gpt2_block if task.shape.causal else _bert_layer
    return {
        OURS: lambda: ours(task),
        f"{OURS}, all memory flags": lambda: ours(
            task, normalize_invertible=True, gelu_checkpoint=True, attn_dropout_checkpoint=True
        ),
        f"{OURS}, unpadded": lambda: _ours_unpadded(task),
        f"{OURS}, CUDA graph": lambda: _ours_captured(task),
        f"{OURS}, stack's CUDA graph": lambda: _ours_in_a_stack(task),
        "torch, written out": lambda: plain(task),
        BASELINE: lambda: _compiled(task),
        "torch.compile, CUDA graph": lambda: _compiled_captured(task),
        f"transformers {'GPT2Block' if task.shape.causal else 'BertLayer'}": lambda: stock(task),
        "nn.TransformerEncoderLayer": lambda: _encoder_layer(task),
        "torch, Liger's LayerNorm": lambda: _liger(task),
        "DeepSpeed's kernel, fp16": lambda: _deepspeed(task),
        "Transformer Engine, pre-LN": lambda: _transformer_engine(task),
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


def _ours_captured(task: Task) -> Row:
    _need_cuda(task)
    return replace(ours(task), captured=True, counts_memory=False)


def _ours_in_a_stack(task: Task) -> Row:
    """With the copies in and out that a whole stack makes once, and autograd's copy of every gradient."""
    _need_cuda(task)
    stack = LayerStack(task.config, 1, cuda_graph=True).to(task.device, task.dtype)
    stack[0].load_state_dict(task.weights)
    mask = AttentionMask(causal=task.shape.causal, key_mask=task.key_mask if task.padded else None)
    return Row(stack, lambda x: stack(x, mask), counts_memory=False)


def _our_layer(config: LayerConfig, task: Task) -> TransformerLayer:
    layer = TransformerLayer(config).to(task.device, task.dtype)
    layer.load_state_dict(task.weights)
    return layer


class PlainLayer(nn.Module):
    """The layer as one would write it with torch's own functions."""

    def __init__(self, config: LayerConfig, causal: bool, norm: Callable[..., nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.heads, self.p, self.causal = config.num_attention_heads, config.hidden_dropout_prob, causal
        self.pre_layer_norm = config.pre_layer_norm
        self.approximate = "tanh" if config.hidden_act == "gelu_tanh" else "none"
        self.qkv, self.attention_output = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.intermediate, self.output = nn.Linear(size, width), nn.Linear(width, size)
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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=self.p, is_causal=self.causal)
        return F.dropout(self.attention_output(context.transpose(1, 2).flatten(2)), self.p)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.output(F.gelu(self.intermediate(x), approximate=self.approximate)), self.p)


def plain_layer(task: Task, norm: Callable[..., nn.Module] = nn.LayerNorm) -> PlainLayer:
    """The written-out layer with the weights of the task, whose names it shares."""
    layer = PlainLayer(task.config, task.shape.causal, norm).to(task.device, task.dtype)
    layer.load_state_dict(task.weights)
    return layer


def plain(task: Task) -> Row:
    """The written-out layer on the padded batch."""
    layer, bias = plain_layer(task), task.additive_mask()
    return Row(layer, lambda x: layer(x, bias))


def _compiled(task: Task, mode: str | None = None) -> Row:
    if task.device.type == "cpu" and shutil.which("c++") is None:
        raise UnavailableError("needs a C++ compiler")
    layer, bias = plain_layer(task), task.additive_mask()
    # One shape per compilation: traced for all shapes after a second one, the kernels would be slower.
    compiled = torch.compile(layer, dynamic=False, mode=mode)
    return Row(layer, lambda x: compiled(x, bias))


def _compiled_captured(task: Task) -> Row:
    _need_cuda(task)
    row = _compiled(task, mode="reduce-overhead")

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


def _transformer_engine(task: Task) -> Row:
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
