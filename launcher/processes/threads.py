"""How many threads a run on a CPU computes with: as many as have cores, and no more than gain.

The threads of an operator wait for each other at its end, and a step has hundreds of operators. While another program holds the
core of one thread, all others wait for it, on cores that they do not give up, so the step becomes slower than on fewer threads.
Which number is right changes during a run. It may change because it does not change a bit of what is computed, which is
tried with the products of the run before a number is used.
"""

import functools
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.ops.linear import product, weight_gradient
from .topology import Topology

_LOG = logging.getLogger(__name__)
_TASKS, _STAT, _COUNTS_WAITS = Path("/proc/self/task"), Path("/proc/stat"), Path("/proc/self/schedstat")
_USERS_CHOICE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PERIOD_S = 0.25  # between two looks at the cores
_WAITED = 0.2  # cores that the threads waited for in a period, from which on there are fewer threads
_IDLE = 0.8  # of each core that a further thread needs
_HOLDS_S = 5.0  # a number of threads that lasts as long was no mistake
_PATIENCE = 2  # periods in which cores are idle before there are more threads
_LONGEST_PATIENCE = 64  # after mistakes
_GAIN = 1.05  # by which a step must be faster on more threads
_WARM_UPS, _TRIED_STEPS = 3, 10
_SMALL_STEP_S = 0.2  # longer ones gain by every core
_MOST_ROWS = 4096  # of a weight whose products are tried; the vocabulary's has more


class Cores:
    """What Linux counts of this process's threads and of the cores that they may use, in seconds since some start."""

    def now_s(self) -> float:
        """Return the time."""
        return time.monotonic()

    def waited_s(self) -> float:
        """Return the sum over threads of the time in which they could have run and had no core."""
        total_ns = 0
        for task in _TASKS.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # of a thread that has ended meanwhile
                total_ns += int((task / "schedstat").read_text(encoding="ascii").split()[1])
        return total_ns / 1e9

    def idle_s(self) -> float:
        """Return the sum over cores of the time in which they did nothing, or worked for programs that make way (`nice`)."""
        own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        rows = [line.split() for line in _STAT.read_text(encoding="ascii").splitlines()]
        makes_way = os.getpriority(os.PRIO_PROCESS, 0) <= 0  # otherwise this process may itself be what is counted
        ticks = sum(
            int(idle) + int(disk) + makes_way * int(nice)
            for name, _, nice, _, idle, disk, *_ in (row for row in rows if row[0] in own)
        )
        return ticks / os.sysconf("SC_CLK_TCK")


class Threads:
    """Torch's number of threads in this process, lowered where they lack cores or gain nothing, and raised again."""

    def __init__(
        self,
        numbers: Sequence[int],
        keeps_bits: Callable[[int], bool],
        say: Callable[[str], None],
        cores: Cores | None = None,
    ) -> None:
        """numbers: what may be chosen, the number of now first, then ever smaller ones; a single one stays for good.

        keeps_bits: whether a number computes the bits of the first one. say: told the first time that cores are lacking.
        """
        self._numbers, self._count = list(numbers), numbers[0]
        self._keeps_bits, self._say, self._cores = functools.cache(keeps_bits), say, cores or Cores()
        self._calm, self._patience, self._raised_s = 0, _PATIENCE, -_HOLDS_S
        self._tried: list[float] | None = []
        """Seconds of the steps on this number, while it is not known what threads gain."""
        self._on_more_s: float | None = None
        """Seconds of a step on the next larger number, while a smaller one is tried."""
        if self.may_change:
            self._seen = self._look()
            self._last_step_s = self._seen[0]

    def step_taken(self) -> None:
        """Note that a step has ended, and change the number where that is due."""
        if not self.may_change:
            return
        now_s = self._cores.now_s()
        if self._tried is not None and (self._on_more_s is not None or self._count == self._numbers[0]):
            self._tried.append(now_s - self._last_step_s)
            if len(self._tried) == _WARM_UPS + _TRIED_STEPS:
                self._judge(statistics.median(self._tried[_WARM_UPS:]))
        self._last_step_s = now_s
        self.look()

    def look(self) -> None:
        """Change the number if, since the last look, its threads have waited for cores, or cores were idle."""
        if not self.may_change or self._cores.now_s() - self._seen[0] < _PERIOD_S:
            return
        before, self._seen = self._seen, self._look()
        now_s = self._seen[0]
        waited, idle = (
            (end - start) / (now_s - before[0]) for start, end in zip(before[1:], self._seen[1:], strict=True)
        )
        if waited > _WAITED:
            self._lower(max(1, round(waited)), now_s)
        elif self._on_more_s is None:
            self._raise(idle, now_s)

    @property
    def may_change(self) -> bool:
        """Whether there is another number to choose."""
        return len(self._numbers) > 1

    def _look(self) -> tuple[float, float, float]:
        return self._cores.now_s(), self._cores.waited_s(), self._cores.idle_s()

    def fewer(self, missing: int) -> int:
        """Return the largest number that is so much smaller and keeps the bits, or else the smallest one that does."""
        found = self._count
        for number in self._numbers:
            if number < self._count and self._keeps_bits(number):
                found = number
                if number <= self._count - missing:
                    break
        return found

    def _lower(self, missing: int, now_s: float) -> None:
        self._calm = 0
        if self._tried is not None:
            self._tried, self._on_more_s = [], None  # what threads gain is tried again once they have cores
        fewer = self.fewer(missing)
        if fewer == self._count:
            return
        was_mistake = now_s - self._raised_s < _HOLDS_S
        self._patience = min(2 * self._patience, _LONGEST_PATIENCE) if was_mistake else _PATIENCE
        self._set(fewer, "they waited for cores that other programs keep busy")
        what = f"going on with {fewer} of {self._numbers[0]} threads until they are free, which changes no bit"
        self._say(f"other programs keep cores of this machine busy: {what}")
        self._say = lambda text: None

    def _raise(self, idle: float, now_s: float) -> None:
        more = min((n for n in self._numbers if n > self._count and self._keeps_bits(n)), default=self._count)
        has_cores = more > self._count and idle >= _IDLE * (more - self._count)
        self._calm = self._calm + 1 if has_cores else 0
        if self._calm >= self._patience:
            self._calm, self._raised_s = 0, now_s
            self._set(more, "cores are idle")

    def _judge(self, step_s: float) -> None:
        """Take the smaller number for good if steps are as fast on it, and try the next one; go back if they are slower."""
        if self._on_more_s is not None and step_s > self._on_more_s * _GAIN:
            self._tried = self._on_more_s = None
            self._set(self._numbers[0], f"a step takes {step_s * 1e3:.1f} ms on fewer")
            return
        self._numbers = [number for number in self._numbers if number <= self._count]
        fewer = self.fewer(1)
        if step_s > _SMALL_STEP_S or fewer == self._count:
            self._tried = self._on_more_s = None
            return
        self._tried, self._on_more_s = [], step_s
        self._set(fewer, f"tried, as a step takes {step_s * 1e3:.1f} ms on {self._count}")

    def _set(self, count: int, why: str) -> None:
        _LOG.info("threads: %d, %s", count, why)
        self._count = count
        torch.set_num_threads(count)


def divide_cores(topology: Topology, environment: Mapping[str, str]) -> None:
    """Give each process its share of the cores, as threads, where several may use the same ones; a person's number stays."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    place = (platform.node(), frozenset(cores))
    share = len(place[1]) // topology.gather(place).count(place)
    if not _is_set(environment):
        torch.set_num_threads(min(torch.get_num_threads(), max(1, share)))


def threads_of_run(
    device: torch.device,
    model: nn.Module,
    tokens: Iterable[int],
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Threads:
    """Return the threads of this process. Their number stays on a GPU, where a person has set it, and without Linux's counts.

    model: with the weights of the products, which are tried with each of these numbers of tokens.
    """
    most = torch.get_num_threads()
    if device.type != "cpu" or _is_set(environment) or not _COUNTS_WAITS.exists():
        return Threads([most], lambda count: True, say)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # ZeRO 3 empties weights and keeps their shapes.
    kinds = {(tuple(getattr(weight, "ds_shape", weight.shape)), weight.dtype) for weight in weights}
    matrices = sorted((kind for kind in kinds if len(kind[0]) == 2), key=str)

    def keeps_bits(count: int) -> bool:
        return all(_has_same_bits(*kind, rows, (most, count)) for kind in matrices for rows in tokens)

    return Threads(numbers(most), keeps_bits, say)


def _is_set(environment: Mapping[str, str]) -> bool:
    return any(environment.get(name) for name in _USERS_CHOICE)


def numbers(most: int) -> list[int]:
    """Return the numbers of threads that are chosen among, from the largest: few, as each is tried before."""
    steps = {size << shift for size in (1, 3) for shift in range(most.bit_length())} | {most - 1}
    return [most, *sorted((step for step in steps if 0 < step < most), reverse=True)]


def _has_same_bits(shape: tuple[int, ...], dtype: torch.dtype, tokens: int, counts: Iterable[int]) -> bool:
    """Return whether the products of a weight, forward and backward, have the same bits on these numbers of threads."""
    rows, columns = min(shape[0], _MOST_ROWS), shape[1]
    draw = torch.Generator().manual_seed(0)  # the run's own generator is left as it is
    x, weight, dy = (
        torch.randn(*size, generator=draw).to(dtype) for size in ((tokens, columns), (rows, columns), (tokens, rows))
    )
    first, *others = (_products(x, weight, dy, count) for count in counts)
    return all(torch.equal(one, another) for results in others for one, another in zip(first, results, strict=True))


def _products(x: Tensor, weight: Tensor, dy: Tensor, count: int) -> list[Tensor]:
    now = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return [product(x, weight), product(dy, weight.t()), weight_gradient(dy, x)]
    finally:
        torch.set_num_threads(now)
