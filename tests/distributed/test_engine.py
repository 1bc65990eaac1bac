"""Engines of every ZeRO stage against plain PyTorch; gloo on one and two processes."""

import math
from collections.abc import Iterator

import pytest
import torch
from helpers.spawn import PATIENCE_S, run_processes
from helpers.tiny import (
    ACCUMULATION,
    CLIPPING,
    agreement_worker,
    inputs,
    learning_rate,
    stages_worker,
    tiny_config,
    tiny_engine,
    tiny_model,
    tiny_optimizer,
    train,
    whole_weights,
)

from xformer_train.launcher.optim.engine import build_engine, grad_norm, loss_scale, set_learning_rate, skipped_steps
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes

STAGES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def alone() -> Iterator[Topology]:
    quiet(debug=False)
    topology = start_processes(60)
    yield topology
    stop_processes()


def reference(world_size, precision, steps):
    """(loss of rank 0, gradient norm) by step and the final weights, by plain PyTorch in one process.

    Weights and moments are fp32; with bf16 the network sees rounded weights, and its gradients are summed in fp32.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network, masters = tiny_model(dropout=0.0).to(dtype), tiny_model(dropout=0.0)
    for master, weight in zip(masters.parameters(), network.parameters(), strict=True):
        master.data.copy_(weight.data)
    optimizer = tiny_optimizer(masters)
    record = []
    for step in range(steps):
        first_loss = 0.0
        for micro in range(ACCUMULATION):
            for rank in range(world_size):
                x = inputs(step, micro, rank)
                loss = (network(x.to(dtype)).float() - x.flip(1)).square().mean()
                (loss / (ACCUMULATION * world_size)).backward()
                for master, weight in zip(masters.parameters(), network.parameters(), strict=True):
                    gradient, weight.grad = weight.grad.float(), None
                    master.grad = gradient if master.grad is None else master.grad + gradient
                first_loss += loss.item() if rank == 0 else 0.0
        norm = torch.nn.utils.clip_grad_norm_(masters.parameters(), CLIPPING)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        for master, weight in zip(masters.parameters(), network.parameters(), strict=True):
            weight.data.copy_(master.data)
            master.grad = None
        record.append((first_loss, norm.item()))
    return record, [p.detach().float() for p in network.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_building_an_engine_takes_no_step(alone, precision, kind):
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    settings = {"lr": 0.1, "weight_decay": 0.1}
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **settings)
    engine = build_engine(model, optimizer, tiny_config(alone, 0, precision), alone)
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    for old, weight, master in zip(before, engine.module.parameters(), masters, strict=True):
        assert torch.equal(weight, old.to(weight.dtype))
        assert torch.equal(master, weight.float())
    assert not optimizer.state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_0_trains_exactly_as_plain_pytorch(alone, precision):
    engine = tiny_engine(alone, 0, precision, dropout=0.0)
    record, weights = train(engine, alone, 0, 4), whole_weights(engine)
    expected_record, expected_weights = reference(1, precision, 4)
    assert [loss for loss, _ in record] == [loss for loss, _ in expected_record]
    assert [norm for _, norm in record] == pytest.approx([norm for _, norm in expected_record], rel=1e-6)
    for ours, theirs in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7 if precision == "fp32" else 0)


def test_all_stages_on_two_processes_train_as_plain_pytorch_on_the_whole_batch():
    by_rank = run_processes(stages_worker, 2, STAGES)
    for stage, precision in STAGES:
        expected_record, expected_weights = reference(2, precision, 3)
        (record, weights), (_, other_weights) = by_rank[0][stage, precision], by_rank[1][stage, precision]
        # fp32 sums in another order: some units of the last place. In bf16 each partial gradient is rounded to 8 bits.
        tolerance = 1e-6 if precision == "fp32" else 2**-8
        for (loss, norm), (expected_loss, expected_norm) in zip(record, expected_record, strict=True):
            assert loss == pytest.approx(expected_loss, rel=tolerance), (stage, precision)
            assert norm == pytest.approx(expected_norm, rel=tolerance), (stage, precision)
        for ours, other, theirs in zip(weights, other_weights, expected_weights, strict=True):
            assert torch.equal(ours, other), (stage, precision)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_learning_rate_reaches_the_optimizer_at_every_stage(alone, stage, precision):
    engine = tiny_engine(alone, stage, precision)
    before = whole_weights(engine)

    def step(lr):
        set_learning_rate(engine, lr)
        x = inputs(0, 0, 0).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        for _ in range(ACCUMULATION):
            engine.backward(engine(x).float().square().mean())
            engine.step()

    step(0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, whole_weights(engine), strict=True))
    step(0.1)
    assert not any(torch.equal(old, new) for old, new in zip(before, whole_weights(engine), strict=True))


def test_a_step_with_an_infinite_gradient_is_skipped_and_counted(alone):
    engine = tiny_engine(alone, 0, "bf16")
    assert grad_norm(engine) is None
    assert loss_scale(engine) is None
    before = whole_weights(engine)
    for factor in (1.0, math.inf):
        engine.backward(engine(inputs(0, 0, 0).bfloat16()).float().square().mean() * factor)
        engine.step()
    assert skipped_steps(engine) == 1
    assert grad_norm(engine) == math.inf
    assert all(torch.equal(old, new) for old, new in zip(before, whole_weights(engine), strict=True))
    train(engine, alone, 0, 1)
    assert skipped_steps(engine) == 1
    assert 0 < grad_norm(engine) < math.inf


def test_no_clipping_leaves_gradients_as_they_are(alone):
    norms = []
    for clipping in (0.0, 1e9):
        model = tiny_model(dropout=0.0)
        config = tiny_config(alone, 0, "fp32") | {"gradient_clipping": clipping}
        engine = build_engine(model, torch.optim.SGD(model.parameters(), 1.0), config, alone)
        norms.append(train(engine, alone, 0, 2))
    assert norms[0] == norms[1]


def test_processes_agree_on_what_one_of_them_knows_and_do_not_wait_for_ever():
    results = run_processes(agreement_worker, 2)
    error = results[0].pop("error")
    assert "imed out" in error or "imeout" in error
    for rank, known in enumerate(results):
        assert known == {
            "agreed": (False, True, rank == 1),
            "largest": (True, [1, 0.25]),
            "sum": (3.0, rank + 1.0),
            "broadcast": {"rank": 0},
            "gather": [0, 1],
            "timeout": PATIENCE_S,
        }
