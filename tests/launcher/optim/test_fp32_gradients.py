"""Gradients of many micro-batches in bf16 add up in fp32 at every ZeRO stage; one process."""

import pytest
import torch
from helpers.tiny import tiny_config

from xformer_train.launcher.optim.engine import build_engine, grad_norm, skipped_steps, step_was_skipped
from xformer_train.launcher.optim.fp32_gradients import with_fp32_sums
from xformer_train.launcher.optim.slices import slices_of
from xformer_train.launcher.processes.topology import quiet, start_processes, stop_processes

quiet(debug=False)

MICRO_BATCHES = 1024
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


@pytest.fixture(scope="module")
def alone():
    topology = start_processes(60)
    yield topology
    stop_processes()


class Weights(torch.nn.Module):
    """Two vectors, one of which may take no part; the gradient of a weight is the mean over the batch of what it meets."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.ones(3))

    def forward(self, x, with_second):
        loss = (x[:, :5] * self.first).float().sum(1).mean()
        return loss + (x[:, 5:] * self.second).float().sum(1).mean() if with_second else loss


def engine_of(topology, stage, clipping=0.0, micro_batches=MICRO_BATCHES):
    model = Weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sizes = {"train_batch_size": 3 * micro_batches, "gradient_accumulation_steps": micro_batches}
    others = {"gradient_clipping": clipping, "zero_allow_untested_optimizer": True}
    return build_engine(model, optimizer, tiny_config(topology, stage, "bf16") | sizes | others, topology)


def batches(count=MICRO_BATCHES):
    """One large term and then many small ones, each of which bf16 would lose, and its exact mean per column."""
    rows = torch.full((count, 3, 8), 2.0**-9)
    rows[0] = 2.0
    return rows, rows.double().mean((0, 1)).float()


def step(engine, rows, with_second=True):
    for micro in rows:
        engine.backward(engine(micro.bfloat16(), with_second))
        engine.step()


def fp32_weights(engine):
    """What the optimizer steps, in fp32, at any stage of one process."""
    weights = [torch.empty(5), torch.empty(3)]
    for each in slices_of(engine, {id(engine.module.first): 0, id(engine.module.second): 1}):
        for place, start, offset, numel in each.segments:
            weights[place][offset : offset + numel] = each.tensor.detach().view(-1)[start : start + numel]
    return weights


@STAGES
def test_no_term_is_lost_and_the_norm_is_that_of_the_exact_sum(alone, stage):
    engine, (rows, mean) = engine_of(alone, stage), batches()
    step(engine, rows)
    assert grad_norm(engine) == pytest.approx(float(mean.norm()), rel=1e-5)
    weights = fp32_weights(engine)
    torch.testing.assert_close(weights[0], -mean[:5], rtol=1e-5, atol=0)
    torch.testing.assert_close(weights[1], 1 - mean[5:], rtol=1e-6, atol=0)
    torch.testing.assert_close(engine.module.second.detach().float(), (1 - mean[5:]).bfloat16().float())


@STAGES
def test_clipping_scales_the_exact_sum_and_the_next_step_begins_from_nothing(alone, stage):
    engine, (rows, mean) = engine_of(alone, stage, clipping=0.25 * float(batches()[1].norm())), batches()
    step(engine, rows)
    step(engine, rows)
    assert grad_norm(engine) == pytest.approx(float(mean.norm()), rel=1e-5)
    torch.testing.assert_close(fp32_weights(engine)[0], -0.5 * mean[:5], rtol=1e-4, atol=0)


@STAGES
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out_whole(alone, stage):
    engine, (rows, mean) = engine_of(alone, stage, micro_batches=4), batches(4)
    bad = rows.clone()
    bad[1, 0, 2] = float("nan")
    step(engine, bad)
    assert step_was_skipped(engine) and skipped_steps(engine) == 1
    step(engine, rows)
    assert not step_was_skipped(engine) and skipped_steps(engine) == 1
    torch.testing.assert_close(fp32_weights(engine)[0], -mean[:5], rtol=1e-5, atol=0)


@STAGES
def test_a_weight_that_takes_no_part_stays_and_one_that_does_in_some_micro_batches_counts_those(alone, stage):
    engine, (rows, mean) = engine_of(alone, stage, micro_batches=4), batches(4)
    step(engine, rows, with_second=False)
    for number, micro in enumerate(rows):
        engine.backward(engine(micro.bfloat16(), number == 0))
        engine.step()
    weights = fp32_weights(engine)
    torch.testing.assert_close(weights[0], -2 * mean[:5], rtol=1e-5, atol=0)
    torch.testing.assert_close(weights[1], torch.full((3,), 1 - 2.0 / 4), rtol=1e-5, atol=0)


def test_what_processes_send_each_other_is_fp32_unless_it_is_given():
    bf16 = {"bf16": {"enabled": True}, "data_types": {"keep_in_fp32_modules": ["norm"]}}
    found = with_fp32_sums(bf16, 2)
    assert found["data_types"] == {"keep_in_fp32_modules": ["norm"], "grad_accum_dtype": "fp32"}
    assert found["communication_data_type"] == "fp32"
    given = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}
    found = with_fp32_sums({**bf16, **given}, 0)
    assert (found["communication_data_type"], found["data_types"]["grad_accum_dtype"]) == ("bf16", None)
    assert with_fp32_sums({"bf16": {"enabled": False}}, 1) == {"bf16": {"enabled": False}}
