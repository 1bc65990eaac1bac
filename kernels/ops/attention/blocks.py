"""Blocks of queries, each with the keys that a window lets it see: work and memory are then proportional to S * window."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .hiding_bias import hiding_bias, lowest_score

# What a CPU computes fastest: scores of a block stay in its cache, and few of them lie outside the window.
_FEWEST_QUERIES, _MOST_QUERIES = 64, 256


class Blocks(NamedTuple):
    """S queries in blocks; all have the same number of keys, and the last may have fewer queries."""

    size: int  # S
    queries: int
    keys: int
    before: int  # keys before a block's first query

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Yield the queries and the keys of each block."""
        for start in range(0, self.size, self.queries):
            first = max(0, min(start - self.before, self.size - self.keys))
            yield slice(start, min(start + self.queries, self.size)), slice(first, first + self.keys)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the places of queries (blocks, queries, 1), at most S - 1, and of keys (blocks, 1, keys)."""
        starts = torch.arange(0, self.size, self.queries, device=device)[:, None]
        queries = (starts + torch.arange(self.queries, device=device)).clamp_(max=self.size - 1)
        first = (starts - self.before).clamp_(0, self.size - self.keys)
        return queries[:, :, None], (first + torch.arange(self.keys, device=device))[:, None]


def window_blocks(size: int, window: int, causal: bool) -> Blocks:
    """Return the blocks of S = size queries that see keys at most `window` tokens away, or none behind them if causal."""
    queries = max(1, min(size, max(_FEWEST_QUERIES, min(window, _MOST_QUERIES))))
    return Blocks(size, queries, min(size, queries + window * (1 if causal else 2)), window)


def window_bias(
    blocks: Blocks,
    causal: bool,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    bias: Tensor | None,
    like: Tensor,
) -> Tensor:
    """Return what to add to the scores of each block, (blocks, B or 1, N or 1, queries, keys).

    The rest as in `AttentionMask`; where there is a bias, it takes the place of the others. like: gives dtype and device.
    """
    queries, keys = blocks.places(like.device)
    near = (queries - keys).abs_() <= blocks.before
    if bias is not None:
        of_scores = bias.expand(*bias.shape[:2], blocks.size, blocks.size)[:, :, queries, keys]
        return of_scores.masked_fill(~near, lowest_score(bias.dtype)).permute(2, 0, 1, 3, 4).contiguous()
    seen = near & (keys <= queries) if causal else near
    seen = seen[:, None]
    if key_mask is not None:
        seen = seen & key_mask[:, keys].transpose(0, 1)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, queries] == segment_ids[:, keys]).transpose(0, 1)
    return hiding_bias(seen, like.dtype)[:, :, None]


def banded(bias: Tensor | None, size: int, window: int, like: Tensor) -> Tensor:
    """Return a bias (B or 1, N or 1, S or 1, S) that hides what lies outside of the window too; like: as in `window_bias`."""
    places = torch.arange(size, device=like.device)
    near = (places[:, None] - places).abs_() <= window
    return (
        hiding_bias(near[None, None], like.dtype) if bias is None else bias.masked_fill(~near, lowest_score(bias.dtype))
    )
