"""Activation checkpointing under tensor and sequence parallelism, and under every ZeRO stage, changes no bit."""

import pytest
import torch
from distributed.workers.activation_checkpointing import STAGES, worker
from helpers.spawn import run_processes


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 2)


@pytest.mark.parametrize("choice", ["selective", "full"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("sequence", [False, True])
def test_shared_layers_compute_the_same_and_keep_less(by_rank, sequence, fp8, choice):
    for results in by_rank:
        ours, expected = (results["shared"][f"{c}, sequence={sequence}, fp8={fp8}"] for c in (choice, "none"))
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor) == (name != "bytes"), name
        assert ours["bytes"] < expected["bytes"]


@pytest.mark.parametrize("sequence", [False, True])
def test_of_full_only_the_inputs_are_left_and_under_sequence_parallelism_a_part_of_them(by_rank, sequence):
    """B S H e, half of it on each of two processes under sequence parallelism, and a seed, for each of two layers."""
    per_layer = 2 * 6 * 32 * 4 // (2 if sequence else 1) + 8
    for results in by_rank:
        assert results["shared"][f"full, sequence={sequence}, fp8=False"]["bytes"] == 2 * per_layer


@pytest.mark.parametrize("choice", ["selective", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_the_same_weights(by_rank, stage, choice):
    for results in by_rank:
        ours, expected = (results["engines"][f"{stage} {c}"] for c in (choice, "none"))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
