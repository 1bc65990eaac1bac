"""A swapped model in DeepSpeed's engines: its steps are those of the stock model, under the stock model's names."""

import pytest
import torch
from distributed.hf_models import MODELS
from distributed.shard_engine_worker import CLIPPING, REPLICAS, STEPS, loss_of, optimizer_of
from distributed.spawn import run_processes
from distributed.swap_engine_worker import worker

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 2, STAGES)


@pytest.fixture(scope="module")
def stock():
    """Gradient norms and final weights of the same steps on the batches of both replicas, without DeepSpeed."""
    model = MODELS["bert"].build()
    optimizer = optimizer_of(model)
    norms = []
    for step in range(STEPS):
        for replica in range(REPLICAS):
            (loss_of(model, step, replica) / REPLICAS).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, model.state_dict()


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
