"""te modules under tensor and sequence parallelism equal one process: start values, outputs, every gradient, dropout masks."""

import pytest
import torch
from distributed.workers.te import worker
from helpers.spawn import run_processes

SIZES = (2, 4)


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 4, SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_holds_its_part_of_what_one_process_computes(by_rank, size):
    """fp64, where all that differs is the order of sums."""
    for rank, results in enumerate(by_rank):
        assert len(results[size]) > 300
        for name, (ours, expected) in results[size].items():
            exact = "start" in name or ours.dtype == torch.bool
            torch.testing.assert_close(
                ours,
                expected,
                atol=0 if exact else 1e-10,
                rtol=0 if exact else 1e-10,
                msg=lambda text, where=f"rank {rank}, {name}": f"{where}: {text}",
            )
