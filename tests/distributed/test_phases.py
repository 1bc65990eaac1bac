"""Runs of several processes whose micro-batches, batch and samples change on the way, at every ZeRO stage; gloo."""

import shutil

import pytest
from distributed.workers.runs import runs_worker
from helpers.runs import losses, metrics, write_config
from helpers.spawn import free_port, run_processes

from xformer_train.launcher.processes.topology import quiet

# Micro-batches of a process in each step: 1, 1, 2 and 2 while the batch grows, then 3, then 1.
PHASES = [
    {"from_step": 4, "training": {"train_batch_size": 12}, "data": {"max_seq_length": 64}},
    {"from_step": 7, "training": {"train_batch_size": 8, "micro_batch_size": 4}, "objective": {"mlm_probability": 0.3}},
]
GROWING = {
    "batch_warmup_from": 4,
    "batch_warmup_steps": 4,
    "train_batch_size": 12,
    "micro_batch_size": 2,
    "max_steps": 9,
}
RUNS = {
    "stage0": ("deepspeed.zero_optimization.stage=0",),
    "stage1": ("deepspeed.zero_optimization.stage=1",),
    "stage2": ("deepspeed.zero_optimization.stage=2",),
    "stage3": ("deepspeed.zero_optimization.stage=3",),
    "shared": ("parallel.tensor=2", "training.micro_batch_size=4"),
    "bf16": ("deepspeed.zero_optimization.stage=2", "training.precision=bf16"),
    "bf16 at stage 0": ("deepspeed.zero_optimization.stage=0", "training.precision=bf16"),
}
CUTS = (2, 4, 5, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Unbroken runs of two processes and one of one process, and the former stopped and resumed."""
    quiet(debug=False)
    path = tmp_path_factory.mktemp("phases")
    keys = {
        "training": GROWING | {"precision": "fp32"},
        "model__hidden_dropout_prob": 0.0,
        "model__attention_probs_dropout_prob": 0.0,
        "optimizer__lr": 0.01,
        "schedule__total_steps": None,
        "data__validation_fraction": 0.2,
        "eval__every_steps": 3,
        "checkpoint__save_every_steps": 1,
        "checkpoint__keep_last": None,
    }
    file = write_config(path, phases=PHASES, **keys)
    one = [(file, ["name=one", "training.micro_batch_size=4"], False, free_port())]
    two = [(file, [f"name={name}", *sets], False, free_port()) for name, sets in RUNS.items()]
    resumed = []
    printed = [text for size, runs in ((1, one), (2, two)) for text in run_processes(runs_worker, size, size, runs)[0]]
    for (name, sets), cut in zip(RUNS.items(), (*CUTS, 4, 4, 5), strict=True):
        copy = path / "runs" / f"{name} resumed"
        shutil.copytree(path / "runs" / name, copy)
        for step in range(cut + 1, 10):
            shutil.rmtree(copy / "checkpoints" / f"step{step:08d}")
        (copy / "checkpoints" / "latest").write_text(f"step{cut:08d}\n")
        resumed.append((file, [f"name={copy.name}", *sets], True, free_port()))
    printed += run_processes(runs_worker, 2, 2, resumed)[0]
    assert all("finished" in text for text in printed), printed
    return path / "runs"


def rows(run):
    kept = ("step", "samples", "loss", "val_loss", "lr", "grad_norm")
    return [{key: row.get(key) for key in kept} for row in metrics(run)]


def test_two_processes_take_the_samples_and_losses_of_one_at_every_stage(folder):
    assert [row["samples"] for row in rows(folder / "one") if row["loss"]] == [4, 8, 16, 24, 36, 48, 60, 68, 76]
    for stage in ("stage0", "stage1", "stage2", "stage3", "shared"):
        assert [row["samples"] for row in rows(folder / stage)] == [row["samples"] for row in rows(folder / "one")]
        # fp32 sums in another order, fed back through Adam
        assert losses(folder / stage) == pytest.approx(losses(folder / "one"), rel=2e-5)
        norms, expected = ([row["grad_norm"] for row in rows(folder / run) if row["loss"]] for run in (stage, "one"))
        assert norms == pytest.approx(expected, rel=5e-4)


def test_bf16_learns_what_fp32_does_whatever_the_number_of_micro_batches(folder):
    for run in ("bf16", "bf16 at stage 0"):
        assert losses(folder / run) == pytest.approx(losses(folder / "one"), rel=5e-3)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumed_at_or_between_borders_equals_an_unbroken_one(name, folder):
    assert rows(folder / f"{name} resumed") == rows(folder / name)
