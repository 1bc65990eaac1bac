"""FP8 regions and delayed scaling: scales step by step, nesting, recomputation, state dicts, reduction over processes."""

import copy
import io
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels.fp8.linear import (
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    Fp8State,
    fp8_autocast,
    fp8_linear,
    is_fp8_enabled,
)
from xformer_train.kernels.ops.region import active_region

K = N = 16
NAMES = ("input", "weight", "grad_output")
LARGEST = {"input": 448, "weight": 448, "grad_output": 57344}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K) / 4)
        self.fp8 = Fp8State()

    def forward(self, x, is_first_microbatch=None):
        return fp8_linear(x, self.weight, None, self.fp8, is_first_microbatch=is_first_microbatch)


class SimulatedSlot:
    """Delayed scaling of one tensor, in fp32 scalars."""

    def __init__(self, length, largest):
        self.history, self.scale, self.largest = [np.float32(0)] * length, np.float32(1), np.float32(largest)

    def step(self, amax, algorithm, margin):
        self.history[0] = np.float32(amax)
        if algorithm == "most_recent":
            amax = self.history[0]
        else:
            amax = np.float32(math.nan) if any(np.isnan(self.history)) else max(self.history)
        if amax > 0 and np.isfinite(amax):
            with np.errstate(over="ignore"):
                scale = self.largest / amax / np.float32(2**margin)
            self.scale = min(scale, np.finfo(np.float32).max)
        self.history = self.history[1:] + self.history[:1]
        self.history[0] = np.float32(0)


def with_amax(rows, amax, seed):
    """(rows, 16), whose largest magnitude is amax, sometimes negative."""
    values = torch.rand(rows, 16, generator=torch.Generator().manual_seed(seed)) - 0.5
    values = values * (amax if math.isfinite(amax) else 1.0)
    values[seed % rows, 3] = -amax if seed % 2 else amax
    return values


def assert_state(state, slots):
    saved = state.state_dict()
    assert saved["scale"].tolist() == [slots[name].scale for name in NAMES]
    expected = torch.tensor(np.array([slots[name].history for name in NAMES])).t()
    torch.testing.assert_close(saved["amax_history"], expected, rtol=0, atol=0, equal_nan=True)


AMAXES = {
    "input": (1.5, 0.0, 2e-41, 3.25, math.inf, 700.0, math.nan, 0.7, 1e30, 4e-5),
    "weight": (0.3, 0.31, 0.0, 2e-40, 5.0, 1e-3, 0.2),
    "grad_output": (1e-3, 0.0, 1e-42, math.nan, 2e-4, 6e4, math.inf, 9.0, 1e-6),
}


@pytest.mark.parametrize("length", [1, 16, 31])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
def test_scales_follow_the_simulation_for_forty_steps(length, algorithm, margin):
    """Bit for bit. The weight's history stands still while its FP8 copy is used again."""
    recipe = DelayedScaling(amax_history_len=length, amax_compute_algo=algorithm, margin=margin)
    layer, slots = Layer(), {name: SimulatedSlot(length, LARGEST[name]) for name in NAMES}
    for step in range(40):
        is_first = (None, True, False, False, None)[step % 5]
        amaxes = {name: values[step % len(values)] for name, values in AMAXES.items()}
        if is_first is not False:
            with torch.no_grad():
                layer.weight.copy_(with_amax(N, amaxes["weight"], step))
        scales = {name: float(slot.scale) for name, slot in slots.items()}
        x = with_amax(7, amaxes["input"], step).requires_grad_()
        with fp8_autocast(fp8_recipe=recipe):
            y = layer(x, is_first)
        for name in ("input", "weight") if is_first is not False else ("input",):
            slots[name].step(amaxes[name], algorithm, margin)
        assert_state(layer.fp8, slots)
        if is_first is not False and all(map(math.isfinite, amaxes.values())):  # the scales before this step were used
            expected = emulated(x, layer.weight, scales)
            atol = (
                1e-37 + 1e-6 * expected.abs().max().item()
            )  # a sum's rounding; below 1e-37 fp32 runs out of exponents
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=atol)
        y.backward(with_amax(7, amaxes["grad_output"], step + 1))
        slots["grad_output"].step(amaxes["grad_output"], algorithm, margin)
        assert_state(layer.fp8, slots)


def emulated(x, weight, scales):
    def rounded(tensor, scale):
        return (tensor.detach() * scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() / scale

    return (rounded(x, scales["input"]) @ rounded(weight, scales["weight"]).t()).float()


def scales_after(recipe, amaxes):
    """The input's scale after steps with these amaxes."""
    layer = Layer()
    for amax in amaxes:
        with fp8_autocast(fp8_recipe=recipe):
            layer(with_amax(3, amax, 0))
    return layer.fp8.state_dict()["scale"][0].item()


def test_interval_counts_from_the_first_step():
    recipe = DelayedScaling(interval=3)
    assert [scales_after(recipe, (1.0, 2.0, 4.0, 8.0)[:n]) for n in (1, 2, 3, 4)] == [448, 448, 448, 56]


def test_algorithms_may_be_functions():
    recipe = DelayedScaling(amax_history_len=4, amax_compute_algo=lambda history: history.sum(0))
    assert scales_after(recipe, (1.0, 2.0)) == pytest.approx(448 / 3)

    def factor(amax, scale, fp8_max, recipe):
        assert recipe.margin == 1 and fp8_max == 448
        return scale + amax

    assert scales_after(DelayedScaling(margin=1, scaling_factor_compute_algo=factor), (1.0, 2.0)) == 4


def test_the_first_step_is_saved_by_the_clamp():
    layer, x = Layer(), torch.full((2, K), 1e6)
    with fp8_autocast(fp8_recipe=DelayedScaling()):
        first = layer(x)
    with fp8_autocast(fp8_recipe=DelayedScaling()):
        second = layer(x)
    assert first.isfinite().all()
    torch.testing.assert_close(second, layer(x), rtol=0.1, atol=0.1 * second.abs().max().item())


def test_a_longer_history_keeps_what_is_known():
    layer, x = Layer(), torch.ones(1, K)
    for step, length in enumerate((4, 4, 4, 4, 6, 3, 1, 2)):
        with fp8_autocast(fp8_recipe=DelayedScaling(amax_history_len=length)):
            layer(x * (step + 1))
        history = layer.fp8.state_dict()["amax_history"][:, 0].tolist()
        assert history == {0: [0, 0, 0, 1], 3: [0, 2, 3, 4], 4: [0, 0, 2, 3, 4, 5]}.get(step, history)
        assert len(history) == length
    assert history == [0, 8]


def test_the_innermost_region_decides_and_the_outermost_updates():
    layer, other, x = Layer(), Layer(), torch.randn(4, K)
    recipe = DelayedScaling(fp8_format=Format.E4M3)
    assert not is_fp8_enabled()
    with fp8_autocast(enabled=False):
        with fp8_autocast(fp8_recipe=recipe):
            assert is_fp8_enabled() and active_region().recipe is recipe
            with fp8_autocast(enabled=False):
                assert not is_fp8_enabled()
                wide = layer(x)
            narrow = layer(x)
            with fp8_autocast():
                assert active_region().recipe == Float8CurrentScaling()
                other(x)
        assert layer.fp8.state_dict()["scale"].tolist() == [1, 1, 1]
        assert not is_fp8_enabled()
    assert layer.fp8.state_dict()["scale"][0].item() == pytest.approx(448 / x.abs().max().item())
    assert not torch.equal(wide, narrow)
    assert not other.fp8.state_dict()


def test_a_layer_that_is_used_twice_counts_once():
    layer = Layer()
    with fp8_autocast(fp8_recipe=DelayedScaling(amax_history_len=3)):
        y = layer(torch.full((2, K), 5.0)) + layer(torch.full((2, K), -3.0))
    assert layer.fp8.state_dict()["amax_history"][:, 0].tolist() == [0, 0, 5]
    y.sum().backward()
    assert layer.fp8.state_dict()["amax_history"][:, 2].tolist() == [0, 0, 1]
    assert layer.fp8.state_dict()["updates"].tolist() == [1, 1, 1]


def test_evaluations_and_failed_passes_leave_the_scales_alone():
    layer, x = Layer(), torch.randn(4, K)
    with torch.no_grad(), fp8_autocast(fp8_recipe=DelayedScaling()):
        layer(x)
    with pytest.raises(RuntimeError, match="broken"), fp8_autocast(fp8_recipe=DelayedScaling()):
        layer(x)
        raise RuntimeError("broken")
    assert layer.fp8.state_dict()["updates"].tolist() == [0, 0, 0]
    assert active_region() is None


def test_a_trace_from_outside_of_a_region_is_not_taken_inside_the_first_region_of_a_thread():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + 1 if is_fp8_enabled() else x, backend="eager", fullgraph=True)

    def trace():
        outside = compiled(torch.zeros(1)).item()
        with fp8_autocast():
            return outside, compiled(torch.zeros(1)).item()

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(trace).result() == (0, 1)


def test_calibrating_records_in_high_precision():
    layer, x = Layer(), torch.randn(4, K)
    with fp8_autocast(enabled=False, calibrating=True, fp8_recipe=DelayedScaling()):
        # FP8 would be off by percents; `@` and `linear` may add in another order
        torch.testing.assert_close(layer(x), x @ layer.weight.t())
    expected = [448 / x.abs().max().item(), 448 / layer.weight.abs().max().item(), 1]
    assert layer.fp8.state_dict()["scale"].tolist() == pytest.approx(expected)


def three_steps(wrap, recipe, region_inside=False):
    """Outputs, gradients and states of three steps of two layers; wrap(function, x) is function(x), perhaps recomputed."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), nn.GELU(), Layer())

    def in_region(x):
        with fp8_autocast(fp8_recipe=recipe):
            return model(x)

    seen = []
    for step in range(3):
        x = ((step + 1) ** 3 * torch.randn(5, K)).requires_grad_()
        if region_inside:
            y = wrap(in_region, x)
        else:
            with fp8_autocast(fp8_recipe=recipe):
                y = wrap(model, x)
        model.zero_grad()
        (y * torch.randn(5, N)).sum().backward()
        seen += [y.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
        seen += [tensor.clone() for name, tensor in model.state_dict().items() if "fp8" in name]
    return seen


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("region_inside", [True, False])
@pytest.mark.parametrize(
    "recipe", [Float8CurrentScaling(), DelayedScaling(amax_history_len=2, amax_compute_algo="max")]
)
def test_recomputation_changes_nothing(reentrant, region_inside, recipe):
    """Amplitudes grow from step to step, so newer scales would give other FP8 numbers."""
    kept = three_steps(lambda function, x: function(x), recipe, region_inside)
    again = three_steps(lambda function, x: checkpoint(function, x, use_reentrant=reentrant), recipe, region_inside)
    assert len(kept) == len(again)
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


def test_a_pass_in_high_precision_is_recomputed_in_high_precision():
    layer, x = Layer(), torch.randn(3, K, requires_grad=True)
    with fp8_autocast():
        layer(x).sum().backward()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    for reentrant in (True, False):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        x.grad = None
        y.square().sum().backward()
        assert torch.equal(x.grad, expected)


def used_layer(recipe):
    layer = Layer()
    for scale in (1, 10, 3):
        with fp8_autocast(fp8_recipe=recipe):
            y = layer(scale * torch.randn(4, K))
        (scale * y).sum().backward()
    return layer


def test_state_dicts_hold_the_scales_only_after_delayed_scaling():
    assert list(used_layer(Float8CurrentScaling()).state_dict()) == ["weight"]
    recipe = DelayedScaling(amax_history_len=3)
    layer = used_layer(recipe)
    saved = layer.state_dict()
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items() if name != "weight"}
    assert shapes == {
        "fp8.scale": ((3,), torch.float32),
        "fp8.amax_history": ((3, 3), torch.float32),
        "fp8.updates": ((3,), torch.int64),
    }
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = Layer()
    fresh.load_state_dict(loaded)
    x = 5 * torch.randn(4, K)
    for model in (layer, fresh):
        model.zero_grad()
        with fp8_autocast(fp8_recipe=recipe):
            y = model(x)
        y.sum().backward()
    assert torch.equal(layer.weight.grad, fresh.weight.grad)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])
    del loaded["fp8.scale"], loaded["fp8.amax_history"], loaded["fp8.updates"]
    fresh.load_state_dict(loaded)
    assert list(fresh.state_dict()) == ["weight"]


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"fp8.scale": None},
        {"fp8.amax_history": None},
        {"fp8.updates": None},
        {"fp8.scale": None, "fp8.updates": None},
        {"fp8.scale": torch.ones(2)},
        {"fp8.amax_history": torch.ones(3)},
        {"fp8.amax_history": torch.ones(0, 3)},
        {"fp8.updates": torch.ones(())},
        {"fp8.scale": 1.0},
    ],
)
def test_a_state_with_a_field_missing_or_of_another_shape_is_refused_when_it_is_loaded(changes, used):
    saved = used_layer(DelayedScaling(amax_history_len=3)).state_dict()
    saved = {name: value for name, value in (saved | changes).items() if value is not None}
    layer = used_layer(DelayedScaling()) if used else Layer()
    with pytest.raises(
        RuntimeError, match=r"fp8 has an FP8 state of the shapes .*, must have scale \(3,\), amax_history"
    ):
        layer.load_state_dict(saved)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casts_of_the_layer_leave_scales_in_fp32(cast):
    layer = used_layer(DelayedScaling(amax_history_len=3))
    before = {name: tensor.clone() for name, tensor in layer.fp8.state_dict().items()}
    getattr(layer, cast)()
    assert layer.weight.dtype != torch.float32
    after = layer.fp8.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_copies_and_devices():
    layer = used_layer(DelayedScaling())
    same = copy.deepcopy(layer)
    with fp8_autocast(fp8_recipe=DelayedScaling()):
        layer(torch.full((1, K), 50.0))
    assert same.state_dict()["fp8.scale"][0] != layer.state_dict()["fp8.scale"][0]
    assert not layer.to("meta").fp8.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fp8_format": Format.E5M2}, "fp8_format is Format.E5M2; it must be Format.HYBRID or Format.E4M3"),
        ({"override_linear_precision": (True, False, False)}, r"override_linear_precision is \(True, False, False\)"),
        ({"margin": -1}, "margin is -1; it must be a whole number, 0 or more"),
        ({"margin": 0.5}, "margin is 0.5"),
        ({"interval": 0}, "interval is 0; it must be a whole number, 1 or more"),
        ({"amax_history_len": True}, "amax_history_len is True"),
        ({"amax_compute_algo": "mean"}, "amax_compute_algo is 'mean'; it must be 'max', 'most_recent' or a function"),
        ({"scaling_factor_compute_algo": 3}, "scaling_factor_compute_algo is 3; it must be a function or None"),
    ],
)
def test_recipes_refuse_what_does_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        DelayedScaling(**arguments)


def test_regions_refuse_what_is_no_recipe():
    with pytest.raises(ValueError, match="fp8_recipe is 'hybrid'"), fp8_autocast(fp8_recipe="hybrid"):
        pass
    with pytest.raises(ValueError, match="the recipe is named fp8_recipe"), fp8_autocast(True, DelayedScaling()):
        pass
    with pytest.raises(ValueError, match=r"fp8_format is Format\.E5M2"):
        Float8CurrentScaling(fp8_format=Format.E5M2)
    assert active_region() is None
