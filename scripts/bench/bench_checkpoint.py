"""How long a step waits for a checkpoint of BERT-base: written within the step, and beside the steps that follow.

The state is that of configs/bert_base.yaml in one process at ZeRO stage 0: weights and Adam moments, random numbers, in fp32 on
a CPU, in bf16 with fp32 weights beside it on a GPU. Each save goes to a new checkpoint in a folder that is removed in the end,
after the one before has ended; nothing is trained meanwhile. Prints medians.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_device import machine_line

from xformer_train.launcher.checkpoint import store
from xformer_train.launcher.checkpoint.saving import CheckpointSaver
from xformer_train.launcher.config.batch import solve_batch
from xformer_train.launcher.config.deepspeed import deepspeed_config
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.config.schema import CheckpointConfig
from xformer_train.launcher.optim.engine import build_engine
from xformer_train.launcher.optim.optimizer import build_optimizer
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes
from xformer_train.recipes import RECIPES

CONFIG = Path(__file__).parents[2] / "configs" / "bert_base.yaml"
VOCAB_SIZE = 30528  # BERT's 30,522 symbols, rounded up as the launcher does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind, after a first asynchronous one")
    parser.add_argument("--folder", type=Path, help="where to write; default the folder for temporary files")
    arguments = parser.parse_args()
    logging.disable()
    quiet(debug=False)
    topology = start_processes(600)
    engine = bert_base(topology)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = {kind: times(engine, Path(folder), topology, kind, arguments.saves) for kind in (True, False)}
        num_bytes = sum(
            entry["bytes"]
            for entry in store.entries(Path(folder))[-1].state["files"].values()  # type: ignore[index]
        )
    stop_processes()
    print(machine_line())
    print(f"{num_bytes / 2**30:.2f} GiB in a checkpoint, {arguments.saves} saves each")
    for asynchronous, (first_s, blocked_s, written_s) in rows.items():
        kind = "asynchronous" if asynchronous else "synchronous"
        waits = f"the step waits {blocked_s:.3f} s, the first time {first_s:.3f} s"
        print(f"{kind:<12}  {waits}; on disk and read back after {written_s:.2f} s")
    print(f"ratio of the waits {rows[False][1] / rows[True][1]:.1f}")


def bert_base(topology: Topology) -> Any:
    """An engine with moments, as after a step."""
    precision = "bf16" if topology.device.type == "cuda" else "fp32"
    loaded = load_config(CONFIG, [f"training.precision={precision}"])
    config = loaded.config
    model = RECIPES["bert"].build_model(config.model, config.layer, config.objective, VOCAB_SIZE)
    optimizer = build_optimizer(model, config.optimizer, None)
    batch = solve_batch(config.training, 1)
    engine = build_engine(model, optimizer, deepspeed_config(config, batch, precision, loaded.origins), topology)
    for group in engine.basic_optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.randn_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
            engine.basic_optimizer.state[parameter] = {**moments, "step": torch.tensor(1.0)}
    return engine


def times(engine: Any, folder: Path, topology: Topology, asynchronous: bool, saves: int) -> tuple[float, float, float]:
    """Seconds that a step waits for the first save, medians over the later ones of that and of the time to the end."""
    waits, ends = [], []
    with CheckpointSaver(engine, folder, topology, CheckpointConfig(asynchronous=asynchronous, keep_last=1)) as saver:
        for number in range(saves + 1):
            started_s = time.perf_counter()
            step = 100 * asynchronous + number
            saver.save(f"step{step}", {"step": step, "model": {}}, {})
            waits.append(time.perf_counter() - started_s)
            saver.wait()
            ends.append(time.perf_counter() - started_s)
    return waits[0], statistics.median(waits[1:]), statistics.median(ends[1:])


if __name__ == "__main__":
    main()
