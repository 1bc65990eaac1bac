"""A swapped model in DeepSpeed's engines: its steps are those of the stock model, under the stock model's names."""

import pytest
import torch
from distributed.workers.shard_engine import steps_of_one_process
from distributed.workers.swap_engine import worker
from helpers.spawn import run_processes

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 2, STAGES)


@pytest.fixture(scope="module")
def stock():
    return steps_of_one_process()


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_steps_and_checkpoints_a_swapped_model(by_rank, stock, stage):
    expected_norms, expected = stock
    for results in by_rank:
        norms, weights, loaded = results[stage]
        assert norms == pytest.approx(expected_norms, rel=1e-4)  # three steps apart in sums of another order
        assert list(weights) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(
                weights[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
            assert torch.equal(loaded[name], weights[name]), name
