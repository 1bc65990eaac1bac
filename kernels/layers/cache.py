"""The keys and values of earlier tokens, so that a GPT generates token by token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.attention.attention import AttentionMask
from ..ops.attention.cached_attention import cached_attention, cached_bias
from ..ops.attention.rotary import turn
from ..parallel.collectives import TensorParallel
from .parts import Heads

_MOST_TOKENS = 16  # of more, fp32 products by oneDNN are the faster ones


class KeyValueCache:
    """The keys and values that the layers of one stack keep from pass to pass, and how many tokens they are of.

    capacity: C, tokens of each sequence that there is room for. length: those that are in it, which is the position of the next
    pass's first token; `LayerStack.forward` adds its own. Set to 0, it starts other sequences in the same memory.
    Memory: B * C * 2 * G * D numbers a layer, of the G/t key heads of this process, taken in the first pass.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise UserError(f"capacity={capacity} is not positive; give the most tokens that a sequence will have")
        self.capacity, self.length = capacity, 0
        self.lasting = AttentionMask(causal=True)  # holds the tables of angles for all passes
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}

    def check(self, hidden_states: Tensor, mask: AttentionMask) -> None:
        """Raise ValueError where the next pass's hidden states do not fit, or its mask says what no cache can follow."""
        if not mask.causal:
            raise UserError("a cache needs a mask with causal=True: without it earlier tokens would see later ones")
        for name in ("segment_ids", "bias", "cu_seqlens"):
            if getattr(mask, name) is not None:
                raise UserError(f"a cache needs a mask of causal and key_mask alone; leave {name} out")
        batch, new, _ = hidden_states.shape
        end = self.length + new
        if end > self.capacity:
            raise UserError(
                f"{self.length} tokens in the cache and {new} new ones exceed capacity={self.capacity}; build a larger cache, "
                f"or set length back to 0"
            )
        key_mask = mask.key_mask
        if key_mask is not None and (key_mask.shape[0] not in (1, batch) or key_mask.shape[1:] != (end,)):
            raise UserError(
                f"key_mask is {tuple(key_mask.shape)}; with a cache it covers the tokens in it and the new ones, "
                f"(B or 1, {end}) with B={batch}"
            )

    def of_layer(self, number: int, new: int) -> "LayerCache":
        """Return what layer `number` does with the cache in a pass of `new` tokens."""
        return LayerCache(self, number, range(self.length, self.length + new))

    def memory(self, number: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a layer, (B, C, G, D) each, for new keys (B, S, G, D)."""
        shape = (keys.shape[0], self.capacity, *keys.shape[2:])
        if number not in self._memory:
            with torch.inference_mode(False):  # or only passes in inference mode could write to it later
                self._memory[number] = keys.new_empty(shape), keys.new_empty(shape)
        known, _ = memory = self._memory[number]
        if known.shape != shape or (known.dtype, known.device) != (keys.dtype, keys.device):
            raise UserError(
                f"the cache of layer {number} is {known.dtype} {tuple(known.shape)} on {known.device}, new keys need "
                f"{keys.dtype} {shape} on {keys.device}; give each model and batch a cache of its own"
            )
        return memory


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a cache in one pass. places: positions of the pass's tokens."""

    cache: KeyValueCache
    number: int
    places: range

    def takes_token_products(self, hidden_states: Tensor, parallel: TensorParallel) -> bool:
        """Return whether TokenProducts can compute the pass, and its tokens are few enough to gain by them."""
        few = hidden_states.shape[0] * hidden_states.shape[1] <= _MOST_TOKENS
        return few and hidden_states.is_cpu and parallel.size == 1

    def attend(self, qkv: Tensor, heads: Heads, mask: AttentionMask) -> Tensor | None:
        """Keep keys and values of the new tokens, and return attention (B, S, N * D) over all so far.

        qkv: as `heads` divides it. Without earlier tokens None: attention is then that of a pass without a cache.
        """
        queries, keys, values = heads.split(qkv)
        known_keys, known_values = self.cache.memory(self.number, keys)
        start, end = self.places.start, self.places.stop
        rotary = heads.position(self.cache.lasting, torch.Size((self.cache.capacity,)), qkv.device)
        if rotary is not None:
            queries, keys = _turned(queries, keys, rotary[start:end])
        known_keys[:, start:end] = keys
        known_values[:, start:end] = values
        if start == 0:
            return None
        window = heads.options["window"]
        first = 0 if window is None else max(0, start - window)
        of_scores = first, window, queries.dtype, queries.device
        bias = mask._once(("cached", *of_scores), lambda: cached_bias(self.places, mask.key_mask, *of_scores))
        return cached_attention(queries, known_keys[:, first:end], known_values[:, first:end], bias)


def _turned(queries: Tensor, keys: Tensor, rotary: Tensor) -> tuple[Tensor, ...]:
    """Return queries (B, S, N, D) and keys (B, S, G, D) turned by the angles of S positions; in one pass, for few tokens."""
    heads = torch.cat([queries, keys], 2)
    turned = torch.empty_like(heads)
    turn(heads.transpose(1, 2), rotary, turned.transpose(1, 2))
    return turned.split([queries.shape[2], keys.shape[2]], 2)
