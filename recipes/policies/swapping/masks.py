"""Masks as transformers hands them to its layers, turned into what the fused layer takes.

What a mask means depends on the attention implementation of the model's config:

                eager                        sdpa                            flash
None            every token sees all         causal in a decoder, else all   causal in a decoder, else all
4-D             added to the scores          bool, True = sees; or added     -
2-D             -                            -                               1 = token; causal in a decoder

So whether causal order and a window are part of a 4-D mask is not known; it is found out by looking at it. Flash attention
alone is told the window by the layer.
"""

from typing import Any

import torch
from torch import Tensor

from ....kernels.errors import UserError
from ....kernels.ops.attention.attention import AttentionMask
from ....kernels.ops.attention.hiding_bias import hiding_bias, lowest_score

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class LayerMasks:
    """Converts the masks of one model's layers; what a forward pass gives to all of them is converted once.

    config: of the model, whose attention implementation may change later. causal: whether the model is a decoder.
    """

    def __init__(self, config: Any, causal: bool) -> None:
        self._config, self._causal = config, causal
        self._unmasked: tuple[Any, AttentionMask] | None = None

    @property
    def implementation(self) -> str:
        """Raises ValueError for one whose masks are not known here."""
        name = getattr(self._config, "_attn_implementation", None) or "sdpa"  # that of a model without the choice
        if name not in IMPLEMENTATIONS:
            raise UserError(
                f"attn_implementation is {name!r}; fused layers know the masks of {', '.join(IMPLEMENTATIONS)}, so call "
                f"model.set_attn_implementation('sdpa')"
            )
        return str(name)

    def convert(
        self, given: Tensor | None, x: Tensor, position_ids: Tensor | None = None, window: int | None = None
    ) -> tuple[AttentionMask, int | None]:
        """The mask of a pass in which tokens see each other, and the window that is not part of it.

        given: what the layer was called with; x: (B, S, ...), in the dtype that is computed in; position_ids: (B, S) or
        (1, S), by which flash attention tells packed sequences apart; window: the layer's own, how far a token sees.
        Raises ValueError for another form of mask.
        """
        implementation = self.implementation
        if given is None:
            mask = self._convert_none(x, implementation, position_ids)
            return mask, window if implementation.startswith("flash") else None
        if torch.compiler.is_compiling() or given.is_inference():  # no attributes, or no version to trust them by
            return self._convert_tensor(given, x, implementation, window)
        key = (
            given._version,
            len(x),
            x.dtype,
            implementation,
            self._causal,
            window,
        )  # one row may serve batches of any size
        known = getattr(given, "_fused_layer_mask", None)
        if known is None or known[0] != key:
            known = (key, self._convert_tensor(given, x, implementation, window))
            given._fused_layer_mask = known  # type: ignore[attr-defined] # there for the other layers, gone with the mask
        converted: tuple[AttentionMask, int | None] = known[1]
        return converted

    def over_cache(self, given: Tensor | None, q: Tensor, length: int, window: int | None = None) -> Tensor | None:
        """What torch's scaled_dot_product_attention takes as attn_mask where queries see `length` keys of a cache.

        given, window: as above; q: (B, N, S, D). Raises ValueError for a mask of another length.
        """
        implementation = self.implementation
        batch, heads, size, _ = q.shape
        if given is not None:
            self._check(given, (batch, heads, size, length), implementation)
            if given.dim() == 4:
                return given if given.dtype == torch.bool else given.to(q.dtype)
        seen = None if given is None else given.bool()[:, None, None]
        flash = implementation.startswith("flash")
        window = window if flash else None
        if not self._causal or implementation == "eager" or (size == 1 and window is None):
            return seen
        # sdpa's causal order begins at the first key of the cache, so there is no mask only where that is the first query's.
        first = length - size if flash else 0
        order = torch.ones(size, length, dtype=torch.bool, device=q.device).tril_(first)[None, None]
        if window is not None:
            order.triu_(first - window)
        return order if seen is None else seen & order

    def _convert_none(self, x: Tensor, implementation: str, position_ids: Tensor | None) -> AttentionMask:
        causal = self._causal and implementation != "eager"
        if implementation.startswith("flash") and position_ids is not None and x.shape[0] == 1:
            return AttentionMask(causal, segment_ids=_segments(position_ids))
        key = (causal, x.shape[1], x.dtype, x.device)
        if torch.compiler.is_compiling():
            return AttentionMask(causal)
        if self._unmasked is None or self._unmasked[0] != key:
            self._unmasked = (key, AttentionMask(causal))
        return self._unmasked[1]

    def _convert_tensor(
        self, given: Tensor, x: Tensor, implementation: str, window: int | None
    ) -> tuple[AttentionMask, int | None]:
        batch, size = x.shape[:2]
        self._check(given, (batch, None, size, size), implementation)
        if given.dim() == 2:
            return AttentionMask(self._causal, key_mask=given.bool()), window
        found = None if given.shape[1] != 1 or torch.compiler.is_compiling() else _pattern(given, batch, size, window)
        if found is not None:
            return found
        if given.dtype == torch.bool:
            return AttentionMask(bias=hiding_bias(given, x.dtype)), None
        wide = given.to(torch.promote_types(given.dtype, x.dtype))
        return AttentionMask(bias=wide.clamp(min=lowest_score(x.dtype)).to(x.dtype)), None

    def _check(self, given: Tensor, shape: tuple[int, int | None, int, int], implementation: str) -> None:
        """Raises ValueError for a mask that stock layers would not understand as this one."""
        batch, heads, size, length = shape
        flash = implementation.startswith("flash")
        fits = given.dim() == (2 if flash else 4) and given.shape[-1] == length and given.shape[0] in (1, batch)
        if fits and not flash:
            fits = given.shape[2] in (1, size) and (given.shape[1] == 1 or heads in (None, given.shape[1]))
            fits &= given.is_floating_point() or (given.dtype == torch.bool and implementation == "sdpa")
        if not fits:
            kind = "(B, S) of ones and zeros" if flash else "(B, 1, S, S) of what is added to the scores"
            kind += ", or bool with True where a query sees a key" if implementation == "sdpa" else ""
            raise UserError(
                f"attention_mask is {given.dtype} {tuple(given.shape)} for {batch} x {size} tokens and {length} keys; with "
                f"attn_implementation {implementation!r} give it as {kind}"
            )


def _segments(position_ids: Tensor) -> Tensor:
    """The number of each token's sequence, (1, S) int32: a new one begins where positions do not go on."""
    position_ids = position_ids[:1]
    begins = torch.zeros_like(position_ids, dtype=torch.int32)
    begins[:, 1:] = position_ids.diff() != 1
    return begins.cumsum(1, dtype=torch.int32)


def _pattern(given: Tensor, batch: int, size: int, window: int | None) -> tuple[AttentionMask, int | None] | None:
    """The mask by its keys alone, or by them, causal order and the window, if it is nothing else: it needs no S * S numbers.

    given: (B or 1, 1, S or 1, S). The host waits for a GPU once.
    """
    if given.dtype == torch.bool:
        sees, clear = given, given.new_ones(())
    else:
        sees = given == 0
        clear = (sees | (given <= lowest_score(given.dtype))).all()
    keys = sees[:, 0].any(-2)  # that some query sees
    every = torch.ones(size, size, dtype=torch.bool, device=given.device)
    orders: dict[tuple[bool, int | None], Tensor] = {(False, None): every, (True, None): every.tril()}
    if window is not None:
        near = every.tril(window).triu_(-window)
        orders |= {(False, window): near, (True, window): near.tril()}
    fits = [(sees == (keys[:, None, None] & order)).all() for order in orders.values()]
    clear, whole, *same = torch.stack([clear, keys.all(), *fits]).tolist()
    found = next((kind for kind, fit in zip(orders, same, strict=True) if fit), None)
    if not clear or found is None:
        return None
    causal, own_window = found
    return AttentionMask(causal, key_mask=None if whole else keys.expand(batch, size).contiguous()), own_window
