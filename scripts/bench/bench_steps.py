"""How bench_layer.py runs one training step of a row, eagerly or as CUDA graphs, and what it measures of it."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from bench_task import Row, Task
from saved_activations import count_saved_bytes
from torch import Tensor

# More than the L2 cache of a GPU holds at the large shapes; it would otherwise hand over the input of the step before.
GPU_INPUT_SETS = 4
_GPU_STEPS_PER_ROUND = 2 * GPU_INPUT_SETS


@dataclass(frozen=True)
class Inputs:
    """Sets of hidden states, which require grad, and as many gradients of the output; all (B, S, H), or (T, H) if packed."""

    x: list[Tensor]
    dy: list[Tensor]

    def of(self, row: Row, key_mask: Tensor) -> "Inputs":
        """Those of a padded batch in the layout and dtype that the row takes."""

        def converted(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            return (tensor[key_mask] if row.packed else tensor).to(row.dtype or tensor.dtype)

        return Inputs(
            [converted(x).clone().requires_grad_() for x in self.x],
            [converted(dy) for dy in self.dy],
        )


def draw_inputs(task: Task, sets: int) -> Inputs:
    """Normal values; at padding the output has no gradient, as in training."""
    size = (*task.key_mask.shape, task.shape.hidden_size)
    x, dy = ([torch.randn(size, device=task.device, dtype=task.dtype) for _ in range(sets)] for _ in range(2))
    return Inputs(x, [gradient * task.key_mask[:, :, None] for gradient in dy])


class Step(Protocol):
    """Forward and backward of a row on one of several sets of inputs."""

    def reset(self) -> None:
        """Makes ready for a step; not timed."""

    def forward(self, index: int) -> Tensor:
        """The output for input set `index`."""

    def backward(self, index: int, y: Tensor) -> Tensor:
        """The gradient of that input, after all gradients are there. y: what `forward` gave."""


class EagerStep:
    """The step as Python calls it."""

    def __init__(self, row: Row, inputs: Inputs) -> None:
        self._row, self._inputs = row, inputs
        self._leaves = [*row.module.parameters(), *inputs.x]

    def reset(self) -> None:
        # On a GPU a step starts without gradients: adding to them would be a launch per parameter, which no captured step
        # has. On a CPU they add up, as over the micro-batches of a step: fresh memory costs page faults there.
        if self._inputs.dy[0].is_cuda:
            for leaf in self._leaves:
                leaf.grad = None

    def forward(self, index: int) -> Tensor:
        return self._row.call(self._inputs.x[index])

    def backward(self, index: int, y: Tensor) -> Tensor:
        y.backward(self._inputs.dy[index])
        gradient = self._inputs.x[index].grad
        assert gradient is not None, "the input requires grad"
        return gradient


class CapturedStep:
    """The step as two CUDA graphs for each set of inputs; gradients lie in buffers that every replay overwrites."""

    def __init__(self, row: Row, inputs: Inputs) -> None:
        self._row, self._parameters = row, list(row.module.parameters())
        # Capture must find every kernel compiled and every library loaded, by work on another stream than the default one.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._gradients(row.call(inputs.x[0]), inputs.x[0], inputs.dy[0])
        torch.cuda.current_stream().wait_stream(side)
        self._captured = [self._capture(x, dy) for x, dy in zip(inputs.x, inputs.dy, strict=True)]

    def _gradients(self, y: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *self._parameters], dy)

    def _capture(
        self, x: Tensor, dy: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: threads of others, such as the allocator's and the compiler's, may call what a capture may not
        with torch.cuda.graph(forward, capture_error_mode="thread_local"):
            y = self._row.call(x)
        with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode="thread_local"):
            gradients = self._gradients(y, x, dy)
        return forward, y.detach(), backward, gradients

    def reset(self) -> None:
        pass

    def forward(self, index: int) -> Tensor:
        graph, y, _, _ = self._captured[index]
        graph.replay()
        return y

    def backward(self, index: int, y: Tensor) -> Tensor:
        _, _, graph, gradients = self._captured[index]
        graph.replay()
        return gradients[0]


def make_step(row: Row, inputs: Inputs) -> Step:
    return CapturedStep(row, inputs) if row.captured else EagerStep(row, inputs)


def run_once(step: Step, index: int = 0) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    step.reset()
    y = step.forward(index)
    return y.detach(), step.backward(index, y)


def time_steps(step: Step, inputs: Inputs) -> list[tuple[float, float]]:
    """Seconds of (forward, backward) of the steps of one round."""
    if inputs.dy[0].is_cuda:
        return _time_on_gpu(step)
    step.reset()
    started_s = time.perf_counter()
    y = step.forward(0)
    middle_s = time.perf_counter()
    step.backward(0, y)
    return [(middle_s - started_s, time.perf_counter() - middle_s)]


def _time_on_gpu(step: Step) -> list[tuple[float, float]]:
    """By events, in one go without waiting: the queue is as full as in training, so a row that launches too slowly shows
    its gaps, and one that does not shows none. The first step, which starts on an idle GPU, does not count."""
    marks = []
    for number in range(_GPU_STEPS_PER_ROUND + 1):
        step.reset()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        y = step.forward(number % GPU_INPUT_SETS)
        events[1].record()
        step.backward(number % GPU_INPUT_SETS, y)
        events[2].record()
        marks.append(events)
    torch.cuda.synchronize()
    return [(a.elapsed_time(b) / 1e3, b.elapsed_time(c) / 1e3) for a, b, c in marks[1:]]


def saved_bytes(row: Row, x: Tensor) -> int:
    """Bytes kept for backward by one forward pass, without parameters."""
    return count_saved_bytes(lambda: row.call(x), row.module.parameters())


def peak_bytes(step: Step) -> int:
    """The most that one step adds to the allocated memory of the GPU."""
    step.reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_once(step)
    return torch.cuda.max_memory_allocated() - before
