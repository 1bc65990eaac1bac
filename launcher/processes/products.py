"""Which precision a run trains in, and which library computes its products on a CPU: measured, where there is a choice."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...kernels.errors import UserError
from ...kernels.ops.linear import (
    CpuLibraries,
    available_cpu_libraries,
    cpu_libraries,
    product,
    using_cpu_libraries,
    weight_gradient,
)
from ..config.schema import Precision, RunConfig
from .topology import device_name

# By the names that Linux gives them in /proc/cpuinfo, on x86 and Arm.
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
_CPUINFO = Path("/proc/cpuinfo")
# How much faster another choice must be: layers take a little longer in bf16 around their products, and equal runs on one
# machine shall have equal bits.
_MARGIN = 1.25
_LEAST_FLOP = 2**24  # of a product for which a choice makes a difference
_LARGEST_SIDE = 512  # of a measured product, per thread in its tokens
_BUDGET_S, _LEAST_TURNS = 0.05, 3


@dataclass(frozen=True)
class Cpu:
    """What the CPU of a process is, and what can compute products on it."""

    name: str
    bf16: str
    """The instructions for products in bf16; empty without any."""
    libraries: tuple[str, ...]


@dataclass(frozen=True)
class Products:
    """What was chosen for a run, equal on all of its processes. Stands in its run directory."""

    precision: Precision
    why: str
    cpu: str = ""
    """Name of the CPU that was measured; empty where there was no choice."""
    libraries: CpuLibraries | None = None
    """Those of fp32 products; None leaves them as they are."""
    shape: tuple[int, ...] = ()
    """Of the products that were measured: tokens, inputs, outputs."""
    speeds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By library, or bf16: GFLOP/s of values and of gradients of weights."""

    @property
    def text(self) -> str:
        """What was measured, for the start-up report; empty if nothing."""
        if not self.speeds:
            return ""
        found = [f"{values:,.0f} / {gradients:,.0f} {name}" for name, (values, gradients) in self.speeds.items()]
        return f"GFLOP/s of values / gradients of weights at {' x '.join(map(str, self.shape))}: {', '.join(found)}"


def this_cpu() -> Cpu:
    """Return the CPU of this machine, as /proc/cpuinfo describes it; without such a file nothing is known of it."""
    lines = {}
    if _CPUINFO.exists():
        block = _CPUINFO.read_text(encoding="utf-8").split("\n\n")[0]  # of the first core
        lines = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in block.splitlines())}
    features = set(lines.get("flags", lines.get("Features", "")).split())
    name = lines.get("model name") or " ".join(lines.get(key, "") for key in ("CPU implementer", "CPU part")).strip()
    bf16 = next((instructions for instructions in _BF16_INSTRUCTIONS if instructions in features), "")
    return Cpu(name or "unknown CPU", bf16, available_cpu_libraries())


def unsupported(precision: Precision, device: torch.device) -> str:
    """Return why this device cannot train in a precision; empty if it can."""
    if precision == "fp16" and device.type == "cpu":
        return "needs a GPU and this run has none; use fp32, bf16 or auto"
    if precision in ("bf16", "fp8") and not _has_bf16(device):
        return f"needs a GPU that computes in bf16 and {device_name(device)} does not; use fp16 or auto"
    return ""


def choose(
    requested: Literal["auto", Precision], device: torch.device, cpus: Iterable[Cpu], shape: tuple[int, int, int]
) -> Products:
    """Return what `training.precision` comes to on these devices, and the fastest libraries for fp32 products of this shape.

    cpus: of all processes; only what all of them have is chosen. shape: tokens, inputs and outputs of a model's largest
    product. Raises UserError for a precision that the device cannot train in.
    """
    if requested != "auto" and (fault := unsupported(requested, device)):
        raise UserError(f"training.precision={requested} {fault}")
    why = "as the config says" + ("; bf16 outside the layers' matrix products" if requested == "fp8" else "")
    if requested == "auto" and device.type == "cuda":
        return _on_gpu(device)
    if requested != "auto" and (device.type == "cuda" or requested != "fp32"):
        return Products(requested, why)
    main, *others = cpus
    shared = [name for name in main.libraries if all(name in other.libraries for other in others)]
    have_bf16 = all(cpu.bf16 for cpu in (main, *others))
    if 2 * math.prod(shape) < _LEAST_FLOP:
        small = "auto: the products of this model are too small to gain by bf16"
        return Products("fp32", small if requested == "auto" else why, main.name, _usual(shared))
    candidates = [*shared, "bf16"] if requested == "auto" and have_bf16 else shared
    shape = capped(shape)
    speeds = measure(shape, candidates)
    libraries = fastest(speeds, shared)
    if requested == "fp32":
        return Products("fp32", why, main.name, libraries, shape, speeds)
    return Products(*_auto(speeds, libraries, main.bf16 if have_bf16 else ""), main.name, libraries, shape, speeds)


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def _on_gpu(device: torch.device) -> Products:
    if _has_bf16(device):
        return Products("bf16", f"auto: {device_name(device)} computes in bf16, which needs no loss scaling")
    return Products("fp16", f"auto: {device_name(device)} does not compute in bf16")


def fastest(speeds: Mapping[str, tuple[float, float]], names: Sequence[str]) -> CpuLibraries:
    """Return the fastest of these libraries by what `measure` returned; the usual one, if no other is much faster."""
    usual = _usual(names)

    def of_form(form: int) -> str:
        best = max(names, key=lambda name: speeds[name][form])
        return best if speeds[best][form] > _MARGIN * speeds[usual[form]][form] else usual[form]

    return CpuLibraries(of_form(0), of_form(1))


def _usual(names: Sequence[str]) -> CpuLibraries:
    """Return the libraries that are used without a choice, or torch's own, if other machines of the run lack those."""
    usual = cpu_libraries()
    return usual if set(usual) <= set(names) else CpuLibraries(names[0], names[0])


def _auto(
    speeds: Mapping[str, tuple[float, float]], libraries: CpuLibraries, instructions: str
) -> tuple[Precision, str]:
    if not instructions:
        return "fp32", "auto: the CPU has no instructions for products in bf16"
    fp32 = (speeds[libraries.product][0], speeds[libraries.weight_gradient][1])
    # A step has two products of values and input gradients for each gradient of weights.
    time_fp32, time_bf16 = (2 / values + 1 / gradients for values, gradients in (fp32, speeds["bf16"]))
    gain = f"products are {time_fp32 / time_bf16:.2f}x as fast in bf16 ({instructions}) as in fp32"
    if time_fp32 < _MARGIN * time_bf16:
        return "fp32", f"auto: {gain}, and less than {_MARGIN:g}x does not pay"
    return "bf16", f"auto: {gain}"


def products_shape(config: RunConfig, micro_batch_size: int) -> tuple[int, int, int]:
    """Return (tokens, inputs, outputs) of the first product of a feed-forward half, on one process."""
    model = config.model
    tokens = micro_batch_size * config.data.max_seq_length
    return tokens, model.hidden_size, max(1, model.intermediate_size // config.parallel.tensor)


def capped(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the shape of a product that is measured in place of one of `shape`, in milliseconds at most."""
    tokens, inputs, outputs = shape
    return (
        min(tokens, _LARGEST_SIDE * torch.get_num_threads()),
        min(inputs, _LARGEST_SIDE),
        min(outputs, _LARGEST_SIDE),
    )


def measure(shape: tuple[int, int, int], candidates: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Return GFLOP/s of x @ weight.T and of dy.T @ x by candidate, a library in fp32 or bf16: the best of alternating turns."""
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)  # the run's own generator is left as it is
    x, weight, dy = (
        torch.randn(*size, generator=generator) for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    operands = {name: [t.bfloat16() if name == "bf16" else t for t in (x, weight, dy)] for name in candidates}
    for name, tensors in operands.items():
        _time(name, *tensors)  # the first call of a shape prepares its kernel
    best = dict.fromkeys(operands, (float("inf"), float("inf")))
    end, turns = time.perf_counter() + _BUDGET_S, 0
    while turns < _LEAST_TURNS or time.perf_counter() < end:
        for name, tensors in operands.items():
            forms = zip(best[name], _time(name, *tensors), strict=True)
            best[name] = tuple(map(min, forms))  # type: ignore[assignment]
        turns += 1
    gflop = 2 * tokens * inputs * outputs / 1e9
    return {name: (gflop / values, gflop / gradients) for name, (values, gradients) in best.items()}


def _time(name: str, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[float, float]:
    libraries = cpu_libraries() if name == "bf16" else CpuLibraries(name, name)
    with using_cpu_libraries(libraries):
        start = time.perf_counter()
        product(x, weight)
        middle = time.perf_counter()
        weight_gradient(dy, x)
        return middle - start, time.perf_counter() - middle
