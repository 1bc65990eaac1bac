"""LAMB at ZeRO stages 1, 2 and 3 against stage 0; gloo on two and four processes."""

import pytest
import torch
from distributed.workers.lamb import lamb_worker
from helpers.spawn import run_processes

STAGES = [(stage, precision, {}) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
MORE = [
    (1, "fp32", {"offload_optimizer": {"device": "cpu"}}),
    (3, "fp32", {"sub_group_size": 50}),  # a step in several calls
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_fifty_steps_equal_those_of_stage_0(world_size):
    """The network has 13 x 7, 13, 7 x 13 and 7 numbers: tensors straddle the shards, and some processes hold none of one."""
    cases = [*STAGES, *MORE]
    compare_with_stage_0(cases, run_processes(lamb_worker, world_size, cases)[0])


def test_a_process_that_holds_nothing_but_padding_steps_with_the_others():
    """Three biases among four processes: at stage 1 in pairs, at stage 3 one by one."""
    cases = [(stage, "fp32", {}) for stage in (0, 1, 2, 3)]
    compare_with_stage_0(cases, run_processes(lamb_worker, 4, cases, 3)[0])


def compare_with_stage_0(cases, results):
    expected = {precision: results[cases.index((0, precision, {}))] for precision in {case[1] for case in cases}}
    for case, (weights, ratios) in zip(cases, results, strict=True):
        expected_weights, expected_ratios = expected[case[1]]
        assert ratios == pytest.approx(expected_ratios, rel=1e-5), case
        assert min(expected_ratios.values()) < 0.9  # not all at the bound
        for ours, theirs in zip(weights, expected_weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=lambda text, case=case: f"{case}: {text}")
