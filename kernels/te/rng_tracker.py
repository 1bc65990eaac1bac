"""Streams of random numbers by name, for tensor-parallel processes that must draw alike here and differently there.

Torch's default generator of a device holds the same state on all processes of a tensor-parallel group, so what is drawn from it
is replicated. The tracker holds further states; inside `fork` the default generator takes one of them, so everything that draws
from it, `dropout.draw_seed` and torch's own dropout too, follows without knowing. What is drawn from which:

  default              the full matrix of an initialization; without sequence parallelism (SP) dropout of replicated
                       activations, the hidden states and embeddings
  model-parallel-rng   dropout of attention probabilities, whose heads differ by process; under SP all dropout of a layer,
                       whose parts of the sequence differ

Names and seeds are Megatron's and Transformer Engine's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.dropout import draw_seed
from ..parallel.collectives import Group, group_rank

MODEL_PARALLEL_RNG = "model-parallel-rng"
_MODEL_PARALLEL_OFFSET = 2718  # Megatron's


class RngStatesTracker:
    """States of a device's default generator by name; device: of the tensors whose random numbers it rules."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.active: str | None = None
        """The name of the innermost `fork` under way. Code that replays a forward pass later goes on in `fork(active)`."""
        self._states: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget all states."""
        self._states = {}

    def add(self, name: str, seed: int) -> None:
        """Add a state that starts at `seed`. Raises ValueError if the name is taken."""
        if name in self._states:
            raise ValueError(f"rng state {name!r} is already added; call reset() first, or choose another name")
        self._states[name] = torch.Generator(self.device).manual_seed(seed).get_state()

    def get_states(self) -> dict[str, Tensor]:
        """Return copies of all states, (bytes,) uint8 on the CPU, by name; that of a fork under way as it is now."""
        states = {name: state.clone() for name, state in self._states.items()}
        if self.active is not None:
            states[self.active] = self._get()
        return states

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Replace all states by copies of those that `get_states` gave."""
        self._states = {name: state.clone() for name, state in states.items()}

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL_RNG) -> Iterator[None]:
        """Let the device's default generator go on from the named state, and put it back afterwards.

        A fork inside one of the same name changes nothing. Raises ValueError if no such state was added.
        """
        if name not in self._states:
            raise ValueError(
                f"rng state {name!r} is not added; call seed_tensor_parallel(seed, group, tracker), or add it by its name"
            )
        if name == self.active:
            yield
            return
        outer_name, outer_state = self.active, self._get()
        self._set(self._states[name])
        self.active = name
        try:
            yield
        finally:
            self._states[name] = self._get()
            self.active = outer_name
            self._set(outer_state)

    def _get(self) -> Tensor:
        if self.device.type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self.device).get_rng_state(self.device)  # type: ignore[no-any-return]

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self.device).set_rng_state(state, self.device)


def seed_tensor_parallel(seed: int, group: Group, tracker: RngStatesTracker) -> None:
    """Seed torch's default generators alike on all processes of the group, and the tracker's one state by rank.

    Initialization wants one seed for all processes of a run. For data-parallel replicas that drop differently call it again
    after initialization with seed + 1024 * (data-parallel rank): no two streams share a seed below 354 processes a group.
    """
    torch.manual_seed(seed)
    tracker.reset()
    tracker.add(MODEL_PARALLEL_RNG, seed + _MODEL_PARALLEL_OFFSET + group_rank(group))


class DropoutSeeds(NamedTuple):
    """Seeds of one layer's forward pass, int64 of shape ()."""

    hidden: Tensor
    attention: Tensor


def draw_dropout_seeds(device: torch.device, tracker: Any, *, sequence_parallel: bool = False) -> DropoutSeeds:
    """Return fresh seeds of a layer's hidden and attention dropout by the rule at the head of this file.

    tracker: None for one process; else an `RngStatesTracker`, or one with Megatron's `fork()`.

    Raises ValueError if the tracker says that it rules another device.
    """
    if tracker is None:
        seed = draw_seed(device)
        return DropoutSeeds(seed, seed)
    if getattr(tracker, "device", device).type != device.type:
        raise ValueError(
            f"the RNG tracker rules {tracker.device}, the activations are on {device}; make it for {device}"
        )
    if sequence_parallel:
        with tracker.fork():
            seed = draw_seed(device)
        return DropoutSeeds(seed, seed)
    hidden = draw_seed(device)
    with tracker.fork():
        return DropoutSeeds(hidden, draw_seed(device))
