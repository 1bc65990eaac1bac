"""A sharded model, swapped or not, in DeepSpeed's engines: norms, clipping and steps are those of one process."""

import pytest
import torch
from distributed.workers.shard_engine import CLIPPING, steps_of_one_process, worker
from helpers.spawn import run_processes

pytest.importorskip("transformers")

CASES = [(stage, swapped) for stage in (0, 1, 2) for swapped in (False, True)]


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 4, CASES)


@pytest.fixture(scope="module")
def plain():
    norms, weights = steps_of_one_process()
    assert min(norms) > CLIPPING
    return norms, weights


@pytest.mark.parametrize(("stage", "swapped"), CASES)
def test_deepspeed_steps_a_sharded_model_as_a_whole_one(by_rank, plain, stage, swapped):
    expected_norms, expected = plain
    for results in by_rank:
        norms, weights = results[stage, swapped]
        assert norms == pytest.approx(expected_norms, rel=1e-4)  # three steps apart in sums of another order
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                weights[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
