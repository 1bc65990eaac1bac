"""BERT and GPT under tensor and sequence parallelism equal one process: start values, losses, every gradient, dropout masks."""

import pytest
import torch
from distributed.workers.models import worker
from helpers.spawn import run_processes

SIZES = (2, 4)


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 4, SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_every_process_holds_its_part_of_what_one_computes(by_rank, size):
    """What differs is the order of sums, so a tensor's error is relative to its largest number."""
    for rank, results in enumerate(by_rank):
        assert len(results[size]) > 600
        for name, arrays in results[size].items():
            ours, expected = map(torch.as_tensor, arrays)
            exact = name.startswith("start") or not ours.dtype.is_floating_point
            tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-10
            torch.testing.assert_close(
                ours,
                expected,
                atol=0 if exact else tolerance * max(1.0, expected.abs().max().item()),
                rtol=0,
                msg=lambda text, where=f"rank {rank}, {name}": f"{where}: {text}",
            )
