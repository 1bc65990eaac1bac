"""What computes the products of a run, and in which precision: chosen at its first start, the same ever after."""

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ...kernels.errors import UserError, refused
from ...kernels.ops.linear import CpuLibraries, using_cpu_libraries
from ..checkpoint import store
from ..config.batch import BatchPlan
from ..config.schema import Precision, RunConfig
from ..processes import console
from ..processes.agreement import by_main
from ..processes.durable_files import replace_text
from ..processes.products import Cpu, Products, choose, products_shape, this_cpu, unsupported
from ..processes.topology import Topology
from ..reporting.run_directory import RunDirectory

_LOG = logging.getLogger(__name__)


def products_of_run(
    config: RunConfig, batch: BatchPlan, topology: Topology, held: ExitStack, *, resume: bool
) -> Products:
    """Return what a run computes its products with, equal on all processes, which all come here, until `held` closes.

    A run that goes on does so as it began: in the precision of its checkpoint, where training.precision is auto, and with the
    libraries in its run directory. Raises UserError for a precision that the device cannot train in.
    """
    cpus = topology.gather(this_cpu())
    products = by_main(topology, lambda: _products(config, batch, topology.device, cpus, resume))
    if products.libraries is not None:
        held.enter_context(using_cpu_libraries(products.libraries))
    return products


def record_products(directory: RunDirectory, products: Products) -> None:
    """Write products.json, if anything was chosen."""
    if products.libraries is None:
        return
    facts = {
        "cpu": products.cpu,
        "precision": products.precision,
        "libraries": products.libraries._asdict(),
        "shape": products.shape,
        "gflops": products.speeds,
    }
    with refused(f"cannot write {directory.products}", "free space or choose another --output_dir"):
        replace_text(directory.products, json.dumps(facts, indent=2) + "\n")


def _products(config: RunConfig, batch: BatchPlan, device: torch.device, cpus: Sequence[Cpu], resume: bool) -> Products:
    directory = RunDirectory.of(config)
    before = _recorded(directory.products) if resume else None
    requested, why = config.training.precision, ""
    if requested == "auto":
        known = _trained_in(config, directory, resume=resume) or (before and before.precision)
        if known and not unsupported(known, device):
            requested, why = known, "auto: in which it has trained before"
    goes_on = before is not None or (resume and bool(store.entries(directory.checkpoints)))
    shape = products_shape(config, batch.micro_batch_size)
    if not goes_on or device.type != "cpu" or requested == "auto" or unsupported(requested, device):
        chosen = choose(requested, device, cpus, shape)
        return replace(chosen, why=why or chosen.why)
    why = why or "as the config says"
    if before is None:  # of a version that did not choose
        return Products(requested, why)
    if before.cpu == cpus[0].name and all(set(before.libraries or ()) <= set(cpu.libraries) for cpu in cpus):
        return replace(before, precision=requested, why=why)
    text = (
        f"this run began on {before.cpu}, and this machine has {cpus[0].name}: products are measured anew, and losses"
    )
    console.warn(f"{text} may differ in the last digits from those of a run on one machine", _LOG)
    return replace(choose("fp32", device, cpus, shape), precision=requested, why=why)


def _trained_in(config: RunConfig, directory: RunDirectory, *, resume: bool) -> Precision | None:
    """Return the precision of the checkpoint that the run goes on from, None without one."""
    state: dict[str, Any] | None = None
    if resume:
        states = [entry.state for entry in store.entries(directory.checkpoints) if entry.state is not None]
        state = states[-1] if states else None
    if state is None and config.load.path is not None and config.load.what == "all":
        state = store.read_state(store.resolve(Path(config.load.path), config.load.id))
    return None if state is None else cast(Precision, state["engine"]["precision"])


def _recorded(path: Path) -> Products | None:
    """Return what `record_products` wrote, None if it did not. Raises UserError for a file that it did not write so."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        libraries, speeds = CpuLibraries(**facts["libraries"]), facts["gflops"].items()
        gflops = {name: (float(values), float(gradients)) for name, (values, gradients) in speeds}
        return Products(facts["precision"], "", str(facts["cpu"]), libraries, tuple(facts["shape"]), gflops)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, and products are measured anew") from None
