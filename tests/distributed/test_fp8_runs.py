"""A run in FP8 against the same run in bf16."""

import pytest
from distributed.workers.runs import runs_worker
from helpers.runs import GPT, losses, metrics, write_config
from helpers.spawn import free_port, run_processes


def test_two_hundred_steps_in_fp8_end_where_bf16_does(tmp_path):
    changes = {
        "model__hidden_size": 32,
        "model__intermediate_size": 64,
        "training__micro_batch_size": None,
        "training__max_steps": 200,
        "schedule__total_steps": None,
        "optimizer__lr": 0.003,
        "data__validation_fraction": 0.1,
    }
    path = write_config(tmp_path, GPT, **changes)
    names = ("bf16", "fp8")
    runs = [(path, [f"name={name}", f"training.precision={name}"], False, free_port()) for name in names]
    run_processes(runs_worker, 1, 1, runs)
    wide, narrow = (tmp_path / "runs" / name for name in names)
    first, *_, last = losses(narrow).values()
    assert last < first - 2  # it learned: bytes of made-up words
    assert losses(narrow) != losses(wide)
    assert metrics(narrow)[-1]["val_loss"] == pytest.approx(metrics(wide)[-1]["val_loss"], rel=0.02)
    tails = [sum(list(losses(run).values())[-20:]) / 20 for run in (wide, narrow)]
    assert tails[1] == pytest.approx(tails[0], rel=0.02)
