"""The mean of the weights at each ZeRO stage against one that is computed by hand; gloo on two processes."""

import pytest
import torch
from distributed.workers.ema import BAD_STEP, DECAY, STEPS, ema_worker
from helpers.spawn import run_processes
from helpers.tiny import WIDTH, tiny_model

CASES = [
    *((stage, precision, "adamw", {}) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)),
    *((stage, "fp32", kind, {}) for kind in ("lamb", "muon") for stage in (0, 2, 3)),
    *((stage, "bf16", "adamw", {"offload_optimizer": {"device": "cpu"}}) for stage in (1, 2, 3)),
    (3, "fp32", "adamw", {"sub_group_size": 50}),  # a step in several calls
    (3, "bf16", "adamw", {"stage3_param_persistence_threshold": 0}),  # each parameter is gathered where it is used
]


@pytest.fixture(scope="module", params=[1, 2])
def results(request):
    """The results of the first process by case, in a run of so many processes."""
    return run_processes(ema_worker, request.param, CASES)[0]


def test_the_mean_is_that_of_the_fp32_weights_after_each_step(results):
    """One step has no finite gradient: it moves neither weights nor mean."""
    for case, result in zip(CASES, results, strict=True):
        assert result["skipped"] == [step == BAD_STEP for step in range(STEPS)], case
        mean = [weight.double() for weight in result["weights"][0]]
        for weights, skipped in zip(result["weights"][1:], result["skipped"], strict=True):
            if not skipped:
                mean = [DECAY * m + (1 - DECAY) * w.double() for m, w in zip(mean, weights, strict=True)]
        for ours, theirs in zip(result["mean"], mean, strict=True):
            torch.testing.assert_close(
                ours.double(), theirs, rtol=0, atol=1e-7, msg=lambda t, case=case: f"{case}: {t}"
            )
        assert not any(map(torch.equal, result["mean"], result["weights"][-1])), case


def test_a_model_computes_with_the_mean_in_its_precision_and_gets_its_weights_back(results):
    for case, result in zip(CASES, results, strict=True):
        dtype = torch.bfloat16 if case[1] == "bf16" else torch.float32
        network = tiny_model(dropout=0.0).to(dtype).eval()
        with torch.no_grad():
            for parameter, mean in zip(network.parameters(), result["mean"], strict=True):
                parameter.copy_(mean.view_as(parameter))
            expected = network(torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH).to(dtype)).float()
        for ours, parameter in zip(result["model"], network.parameters(), strict=True):
            assert torch.equal(ours, parameter.float()), case
        assert torch.equal(result["output"], expected), case
        assert result["put back"], case
