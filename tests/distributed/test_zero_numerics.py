"""Numbers that are not finite on one of two processes, at every ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed.workers.numerics import numerics_worker
from helpers.runs import losses, metrics, write_config
from helpers.spawn import free_port, run_processes

from xformer_train.launcher.checkpoint.store import read_state, sealed

# fp32 at stage 0 has a test of its own in the optimizer's step, all else one of DeepSpeed's.
CASES = [("0", "fp32"), ("0", "bf16"), ("1", "fp32"), ("2", "bf16"), ("3", "fp32")]
SKIPPED, KEPT = 3, 2  # the step that is left out, and the one before it


def tensors(value, path=""):
    """All tensors in what a checkpoint's files hold, by their place."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {place: tensor for key, item in items for place, tensor in tensors(item, f"{path}/{key}").items()}


def saved_tensors(checkpoint: Path):
    return {
        f"{path.name}{place}": tensor
        for path in sorted(checkpoint.glob("*states.pt"))
        for place, tensor in tensors(torch.load(path, map_location="cpu", weights_only=False)).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that skip, stop and go back."""
    folder = tmp_path_factory.mktemp("numerics")
    path = write_config(folder, training__max_steps=6, checkpoint__keep_last=None)
    runs = []
    for stage, precision in CASES:
        common = [f"deepspeed.zero_optimization.stage={stage}", f"training.precision={precision}"]
        for nan, bad, every in (("skip", [SKIPPED - 1], 1), ("stop", [SKIPPED - 1], 1), ("rollback", [4], 2)):
            name = f"name={nan}{stage}{precision}"
            sets = [*common, name, f"reliability.nan={nan}", f"checkpoint.save_every_steps={every}"]
            runs.append((path, sets, bad, free_port()))
    printed = run_processes(numerics_worker, 2, runs)

    # The run that went back, from the checkpoint it went back to: as if it had been started anew behind the samples.
    again = []
    for stage, precision in CASES:
        went_back = folder / "runs" / f"rollback{stage}{precision}" / "checkpoints"
        checkpoints = folder / "runs" / f"again{stage}{precision}" / "checkpoints"
        shutil.copytree(went_back / "step00000004", checkpoints / "step00000004")
        state = read_state(checkpoints / "step00000004")
        (checkpoints / "step00000004" / "state.json").write_text(sealed({**state, "position": 40}))
        (checkpoints / "latest").write_text("step00000004\n")
        sets = [f"deepspeed.zero_optimization.stage={stage}", f"training.precision={precision}"]
        again.append((path, [*sets, f"name=again{stage}{precision}"], [], free_port()))
    run_processes(numerics_worker, 2, again)
    names = [f"{nan}{stage}{precision}" for stage, precision in CASES for nan in ("skip", "stop", "rollback")]
    (folder / "printed.json").write_text(json.dumps(dict(zip(names, zip(*printed, strict=True), strict=True))))
    return folder


@pytest.fixture(scope="module")
def printed(folder):
    return json.loads((folder / "printed.json").read_text())


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_skipped_step_changes_no_bit_and_is_counted(stage, precision, folder, printed):
    run = folder / "runs" / f"skip{stage}{precision}"
    before, after, later = (saved_tensors(run / "checkpoints" / f"step{step:08d}") for step in (KEPT, SKIPPED, 4))
    assert before and before.keys() == after.keys()
    different = [place for place in before if not before[place].equal(after[place])]
    assert different == []
    assert any(not after[place].equal(later[place]) for place in after)
    skipped = [row.get("skipped_steps", 0) for row in metrics(run) if "loss" in row]
    assert skipped == [0, 0, 1, 1, 1, 1]
    text = printed[f"skip{stage}{precision}"][0]
    assert "warning: step 3 (samples 16 to 23): the loss or its gradient is not finite; the step is skipped" in text


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_stop_names_the_process_and_the_place_and_leaves_the_last_checkpoint(stage, precision, folder, printed):
    for text in printed[f"stop{stage}{precision}"]:  # all processes alike
        assert (
            "NotFiniteError: step 3 (samples 16 to 23): the loss or its gradient is not finite: on rank 1, the first"
            in text
        )
        assert "output that is not finite is that of layers.1; gradients that are not finite, in the order" in text
    checkpoints = folder / "runs" / f"stop{stage}{precision}" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step*")) == ["step00000001", "step00000002"]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_run_that_went_back_is_one_that_was_started_anew_behind_the_samples(stage, precision, folder, printed):
    run = folder / "runs" / f"rollback{stage}{precision}"
    assert "rolled back to step00000004, going on with sample 40" in printed[f"rollback{stage}{precision}"][0]
    assert [row["step"] for row in metrics(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    again = losses(folder / "runs" / f"again{stage}{precision}")
    assert losses(run)[5] == again[5] and losses(run)[6] == again[6]
    assert read_state(run / "checkpoints" / "step00000006")["position"] == 56
