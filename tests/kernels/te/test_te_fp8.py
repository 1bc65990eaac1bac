"""te modules under fp8_autocast: which products take part, their state, and what they agree with."""

import pytest
import torch
from helpers.conformance import step
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels import te
from xformer_train.kernels.fp8.linear import Fp8State, fp8_linear
from xformer_train.kernels.fp8.mlp import fp8_mlp
from xformer_train.kernels.ops.norm.residual_norm import norm

DELAYED = te.DelayedScaling(fp8_format=te.Format.HYBRID, amax_history_len=16, amax_compute_algo="max")
RECIPES = [DELAYED, te.Float8CurrentScaling()]
MODULES = {
    "Linear": lambda **o: te.Linear(32, 48, **o),
    "LayerNormLinear": lambda **o: te.LayerNormLinear(32, 48, **o),
    "LayerNormMLP": lambda **o: te.LayerNormMLP(32, 64, **o),
    "TransformerLayer": lambda **o: te.TransformerLayer(
        32, 64, 2, fuse_qkv_params=True, hidden_dropout=0.0, attention_dropout=0.0, **o
    ),
}


class InFp8(torch.nn.Module):
    def __init__(self, module, recipe):
        super().__init__()
        self.module, self.recipe = module, recipe

    def forward(self, x, **kwargs):
        with te.fp8_autocast(enabled=True, fp8_recipe=self.recipe):
            return self.module(x, **kwargs)


def gradients(result):
    return {name.removeprefix("module."): gradient for name, gradient in result[1].items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=["delayed", "current"])
@pytest.mark.parametrize("name", MODULES)
def test_fp8_is_near_high_precision_and_not_equal(name, recipe):
    """Row 15 of the table: rtol .125, atol .0675, here of each tensor's own size: signal to noise above 20 dB."""
    torch.manual_seed(0)
    module = MODULES[name]()
    x = torch.randn(7, 3, 32)
    in_fp8 = InFp8(module, recipe)
    step(in_fp8, x)  # the first step of delayed scaling has scale 1
    expected, ours = step(module, x), step(in_fp8, x)
    for key, theirs in {"output": expected[0], **expected[1]}.items():
        mine = ours[0] if key == "output" else gradients(ours)[key]
        if theirs.norm() < 1e-3 * max(1, len(theirs)):  # the bias of keys has no gradient but rounding
            continue
        noise = (mine - theirs).norm() / theirs.norm()
        assert noise < 0.2, key
    assert not torch.equal(ours[0], expected[0])


def test_a_linear_layer_is_fp8_linear():
    module, x = te.Linear(32, 48), torch.randn(7, 3, 32)
    recipe = te.Float8CurrentScaling()
    out = InFp8(module, recipe)(x)
    with te.fp8_autocast(fp8_recipe=recipe):
        torch.testing.assert_close(out, fp8_linear(x, module.weight, module.bias, Fp8State()), rtol=0, atol=0)
    assert not torch.equal(out, module(x))
    with te.fp8_autocast(), te.fp8_autocast(enabled=False):
        assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight, module.bias))


@pytest.mark.parametrize(("name", "activation"), [("gelu", "gelu_tanh"), ("gelu_erf", "gelu")])
def test_a_feed_forward_half_is_fp8_mlp(name, activation):
    module, x = te.LayerNormMLP(32, 64, activation=name), torch.randn(7, 3, 32)
    torch.nn.init.normal_(module.fc1_bias)
    torch.nn.init.normal_(module.fc2_bias)
    for recipe in RECIPES:
        out = InFp8(module, recipe)(x)
        normalized = norm(x, module.layer_norm_weight, module.layer_norm_bias, eps=1e-5)
        parameters = module.fc1_weight, module.fc1_bias, module.fc2_weight
        with te.fp8_autocast(fp8_recipe=recipe):
            expected = fp8_mlp(normalized, *parameters, activation, Fp8State(), Fp8State())
        assert torch.equal(out, expected + module.fc2_bias)


@pytest.mark.parametrize("name", MODULES)
def test_state_is_in_the_state_dict_only_after_use_and_survives_it(name):
    module, x = MODULES[name](), torch.randn(7, 3, 32)
    plain = set(module.state_dict())
    assert plain == {n for n, _ in module.named_parameters()}
    in_fp8 = InFp8(module, DELAYED)
    step(in_fp8, x)
    state = module.state_dict()
    products = {"Linear": 1, "LayerNormLinear": 1, "LayerNormMLP": 2, "TransformerLayer": 4}[name]
    assert len([key for key in set(state) - plain if key.endswith("amax_history")]) == products
    other = MODULES[name]()
    other.load_state_dict(state)
    torch.testing.assert_close(InFp8(other, DELAYED)(x), in_fp8(x), rtol=0, atol=0)
    other.load_state_dict({key: state[key] for key in plain})  # afresh


@pytest.mark.parametrize("recipe", RECIPES, ids=["delayed", "current"])
@pytest.mark.parametrize("name", MODULES)
def test_recomputed_outside_of_the_region_it_is_the_same(name, recipe):
    x = torch.randn(7, 3, 32)
    first, second = MODULES[name](), MODULES[name]()
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        expected = step(InFp8(first, recipe), x)
        ours = step(Recomputed(InFp8(second, recipe)), x)
    assert torch.equal(ours[0], expected[0])
    for key, gradient in gradients(expected).items():
        assert torch.equal(ours[1].get(f"module.module.{key}", ours[1]["input"]), gradient), key


class Recomputed(torch.nn.Module):
    """Checkpoints inside of the region, so that the recomputation is outside of it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        with te.fp8_autocast(enabled=True, fp8_recipe=self.module.recipe):
            return checkpoint(self.module.module, x, use_reentrant=False)


def test_weights_are_cast_once_for_the_micro_batches_of_a_step():
    module, x = te.Linear(32, 48), torch.randn(5, 32)
    in_fp8 = InFp8(module, te.Float8CurrentScaling())
    in_fp8(x, is_first_microbatch=True)
    kept = module.fp8.weight_cache
    in_fp8(x, is_first_microbatch=False)
    assert module.fp8.weight_cache is kept
    torch.testing.assert_close(in_fp8(x, is_first_microbatch=False), in_fp8(x), rtol=0, atol=0)
    with torch.no_grad():
        module.weight.mul_(2)
    torch.testing.assert_close(
        in_fp8(x, is_first_microbatch=False), in_fp8(x), rtol=0, atol=0
    )  # a stale copy is not used


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_recomputation_takes_the_weight_as_its_own_pass_cast_it(reentrant):
    """Several first micro-batches may wait for their backward; the scale of the weight moves behind the first region."""

    def run(way):
        torch.manual_seed(0)
        module = te.LayerNormMLP(32, 64)
        inputs = [torch.randn(5, 32, requires_grad=True) for _ in range(6)]
        outputs = []
        for first, x in zip((True, False, True, False, True), inputs, strict=False):
            with te.fp8_autocast(fp8_recipe=DELAYED):
                outputs.append(way(module, x, is_first_microbatch=first))
        for y in outputs:
            y.square().sum().backward()
        with te.fp8_autocast(fp8_recipe=DELAYED):  # the kept copy is the latest's still
            outputs.append(module(inputs[-1], is_first_microbatch=False))
        gradients = [x.grad for x in inputs[:-1]] + [parameter.grad for parameter in module.parameters()]
        return outputs + gradients + list(module.state_dict().values())

    def checkpointed(module, x, **kwargs):
        return te.checkpoint(module, x, use_reentrant=reentrant, **kwargs)

    for ours, expected in zip(run(checkpointed), run(lambda module, *a, **k: module(*a, **k)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("flags", [(True, False), (True, False, False)])
def test_torchs_checkpoint_takes_the_kept_weight(flags):
    """It knows the latest pass alone, whose kept weight is the first's; the input's gradient has no other scale of then."""

    def run(way):
        torch.manual_seed(0)
        module = te.Linear(32, 48)
        inputs = [torch.randn(5, 32, requires_grad=True) for _ in flags]
        outputs = []
        for x, first in zip(inputs, flags, strict=True):
            with te.fp8_autocast(fp8_recipe=DELAYED):
                outputs.append(way(lambda x, first=first: module(x, is_first_microbatch=first), x))
        for y in outputs:
            y.square().sum().backward()
        return [x.grad for x in inputs]

    ours = run(lambda function, x: checkpoint(function, x, use_reentrant=False))
    for mine, expected in zip(ours, run(lambda function, x: function(x)), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("name", MODULES)
def test_main_grad_in_fp8(name):
    fused, plain = MODULES[name](fuse_wgrad_accumulation=True), MODULES[name]()
    plain.load_state_dict(fused.state_dict())
    for parameter in fused.parameters():
        parameter.main_grad = torch.full_like(parameter, torch.nan)
    for i, x in enumerate(torch.randn(2, 5, 3, 32)):
        InFp8(fused, None)(x, is_first_microbatch=i == 0).square().sum().backward()
        InFp8(plain, None)(x, is_first_microbatch=i == 0).square().sum().backward()
    for (key, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.main_grad if ours.ndim == 2 else ours.grad, theirs.grad, msg=key)


@pytest.mark.parametrize("name", MODULES)
def test_current_scaling_compiles_without_a_graph_break(name):
    torch.compiler.reset()  # its limit of recompilations counts those of other tests
    module, x = MODULES[name](), torch.randn(7, 3, 32)
    in_fp8 = InFp8(module, te.Float8CurrentScaling())
    compiled = torch.compile(in_fp8, fullgraph=True, backend="aot_eager")
    expected, ours = step(in_fp8, x), step(compiled, x)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1]["input"], expected[1]["input"], rtol=1e-4, atol=1e-4)


def test_sizes_fp8_cannot_take_are_one_clear_error():
    with te.fp8_autocast(), pytest.raises(ValueError, match="in_features is 24"):
        te.Linear(24, 32)(torch.randn(2, 24))
