"""Dropout that differs over the processes of a group, in models that draw it from torch's default generator."""

from typing import Any

import torch
from torch import Tensor

from ....kernels.parallel.collectives import TensorParallel

_SEEDS = 2**40


class RankRandom:
    """Switches a device's default generator to a stream of this process's own, and back.

    Each stream starts at a seed from the CPU's default generator, which must be in the same state on all processes and moves on
    alike. So a replay that restores the default generators, as torch.utils.checkpoint does, draws the same once more, and no
    state lasts from one stream to the next.
    """

    def __init__(self, parallel: TensorParallel) -> None:
        self._parallel = parallel
        self._generator: torch.Generator | None = None
        self._outer: Tensor | None = None  # the state that the default generator had outside

    def __deepcopy__(self, memo: dict[int, Any]) -> "RankRandom":
        return self  # copies of a model share it, because hooks refer to it

    @property
    def active(self) -> bool:
        return self._outer is not None

    def enter(self, device: torch.device) -> None:
        """Begins a stream; inside one it goes on."""
        if self.active or self._parallel.size == 1:
            return
        seed = int(torch.randint(_SEEDS, ()))
        self._generator = _default_generator(device)
        self._outer = self._generator.get_state()
        self._generator.manual_seed(seed * self._parallel.size + self._parallel.rank)

    def leave(self) -> None:
        """Goes back to what all processes draw alike."""
        if self._outer is not None and self._generator is not None:
            self._generator.set_state(self._outer)
        self._generator = self._outer = None

    def pause(self) -> Tensor | None:
        """Goes back for a moment; what it returns lets `resume` go on with the stream. None: there is none under way."""
        if self._outer is None or self._generator is None:
            return None
        inner = self._generator.get_state()
        self._generator.set_state(self._outer)
        return inner

    def resume(self, inner: Tensor | None) -> None:
        if inner is not None and self._generator is not None:
            self._outer = self._generator.get_state()
            self._generator.set_state(inner)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    generator: torch.Generator = module.default_generators[index]
    return generator
