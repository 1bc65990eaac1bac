"""Copies of training state in host memory, so that training can go on while they are written."""

import errno
import io
import pickle
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Make copies of objects with tensors in them, into buffers that are used again for the next set of copies.

    The first set allocates the memory, which is pinned for tensors of a GPU. Later copies take only the time of the transfer.
    """

    def __init__(self) -> None:
        # (bytes,) uint8, by bytes and whether they are pinned, and how many of them this set has taken
        self._buffers: defaultdict[tuple[int, bool], list[Tensor]] = defaultdict(list)
        self._taken: Counter[tuple[int, bool]] = Counter()

    def begin(self) -> None:
        """Begin a new set, which overwrites the copies of the last one."""
        self._taken.clear()

    @torch.no_grad()
    def copy(self, value: Any) -> Any:
        """Return a deep copy of `value` with every tensor in host memory. Tensors that share memory do so in the copy too.

        value: anything that can be pickled. Raises OSError if there is not enough host memory.
        """
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(value)
        storages: dict[tuple[Any, ...], Tensor] = {}
        try:
            copies = [self._copy(tensor, storages) for tensor in pickler.tensors]
        except (MemoryError, RuntimeError) as error:
            what = f"no host memory for a copy of the state ({error}), which checkpoint.asynchronous=false saves"
            raise OSError(errno.ENOMEM, what) from error
        if any(tensor.is_cuda for tensor in pickler.tensors):
            torch.cuda.synchronize()
        pickled.seek(0)
        return _Unpickler(pickled, copies).load()

    def _copy(self, tensor: Tensor, storages: dict[tuple[Any, ...], Tensor]) -> Tensor:
        """Return a copy of a tensor. storages: copies of the memory of earlier tensors, by address, bytes and dtype."""
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes(), tensor.dtype)  # empty ones of two dtypes have the same address
        if key not in storages:
            kind = (storage.nbytes(), tensor.is_cuda)
            if self._taken[kind] == len(self._buffers[kind]):
                buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
                self._buffers[kind].append(buffer)
            storages[key] = self._buffers[kind][self._taken[kind]]
            self._taken[kind] += 1
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            storages[key].copy_(source, non_blocking=True)
        memory = storages[key].untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


class _Pickler(pickle.Pickler):
    """Leave tensors out, and keep them in `tensors`."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Put tensors in the places of those that `_Pickler` left out."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self._tensors[index]
