"""scripts/slurm.sbatch, with programs in the place of Slurm's own."""

import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(("exit_code", "requeued"), [(0, False), (1, False), (75, True)])
def test_the_slurm_script_queues_a_run_again_that_was_told_to_stop(tmp_path, exit_code, requeued):
    programs = {
        "scontrol": 'if [ "$1" = show ]; then printf "nodeA\\nnodeB\\n"; else echo "$@" > requeued; fi',
        "srun": f'echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS" > env; echo "$@" > srun; exit {exit_code}',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[A-B]", "SLURM_JOB_ID": "1234567", "SLURM_CPUS_PER_TASK": "4"}
    script = Path(__file__).parents[2] / "scripts" / "slurm.sbatch"
    done = subprocess.run(
        ["bash", str(script), "--config", "run.yaml", "--seed", "7"],
        check=False,
        cwd=tmp_path,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == exit_code
    assert (tmp_path / "env").read_text() == "nodeA 34567 4\n"
    started = (tmp_path / "srun").read_text()
    assert started == "--cpus-per-task=4 --wait=120 xformer-train --config run.yaml --seed 7 --resume auto\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 1234567\n"
