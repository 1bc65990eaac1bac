"""Multi-head attention over a QKV projection: masks, packed batches, shared key heads, rotary embedding, windows.

Which engine computes it, by this rule:
  CUDA, kernels auto, head dim up to 128,            our Triton kernels: scores never reach memory
    no bias or one per key, (B or 1, 1, 1, S)
  elsewhere with dropout or a window, and on a CPU   the products of attention_product.py: with dropout torch's own falls back
    in bf16 for up to 512 tokens                     to a path twice as slow on a CPU, it knows no windows, and in bf16 its
                                                     backward takes up to 6 times as long
  elsewhere                                          torch's scaled_dot_product_attention
Only the first knows packed batches; for the others the sequences are padded here and their padding taken out again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import UserError
from ..choices import Kernels, uses_triton
from ..operator import operator
from .attention_product import AttentionByProducts, Pattern, padded, unpadded
from .blocks import banded, window_bias, window_blocks
from .heads import TurnedHeads, query_key_value
from .hiding_bias import hiding_bias

LARGEST_TRITON_HEAD = 128
_LONGEST_BF16_PRODUCTS = 512  # tokens; with more, scores leave a CPU's cache
_MOST_BF16_SCORES = 2**27  # at once, 256 MiB
Recompute = Literal["nothing", "dropout", "core"]


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query may see; make one for all layers of a forward pass. Conditions hold together.

    causal: none behind the query. key_mask: (B or 1, S) bool, only keys that are True (tokens, not padding).
    segment_ids: (B or 1, S) int, only keys of the query's own segment.
    bias: (B or 1, 1 or N, S or 1, S), added to the scaled scores, in their dtype, finite, without a gradient; takes the place
        of the others. Under one huge value for all keys PyTorch rounds the scores away and attends evenly, while the Triton
        kernels attend by the scores, as without a bias.
    cu_seqlens: (B + 1,) int32, 0 and the end of each sequence: the batch is packed, T rows of tokens in place of B x S,
        sequence after sequence up to the last row, and a query sees its own sequence. Goes with causal alone.
    max_length: S of a packed batch, no less than its longest sequence; a number, since no kernel can start before the host
        knows it. Dropout decides as it would in the padded batch (B, max_length).
    A query that sees no key gets a finite output, whose value depends on the engine.
    Raises ValueError for fields that do not go together. Whether cu_seqlens rises by at most max_length is checked on a CPU
    only: on a GPU that would make the host wait.
    """

    causal: bool = False
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_length: int | None = None
    _made: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)  # what all layers share

    def __post_init__(self) -> None:
        if (self.cu_seqlens is None) != (self.max_length is None):
            raise ValueError("cu_seqlens and max_length describe a packed batch together; give both or neither")
        if self.cu_seqlens is not None and self.max_length is not None:
            for name in ("key_mask", "segment_ids", "bias"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for padded batches, cu_seqlens for packed ones; give one of the two")
            _check_borders(self.cu_seqlens, self.max_length)
        if self.key_mask is not None and self.key_mask.dtype != torch.bool:
            raise ValueError(
                f"key_mask is {self.key_mask.dtype}; it must be bool, True at tokens: give key_mask.bool() if it is 1 there"
            )
        if self.bias is not None and self.bias.requires_grad:
            raise ValueError("bias requires a gradient, but attention computes none for it; give bias.detach()")

    def rows_when_padded(self, num_tokens: int) -> Tensor | None:
        """The row of each token of a packed batch among the B * max_length rows of the padded one, (T,) int64."""
        borders, longest = self.cu_seqlens, self.max_length
        if borders is None or longest is None:
            return None
        if borders.is_cpu and not torch.compiler.is_compiling() and borders[-1] != num_tokens:
            raise ValueError(
                f"cu_seqlens ends with {int(borders[-1])}, but there are {num_tokens} rows; they must be equal"
            )
        return self._once("rows", lambda: _rows_when_padded(borders, longest, num_tokens))

    def additive(self, size: int, like: Tensor, window: int | None = None) -> Tensor | None:
        """What to add to the scores: 0 where a query may see a key, a huge negative but finite value elsewhere.

        size: S; like: gives dtype and device. (B or 1, 1, S or 1, S), or None when every query sees every key; with a window
        of each block, (blocks, B or 1, 1 or N, queries, keys); in an export as without, for a whole matrix.
        """
        if window is not None:
            key = size, like.dtype, like.device, window
            return self._once(key, lambda: self._make_windowed(size, like, window))
        if self.bias is not None:
            return self.bias
        return self._once((size, like.dtype, like.device), lambda: self._make_additive(size, like))

    @property
    def only_causal(self) -> bool:
        """Whether order is all that hides keys from the tokens: behind those of a packed sequence comes its padding."""
        return self.causal and self.bias is None and self._hiding_keys() is None and self._dividing_segments() is None

    @property
    def bias_per_key(self) -> bool:
        """Whether there is a bias that is the same for all heads and queries."""
        return self.bias is not None and self.bias.shape[1:3] == (1, 1)

    def key_bias(self) -> Tensor | None:
        """A bias per key as the Triton kernels take it, (B or 1, S) fp32: less its largest value in each sequence.

        Softmax does not notice the difference, but a sequence whose values are all huge keeps its scores by it.
        """
        bias = self.bias
        if bias is None or not self.bias_per_key:
            return None
        return self._once("key_bias", lambda: (bias.float() - bias.amax(-1, keepdim=True)).flatten(1))

    def _once(self, key: Any, make: Callable[[], Tensor | None]) -> Tensor | None:
        """make() of the first layer that asks, for all; another one under inference_mode, whose tensors serve no training."""
        if torch.compiler.is_exporting():
            return make()  # its sizes are symbols, and no keys
        key = key, not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _hiding_keys(self) -> Tensor | None:
        """key_mask; on a CPU None if it hides no key."""
        given = self.key_mask
        if given is None or not _may_be_read(given):
            return given
        return self._once("hiding", lambda: None if bool(given.all()) else given)

    def _dividing_segments(self) -> Tensor | None:
        """segment_ids; on a CPU None if each row is one segment, as most rows of a GPT are whose texts are long."""
        given = self.segment_ids
        if given is None or not _may_be_read(given):
            return given
        return self._once("dividing", lambda: None if bool((given == given[:, :1]).all()) else given)

    def _keys(self, size: int, device: torch.device) -> Tensor | None:
        """_hiding_keys, or which keys of the padded batch are tokens of a packed one."""
        if self.cu_seqlens is None:
            return self._hiding_keys()
        return torch.arange(size, device=device) < self.cu_seqlens.diff()[:, None]

    def _make_windowed(self, size: int, like: Tensor, window: int) -> Tensor:
        if torch.compiler.is_exporting():
            return banded(self.additive(size, like), size, window, like)
        blocks = window_blocks(size, window, self.causal)
        keys, segments = self._keys(size, like.device), self._dividing_segments()
        return window_bias(blocks, self.causal, keys, segments, self.bias, like)

    def _make_additive(self, size: int, like: Tensor) -> Tensor | None:
        key_mask = self._keys(size, like.device)
        allowed = None if key_mask is None else key_mask[:, None, None, :]
        if self.causal:
            order = torch.ones(size, size, dtype=torch.bool, device=like.device).tril_()[None, None]
            allowed = order if allowed is None else allowed & order
        segments = self._dividing_segments()
        if segments is not None:
            same = (segments[:, :, None] == segments[:, None, :])[:, None]
            allowed = same if allowed is None else allowed & same
        if allowed is None:
            return None
        return hiding_bias(allowed, like.dtype)


def _may_be_read(tensor: Tensor) -> bool:
    """Return whether the values of a tensor may decide on what is computed: it is on a CPU, and no trace is made."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def _rows_when_padded(cu_seqlens: Tensor, max_length: int, num_tokens: int) -> Tensor:
    first = cu_seqlens[:-1]
    shift = torch.arange(first.shape[0], device=first.device) * max_length - first
    # with output_size, or the host would wait for a GPU to tell it
    shifts = shift.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=first.device) + shifts


def _check_borders(cu_seqlens: Tensor, max_length: int) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; it must be int32 (B + 1,)")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or lengths.min() < 0 or lengths.max() > max_length:
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()} with max_length={max_length}; it must begin with 0 and rise by 0 to "
                f"max_length from one border to the next"
            )


def attention(  # noqa: PLR0913 - the axes in which layers and batches differ
    qkv: Tensor,
    mask: AttentionMask,
    p: float,
    seed: Tensor | None,
    site: int,
    *,
    key_heads: int | None = None,
    rotary: Tensor | None = None,
    window: int | None = None,
    recompute: Recompute = "nothing",
    stochastic: bool = False,
    kernels: Kernels = "auto",
) -> Tensor:
    """The attention output before its projection, (B, S, N * D), or (T, N * D) for a packed batch.

    qkv: (B, S, 3, N, D), or (T, 3, N, D) where the mask has cu_seqlens; any float dtype.
    key_heads: G, which divides N; qkv is then (B, S, N + 2G, D) or (T, N + 2G, D), N query heads, G key heads, G value heads,
        and query head h attends with key head h // (N / G).
    rotary: (L, D) fp32 of `rotary_table`, L at least S: queries and keys are turned by the angles of their place in their row,
        or in their sequence of a packed batch: column i with column i + D/2.
    window: a query sees keys at most so many tokens away, of those that the mask lets it see.
    p: dropout of the probabilities; seed: int64 scalar tensor, None for no dropout.
    recompute: what backward computes again in place of keeping it: with `dropout` the probabilities after dropout, with `core`
        those before it too, from scores on. The Triton path and the one without dropout keep nothing of size S * S anyway.
    stochastic: let the Triton backward add dQ atomically where that is faster; its last bits then vary from run to run.
    Raises ValueError for a packed qkv without a mask that has cu_seqlens, and the other way round; for a mask of another size;
    for key_heads, rotary or window that break what is said of them; on a CPU for rows that differ from the last border.
    """
    _check_layout(qkv, mask, key_heads)
    size = qkv.shape[1] if mask.max_length is None else mask.max_length
    heads = qkv.shape[-2] - (0 if key_heads is None else 2 * key_heads)
    if mask.cu_seqlens is None:
        _check_sizes(qkv.shape[0], size, heads, mask)
    _check_rotary(rotary, size, qkv)
    if window is not None and window < 0:
        raise UserError(f"window={window} is below 0; a query sees keys at most so many tokens away, and itself at 0")
    if window is not None and not torch.compiler.is_exporting() and window >= size - 1:
        window = None
    seed = seed if p > 0 else None
    if uses_triton(qkv, kernels) and qkv.shape[-1] <= LARGEST_TRITON_HEAD and (mask.bias is None or mask.bias_per_key):
        return _TritonAttention.apply(  # type: ignore[no-any-return, no-untyped-call]
            qkv, mask, mask.key_bias(), rotary, seed, (p, site, key_heads, window), stochastic
        )
    batch = qkv.shape[0] if mask.cu_seqlens is None else mask.cu_seqlens.shape[0] - 1
    pattern = Pattern(batch, size, heads, key_heads, mask.causal, window, 0.0 if seed is None else p, site)
    by_products = qkv.is_cpu and not torch.compiler.is_exporting() and products_are_faster(qkv.dtype, *pattern[:3])
    if seed is None and window is None and not by_products:
        return _torchs_attention(qkv, mask, rotary, pattern)
    rows, bias = mask.rows_when_padded(qkv.shape[0]), mask.additive(size, qkv, window)
    if torch.compiler.is_exporting():
        pattern = pattern._replace(window=None)  # in the bias: the number of blocks would tie the export to one length
    return AttentionByProducts.apply(  # type: ignore[no-any-return, no-untyped-call]
        qkv, bias, rows, rotary, seed, pattern, "core" if seed is None else recompute
    )


def products_are_faster(dtype: torch.dtype, batch: int, size: int, heads: int) -> bool:
    """Return whether a CPU is faster with products, which round scores to bf16, than with torch's attention without dropout."""
    if dtype != torch.bfloat16 or size > _LONGEST_BF16_PRODUCTS:
        return False
    return batch * heads * size * size <= _MOST_BF16_SCORES


def _torchs_attention(qkv: Tensor, mask: AttentionMask, rotary: Tensor | None, pattern: Pattern) -> Tensor:
    batch, size, _, key_heads, *_ = pattern
    rows = mask.rows_when_padded(qkv.shape[0])
    qkv = padded(qkv, rows, batch, size)
    if rotary is None:
        parts = query_key_value(qkv, key_heads)
    else:
        parts = TurnedHeads.apply(qkv, rotary, key_heads)  # type: ignore[no-untyped-call]
    q, k, v = (part.transpose(1, 2) for part in parts)
    # torch's order on a CPU gives the same bits as a bias, in half the time; elsewhere it may choose another kernel
    ordered = qkv.is_cpu and mask.only_causal
    bias, grouped = None if ordered else mask.additive(size, qkv), key_heads is not None
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=ordered, enable_gqa=grouped)
    return unpadded(context.transpose(1, 2).flatten(2), rows)


def _check_layout(qkv: Tensor, mask: AttentionMask, key_heads: int | None) -> None:
    """Raises ValueError unless qkv has the dims that the mask and key_heads ask for."""
    heads = "3, N, D" if key_heads is None else "N + 2G, D"
    if qkv.ndim != (mask.cu_seqlens is None) + 3 + (key_heads is None):
        raise ValueError(
            f"qkv is {tuple(qkv.shape)}; it must be (T, {heads}) with a mask that has cu_seqlens, else (B, S, {heads})"
        )
    if key_heads is not None:
        queries = qkv.shape[-2] - 2 * key_heads
        if key_heads < 1 or queries < 1 or queries % key_heads:
            raise UserError(
                f"key_heads={key_heads} does not divide the {queries} query heads of qkv {tuple(qkv.shape)}, which is "
                f"(..., N + 2G, D) with G key heads; G must divide N"
            )


def _check_rotary(rotary: Tensor | None, size: int, qkv: Tensor) -> None:
    """Raises UserError for a table that does not turn heads of these columns at all places up to size."""
    if rotary is None:
        return
    dim = qkv.shape[-1]
    if dim % 2:
        raise UserError(f"heads have D={dim} columns; rotary turns pairs of columns, so D must be even")
    if rotary.ndim != 2 or rotary.shape[1] != dim or rotary.shape[0] < size or rotary.dtype != torch.float32:
        raise UserError(
            f"rotary is {rotary.dtype} {tuple(rotary.shape)}; it must be float32 (L, {dim}) with L at least {size}: make it "
            f"with rotary_table({size}, {dim}, theta)"
        )


def _check_sizes(batch: int, size: int, heads: int, mask: AttentionMask) -> None:
    """Raises ValueError for a mask that does not fit B, S, N of qkv: the Triton kernels would read past its end."""
    by_token = "(B or 1, S)", ((1, batch), (size,))
    by_score = "(B or 1, N or 1, S or 1, S)", ((1, batch), (1, heads), (1, size), (size,))
    for name, (shape, legal) in (("key_mask", by_token), ("segment_ids", by_token), ("bias", by_score)):
        given: Tensor | None = getattr(mask, name)
        if given is None:
            continue
        if given.ndim != len(legal) or any(have not in sizes for have, sizes in zip(given.shape, legal, strict=True)):
            raise ValueError(
                f"{name} is {tuple(given.shape)}; for qkv of B={batch}, S={size}, N={heads} it must be {shape}"
            )


def _fake_triton_forward(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    key_heads = arguments[-3]
    tokens, heads, size = qkv.shape[:-3], qkv.shape[-2], qkv.shape[-1]
    if key_heads is not None:
        tokens, heads = qkv.shape[:-2], heads - 2 * key_heads
    rows = (math.prod(tokens) + 15) // 16 * 16
    return qkv.new_empty((*tokens, heads * size)), qkv.new_empty((heads, rows), dtype=torch.float32)


@operator(
    "attention_forward(Tensor qkv, Tensor? key_mask, Tensor? segment_ids, Tensor? key_bias, Tensor? cu_seqlens, "
    "Tensor? seed, SymInt? max_length, bool causal, float p, int site, int? key_heads, Tensor? rotary, "
    "SymInt? window) -> (Tensor, Tensor)",
    _fake_triton_forward,
)
def _triton_forward(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`attention_triton.forward`."""
    from .attention_triton import Options, forward

    return forward(qkv, Options(*arguments))


@operator(
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? key_mask, Tensor? segment_ids, "
    "Tensor? key_bias, Tensor? cu_seqlens, Tensor? seed, SymInt? max_length, bool causal, float p, int site, "
    "int? key_heads, Tensor? rotary, SymInt? window, bool stochastic) -> Tensor",
    lambda dout, qkv, *_: qkv.new_empty(qkv.shape),
)
def _triton_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
    """`attention_backward_triton.backward`."""
    from .attention_backward_triton import Options, backward

    *options, stochastic = arguments
    return backward(dout, qkv, out, lse, Options(*options), stochastic=stochastic)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        mask: AttentionMask,
        key_bias: Tensor | None,
        rotary: Tensor | None,
        seed: Tensor | None,
        numbers: tuple[float, int, int | None, int | None],
        stochastic: bool,
    ) -> Tensor:
        if key_bias is not None:  # in place of the others
            mask = AttentionMask()
        p, site, key_heads, window = numbers
        tensors = (mask.key_mask, mask.segment_ids, key_bias, mask.cu_seqlens, seed)
        ctx.rest = (mask.max_length, mask.causal, p, site, key_heads)
        out, lse = _triton_forward(qkv, *tensors, *ctx.rest, rotary, window)
        ctx.save_for_backward(rotary, qkv, out, lse, *tensors)
        ctx.window, ctx.stochastic = window, stochastic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rotary, *tensors = ctx.saved_tensors
        return _triton_backward(dout, *tensors, *ctx.rest, rotary, ctx.window, ctx.stochastic), *[None] * 6
