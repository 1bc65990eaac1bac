"""The keys and values of earlier tokens, so that a decoder generates token by token: `inference_params` of `TransformerLayer`.

Shapes: C and M sequences and positions that the cache has room for, B and S of one forward pass, G heads of keys on this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTES = (
    "max_batch_size",
    "max_sequence_length",
    "sequence_len_offset",
    "batch_size_offset",
    "key_value_memory_dict",
)


class InferenceParams:
    """The key-value cache of all layers of a model, with the attributes of Megatron's and Transformer Engine's class.

    max_batch_size, max_sequence_length: C and M. `TransformerLayer.forward` takes any object that has the attributes below.
    sequence_len_offset: the position of the next forward pass's first token, which is how many tokens of each sequence are in
        the cache. The caller adds S to it after all layers; 0 starts again.
    batch_size_offset: the sequence of the batch with which the next forward pass begins.
    key_value_memory_dict: by layer_number (keys, values), each (M, C, G, D), which a layer adds in its first forward pass.
    """

    def __init__(self, max_batch_size: int, max_sequence_length: int) -> None:
        for name, size in (("max_batch_size", max_batch_size), ("max_sequence_length", max_sequence_length)):
            if size <= 0:
                raise ValueError(f"{name}={size} is not positive; give the largest that will be generated")
        self.max_batch_size, self.max_sequence_length = max_batch_size, max_sequence_length
        self.sequence_len_offset = 0
        self.batch_size_offset = 0
        self.key_value_memory_dict: dict[int, tuple[Tensor, Tensor]] = {}

    def swap_key_value_dict(self, batch_indices: Sequence[int] | Tensor) -> None:
        """Put sequence batch_indices[i] in place i, as beam search does between two steps.

        batch_indices: C numbers. Raises ValueError for another number of them.
        """
        if len(batch_indices) != self.max_batch_size:
            raise ValueError(
                f"batch_indices has {len(batch_indices)} numbers; give one for each of max_batch_size={self.max_batch_size}"
            )
        for memories in self.key_value_memory_dict.values():
            for memory in memories:
                memory.copy_(memory[:, batch_indices])


@dataclass(frozen=True)
class Cache:
    """The part of a cache that one forward pass of one layer writes, behind the tokens of earlier ones."""

    params: Any
    layer_number: int
    start: int
    sequences: slice

    @classmethod
    def open(cls, params: Any, layer_number: int | None, batch: int, length: int) -> "Cache":
        """Return the part for `batch` sequences of `length` tokens; raises ValueError where the cache cannot take them."""
        if layer_number is None:
            raise ValueError(
                "inference_params is given but layer_number is None; build every layer with the layer_number of its own by "
                "which the cache tells them apart"
            )
        missing = [name for name in _ATTRIBUTES if not hasattr(params, name)]
        if missing:
            raise ValueError(f"inference_params has no {', '.join(missing)}; use te.InferenceParams")
        start, first = params.sequence_len_offset, params.batch_size_offset
        needs = ("sequence_len_offset", start, length, "max_sequence_length", params.max_sequence_length, "tokens")
        of_batch = ("batch_size_offset", first, batch, "max_batch_size", params.max_batch_size, "sequences")
        for name, offset, size, limit_name, limit, what in (needs, of_batch):
            if not 0 <= offset <= limit - size:
                raise ValueError(
                    f"{name}={offset} and {size} {what} of hidden_states do not fit into {limit_name}={limit}; build a larger "
                    f"InferenceParams, or set {name} back to 0"
                )
        if start > 0 and layer_number not in params.key_value_memory_dict:
            raise ValueError(
                f"sequence_len_offset={start} but layer_number={layer_number} has no keys in the cache; start with 0, and move "
                f"it on after all layers"
            )
        return cls(params, layer_number, start, slice(first, first + batch))

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, S, G, D) of the new tokens and return those of all tokens so far, (B, start + S, G, D)."""
        end = self.start + keys.shape[1]
        known = []
        for memory, new in zip(self._memory(keys), (keys, values), strict=True):
            memory[self.start : end, self.sequences] = new.transpose(0, 1)
            known.append(memory[:end, self.sequences].transpose(0, 1))
        return known[0], known[1]

    def _memory(self, like: Tensor) -> tuple[Tensor, Tensor]:
        memories = self.params.key_value_memory_dict
        shape = (self.params.max_sequence_length, self.params.max_batch_size, *like.shape[2:])
        if self.layer_number not in memories:
            with torch.inference_mode(False):  # or only passes in inference mode could write to it later
                zeros = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2)]
            memories[self.layer_number] = zeros[0], zeros[1]
        keys, values = memories[self.layer_number]
        for memory in (keys, values):
            if memory.shape != shape or (memory.dtype, memory.device) != (like.dtype, like.device):
                raise ValueError(
                    f"key_value_memory_dict[{self.layer_number}] is {memory.dtype} {tuple(memory.shape)} on {memory.device}, "
                    f"the layer's keys need {like.dtype} {shape} on {like.device}; give every layer a layer_number of its own "
                    f"and every model its own InferenceParams"
                )
        return keys, values
