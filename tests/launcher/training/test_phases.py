"""Runs whose batch, samples and schedule change on the way: exact resume, and what two chained runs do in their place."""

import shutil

import pytest
import torch
from helpers.runs import BERT, GPT, MODERNBERT, PACKED, merged, metrics, weights, write_config

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet

quiet(debug=False)

from xformer_train.launcher.training.train import run  # noqa: E402 - DeepSpeed is quiet only when told before

PHASES = [
    {"from_step": 4, "data": {"max_seq_length": 64}, "objective": {"mlm_probability": 0.3}},
    {"from_step": 7, "training": {"train_batch_size": 12, "micro_batch_size": 2}, "data": {"max_seq_length": 24}},
    {"from_share": 0.75, "schedule": {"type": "cosine", "warmup_steps": 1}, "optimizer": {"lr": 0.002}},
]
OF_ALL_KINDS = {
    "bert without padding": merged(BERT, {"layer.unpad": True}),
    "packed bert": PACKED,
    "modernbert": MODERNBERT,
    "gpt": GPT,
}


def start(path, *sets, resume=False):
    run(load_config(path, list(sets)), resume=resume)


def stopped_at(folder, step, name):
    """A copy of the unbroken run as it was when it had saved this step."""
    copy = folder / "runs" / name
    shutil.copytree(folder / "runs" / "unbroken", copy)
    for checkpoint in (copy / "checkpoints").glob("step*"):
        if int(checkpoint.name.removeprefix("step")) > step:
            shutil.rmtree(checkpoint)
    (copy / "checkpoints" / "latest").write_text(f"step{step:08d}\n")
    return copy


def with_phases(folder, base=BERT, **changes):
    settings = {
        "phases": PHASES,
        "name": "unbroken",
        "schedule__total_steps": None,
        "data__validation_fraction": 0.2,
        "eval__every_steps": 3,
        "checkpoint__save_every_steps": 1,
        "checkpoint__keep_last": None,
    }
    return write_config(folder, base, **{**settings, **changes})


def assert_resumes_exactly(folder, base, steps):
    path = with_phases(folder, base)
    start(path)
    unbroken = folder / "runs" / "unbroken"
    for step in steps:
        name = f"from{step}"
        copy = stopped_at(folder, step, name)
        start(path, f"name={name}", resume=True)
        kept = ("step", "loss", "val_loss", "lr", "samples", "epoch", "grad_norm")
        assert [{key: row.get(key) for key in kept} for row in metrics(copy)] == [
            {key: row.get(key) for key in kept} for row in metrics(unbroken)
        ]
        ours, theirs = (weights(run_dir / "checkpoints" / "step00000012") for run_dir in (copy, unbroken))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_resumed_inside_its_phases_and_on_both_sides_of_borders_equals_an_unbroken_one_bit_for_bit(tmp_path):
    assert_resumes_exactly(tmp_path, BERT, (3, 4, 5, 7, 9))


@pytest.mark.parametrize("base", OF_ALL_KINDS.values(), ids=OF_ALL_KINDS)
def test_any_kind_of_samples_resumes_exactly_at_and_after_a_border(base, tmp_path):
    assert_resumes_exactly(tmp_path, base, (4, 8))
