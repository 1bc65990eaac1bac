"""What bench_layer.py measures: shapes, the layer and batch of a shape with which all of its rows work, and what a row is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from xformer_train.kernels import LayerConfig, TransformerLayer


class UnavailableError(Exception):
    """Why a row cannot be run here."""


@dataclass(frozen=True)
class Shape:
    """A batch and a layer of four times its width: BERT's (post-LN, erf GELU), or if causal GPT's (pre-LN, tanh GELU).

    padding: `none`; `some`, an eighth of every fourth sequence or so; `natural`, lengths spread evenly from 1 to `length`.
    te_stages: the rows are those of bench_te_rows.py, for which a shape must be causal and without padding.
    """

    hidden_size: int
    num_attention_heads: int
    batch: int
    length: int
    causal: bool = False
    padding: Literal["none", "some", "natural"] = "none"
    te_stages: bool = False

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
    "te-quickstart": Shape(4096, 32, 4, 2048, causal=True, te_stages=True),  # of Transformer Engine's tutorial
    "te-quickstart-small": Shape(512, 4, 2, 256, causal=True, te_stages=True),  # the same program for a CPU
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
CPU_SHAPES = ["bert-tiny", "bert-base", "te-quickstart-small"]
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
    with device:  # where drawing weights takes no time
        weights = TransformerLayer(config).to(dtype).state_dict()
    for value in weights.values():
        if value.dim() == 1:  # a bias of 0 or a scale of 1 could be left out unseen
            value.add_(torch.randn_like(value), alpha=0.1)
    key_mask = torch.arange(shape.length) < shape.lengths()[:, None]
    return Task(shape, config, dtype, key_mask.to(device), weights)


@dataclass(frozen=True)
class Row:
    """One way to compute the layer, ready to run.

    call: hidden states (B, S, H) to the same; of a packed row (T, H), the real tokens alone.
    dtype: None for that of the task. allowed_error: relative, of output and input gradient; None: as in `Reference.check`.
    captured: bench_layer captures its step as a CUDA graph. counts_memory: whether what it
    saves goes through autograd and what a step takes through the allocator, where they can be counted.
    """

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    packed: bool = False
    dtype: torch.dtype | None = None
    allowed_error: float | None = None
    captured: bool = False
    counts_memory: bool = True
