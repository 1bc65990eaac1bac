"""What the benchmarks say of the machine they run on: its name, its versions, and how fast it can be at most."""

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from xformer_train.kernels.ops.linear import product

_WAIT_CYCLES = 10**7  # 6 ms at 1.75 GHz


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine_line() -> str:
    """Device, versions and date, as they must stand beside every figure."""
    if torch.cuda.is_available():
        import triton  # only GPUs use it, and a CPU machine need not have it

        versions = f"triton {triton.__version__}, cuDNN {torch.backends.cudnn.version()}"
        device = f"{torch.cuda.get_device_name()}, driver {_driver_version()}, {versions}"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, {platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def _driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else "unknown"


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches now on work that does nothing else: the roofline of the benchmarks."""

    matmul_flop_per_s: float
    copy_bytes_per_s: float | None
    """Bytes read and written by a copy in device memory; None on a CPU, whose caches hold what one layer passes on."""

    def __str__(self) -> str:
        copy = f", {self.copy_bytes_per_s / 1e12:.2f} TB/s in a copy" if self.copy_bytes_per_s else ""
        return f"{self.matmul_flop_per_s / 1e12:.2f} TFLOP/s in a matrix product{copy}"


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A square matrix product as our layer computes it (8192 on a GPU, 1024 on a CPU) and, on a GPU, a copy of 2 GiB.

    Of random values: on zeros a GPU draws less power and runs faster than on any real data.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    matmul_flop_per_s = 2 * size**3 / seconds_of(lambda: product(a, b), device)
    if device.type == "cpu":
        return Ceilings(matmul_flop_per_s, None)
    source = torch.randn(2**30, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return Ceilings(matmul_flop_per_s, 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device))


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 8) -> float:
    """Return the seconds of one call: the median of five bursts of calls, after one that warms up; on a CPU of two.

    On a GPU a burst stands in the queue before its first kernel starts, behind one that only waits. So a kernel of 20 us is
    measured, and not the 50 us that Python takes to launch it.
    """
    burst, bursts = (_gpu_burst, 5) if device.type == "cuda" else (_cpu_burst, 2)
    return statistics.median([burst(work, calls) for _ in range(1 + bursts)][1:]) / calls


def _cpu_burst(work: Callable[[], object], calls: int) -> float:
    started_s = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - started_s


def _gpu_burst(work: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_WAIT_CYCLES)
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


if __name__ == "__main__":
    print(machine_line())
