"""Muon at ZeRO stages 0 to 3 and under tensor parallelism against one process; gloo on two and four processes."""

import pytest
import torch
from distributed.workers.muon import Case, muon_worker
from helpers.spawn import run_processes

GATED = {"num_key_value_heads": 2, "gated_mlp": True, "hidden_act": "silu"}
STEPS = 50
STAGES = [Case(stage, precision, layer=GATED) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
MORE = [
    Case(1, zero={"offload_optimizer": {"device": "cpu"}}),
    Case(3, zero={"sub_group_size": 200}),  # a step in several calls
]


@pytest.fixture(scope="module")
def of_one_process():
    """The weights that one process comes to at stage 0, for any case."""
    cases = [Case(0, layer=layer) for layer in ({}, GATED)]
    cases.append(Case(0, layer=GATED, steps=STEPS, alike=False))
    results = run_processes(muon_worker, 1, cases)[0]

    def expected(case):
        return next(
            weights
            for known, weights in zip(cases, results, strict=True)
            if (known.layer, known.steps) == (case.layer, case.steps)
        )

    return expected


def test_equal_gradients_give_equal_weights_to_the_bit_at_every_stage(of_one_process):
    """Parts of every matrix lie on both processes at stages 1 to 3; at stage 0 each steps half of the matrices.

    The gradients of a bf16 model are equal to the bit among runs of as many processes, whose stage 0 is what others must equal.
    """
    cases = [*STAGES, *MORE]
    results = run_processes(muon_worker, 2, cases)[0]
    in_bf16 = results[cases.index(Case(0, "bf16", layer=GATED))]
    for case, weights in zip(cases, results, strict=True):
        for name, expected in (in_bf16 if case.precision == "bf16" else of_one_process(case)).items():
            assert torch.equal(weights[name], expected), (case, name)


@pytest.mark.parametrize(("processes", "tensor_parallel", "stage"), [(2, 1, 3), (4, 4, 0), (4, 2, 1)])
def test_fifty_steps_of_divided_batches_and_matrices_are_those_of_one_process(
    of_one_process, processes, tensor_parallel, stage
):
    """Four processes hold shares of two key heads; sums of gradients come in another order."""
    case = Case(stage, layer=GATED, steps=STEPS, alike=False)
    (weights,) = run_processes(muon_worker, processes, [case], tensor_parallel)[0]
    for name, expected in of_one_process(case).items():
        torch.testing.assert_close(
            weights[name], expected, rtol=0, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}"
        )
