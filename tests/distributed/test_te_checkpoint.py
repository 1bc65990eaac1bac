"""te.checkpoint under tensor parallelism, and with the saved activation divided over the ranks."""

import pytest
import torch
from distributed.workers.te_checkpoint import worker
from helpers.spawn import run_processes


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 2)


def test_recomputation_on_every_rank_equals_none(by_rank):
    """Bit for bit: the collectives of the second pass are those of the first."""
    for rank, pairs in enumerate(by_rank):
        assert len(pairs) > 200
        for name, (ours, expected) in pairs.items():
            same = torch.equal(ours, expected) if isinstance(ours, torch.Tensor) else ours == expected
            assert same, f"rank {rank}, {name}: {ours} is not {expected}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "numel",
            "args[0] has 3 elements, which the 2 ranks of tp_group cannot share equally; pad it to a multiple of 2",
        ),
        ("not a tensor", "args[0] is 3.0; the first argument of the function must be the tensor to distribute"),
        ("sequence parallel", "Linear has sequence_parallel=True, under which the ranks hold different parts already"),
        ("norm", "LayerNorm has sequence_parallel=True"),
        ("in a closure", "LayerNormLinear has sequence_parallel=True"),
    ],
)
def test_what_cannot_be_distributed_is_one_clear_error(by_rank, name, message):
    for pairs in by_rank:
        assert message in pairs[name][0]
