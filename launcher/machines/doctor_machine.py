"""What `doctor` makes of one machine: its software, devices, kernels, limits, folders and port, one finding per question."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ...recipes.data.cache import cache_folder
from ..config.schema import RunConfig
from ..processes.words import size
from .doctor_facts import Questions, version
from .launch import DEFAULT_PORT, LaunchOptions

PACKAGES = ["xformer-train", "torch", "deepspeed", "triton", "transformers", "numpy"]
_NEEDED_FREE = 100 * 2**20  # bytes without which not even a small run's files fit
_COMFORTABLE_FREE = 10 * 2**30
_OPEN_FILES = 4096
_SHARED_MEMORY = 512 * 2**20  # NCCL's buffers between GPUs of one machine; containers often come with 64 MiB


@dataclass(frozen=True)
class Finding:
    """What came out of one check."""

    level: Literal["ok", "warn", "FAIL"]
    what: str
    detail: str
    remedy: str = ""

    @property
    def row(self) -> tuple[str, str, str]:
        """The finding as a row of a table."""
        return self.level, self.what, f"{self.detail}  -> {self.remedy}" if self.remedy else self.detail


def questions(
    config: RunConfig, *, port: int | None, files: Sequence[str] = (), names: Sequence[str] = ()
) -> Questions:
    """Return what this run config has to ask of a machine."""
    return {
        "packages": PACKAGES,
        "folders": [config.output_dir, str(cache_folder(config.data.cache_dir))],
        "files": list(files),
        "names": list(names),
        "port": port,
        "python_path": os.environ.get("PYTHONPATH", ""),
    }


def software(machine: dict[str, Any]) -> Iterator[Finding]:
    """Judge the versions by the requirements of this package."""
    yield Finding("ok", "python", f"{machine['python']}, {machine['c_library']}")
    versions = machine["packages"]
    yield Finding("ok", "packages", ", ".join(f"{name} {versions[name]}" for name in PACKAGES if versions[name]))
    from packaging.requirements import Requirement

    for entry in metadata.requires("xformer-train") or []:
        requirement = Requirement(entry)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            fault = "is not installed" if found is None else f"is {found}, needs {requirement.specifier}"
            yield Finding("FAIL", requirement.name, fault, f"pip install '{entry}'")


def devices(machine: dict[str, Any]) -> Iterator[Finding]:
    """Yield the GPUs with their memory, or the CPU."""
    import torch

    gpus = machine["gpus"]
    if gpus and not torch.cuda.is_available():
        there = f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver']}"
        fault = f"{there}, and torch {torch.__version__} cannot use it"
        remedy = "install a CUDA build of torch that this driver supports"
        yield Finding("FAIL", "CUDA", fault, f"{remedy}, or set CUDA_VISIBLE_DEVICES= to train on the CPU")
    elif torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        driver = gpus[0]["driver"] if gpus else "unknown"
        yield Finding("ok", "CUDA", f"{torch.version.cuda}, driver {driver}, NCCL {nccl}")
    for index, gpu in enumerate(gpus):
        detail = f"{gpu['name']}, {size(gpu['total'])}, {size(gpu['used'])} in use"
        if gpu["used"] > gpu["total"] // 10:
            yield Finding("warn", f"GPU {index}", detail, "see `nvidia-smi` for who uses it")
        else:
            yield Finding("ok", f"GPU {index}", detail)
    if not gpus:
        free = size(machine["memory_available"])
        yield Finding("ok", "devices", f"no GPU; {machine['cores']} CPU cores, {free} free memory")


def kernels(config: RunConfig, machine: dict[str, Any]) -> Iterator[Finding]:
    """Yield the kernels and the precision a run would use here, and that they need no compiler on the way."""
    import torch

    from ...recipes.recipe import Runtime
    from ..processes.kernels import kernels_text
    from ..processes.products import choose, products_shape, this_cpu

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    yield Finding("ok", "kernels", kernels_text(config.model, config.layer, Runtime(), device))
    micro_batch_size = config.training.micro_batch_size or config.training.train_batch_size or 1
    products = choose(config.training.precision, device, [this_cpu()], products_shape(config, micro_batch_size))
    detail = f"{products.precision}: {products.why}"
    yield Finding("ok", "precision", f"{detail}; {products.text}" if products.text else detail)
    if not (on_gpu and config.layer.kernels == "auto" and _triton_needs_compiler()):
        yield Finding("ok", "compiler", "none is needed: no operator is built from C++ or CUDA sources")
    elif any(machine["tools"].values()):
        yield Finding("ok", "compiler", "a C compiler, which this Triton needs at its first start, is there")
    else:
        fault = "this Triton builds a part of itself with a C compiler, and there is none"
        remedy = "install gcc or a newer Triton, or set layer.kernels: reference"
        yield Finding("FAIL", "compiler", fault, remedy)


def _triton_needs_compiler() -> bool:
    """Return whether the installed Triton compiles its driver interface with the system's C compiler; older ones do."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return False
    driver = Path(found.origin).parent / "backends" / "nvidia" / "driver.py"
    return driver.exists() and "compile_module_from_src" in driver.read_text(encoding="utf-8")


def system(machine: dict[str, Any], prefix: str = "") -> Iterator[Finding]:
    """Judge limits that end runs late. prefix: stands before the name of each finding."""
    name, detail = f"{prefix}open files", f"at most {machine['open_files']:,} per process"
    if machine["open_files"] < _OPEN_FILES:
        remedy = f"ulimit -n {_OPEN_FILES}, or LimitNOFILE of the service that starts runs"
        yield Finding("warn", name, detail, remedy)
    else:
        yield Finding("ok", name, detail)
    shared = machine["shared_memory"]
    if shared is not None and shared < _SHARED_MEMORY and len(machine["gpus"]) > 1:
        remedy = "start the container with --shm-size=1g, or --ipc=host"
        yield Finding("warn", f"{prefix}shared memory", f"{size(shared)} free in /dev/shm", remedy)


def folders(machine: dict[str, Any], prefix: str = "") -> Iterator[Finding]:
    """Yield whether output and cache can be written, and how much."""
    for what, (folder, state) in zip(("output_dir", "cache_dir"), machine["folders"].items(), strict=False):
        name, detail = f"{prefix}{what}", f"{folder}, {size(state['free'])} free"
        if state["fault"] is not None:
            remedy = f"choose another {what}, or mend its permissions"
            yield Finding("FAIL", name, f"cannot write: {state['fault']}", remedy)
        elif state["free"] < _NEEDED_FREE:
            yield Finding("FAIL", name, detail, f"free space, or choose another {what}")
        elif state["free"] < _COMFORTABLE_FREE:
            remedy = "a checkpoint with AdamW takes 12 bytes per parameter or more; docs/memory.md"
            yield Finding("warn", name, detail, remedy)
        else:
            yield Finding("ok", name, detail)


def port(machine: dict[str, Any], options: LaunchOptions) -> Iterator[Finding]:
    """Yield whether processes of this machine can meet at the given port; without one `launch` finds a free one."""
    wanted = options.master_port or DEFAULT_PORT
    if machine["port_free"]:
        yield Finding("ok", "port", f"{wanted} is free")
    elif options.master_port is None:
        remedy = "`launch` takes another; give deepspeed and torchrun --master_port"
        yield Finding("warn", "port", f"{wanted} is taken", remedy)
    else:
        yield Finding("FAIL", "port", f"{wanted} is taken", "choose another --master-port")
