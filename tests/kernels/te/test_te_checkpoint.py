"""te.checkpoint: what is computed again equals the first pass bit for bit, and leaves no trace in any state."""

import copy

import pytest
import torch
from saved_activations import count_saved_bytes
from torch import nn

from xformer_train.kernels import te
from xformer_train.kernels.ops.region import active_region
from xformer_train.kernels.te.rng_tracker import RngStatesTracker

DELAYED = te.DelayedScaling(amax_history_len=3, amax_compute_algo="max")
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
RECIPES = pytest.mark.parametrize("recipe", [DELAYED, te.Float8CurrentScaling()], ids=["delayed", "current"])
LAYERS = {
    "gpt": {"fuse_qkv_params": True},
    "bert": {
        "output_layernorm": True,
        "apply_residual_connection_post_layernorm": True,
        "self_attn_mask_type": "padding",
    },
    "drop_path": {"drop_path_rate": 0.5},
}


def layer_of(**options):
    torch.manual_seed(0)
    return te.TransformerLayer(32, 64, 2, **options)


def plainly(function, *args, **kwargs):
    return function(*args, **kwargs)


def keeping(reentrant):
    return lambda function, *args, **kwargs: te.checkpoint(function, *args, use_reentrant=reentrant, **kwargs)


def first_form(function, *args, **kwargs):
    return te.checkpoint(function, False, None, None, *args, **kwargs)


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def step(run, module, x):
    """Output, gradients and the random numbers behind them of one step; run(module, x) is module(x)."""
    torch.manual_seed(5)
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = run(module, x)
    after_forward = torch.rand(4)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype))
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    numbers = {"rng after forward": after_forward, "rng after backward": torch.rand(4)}
    return {"output": out.detach(), "input": x.grad, **gradients, **numbers}


@pytest.mark.parametrize("way", [keeping(True), keeping(False), first_form], ids=["reentrant", "not", "first form"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_full_recomputation_equals_none(options, dtype, way):
    """Row 8 of the table, 1e-3 there; with dropout here, and equal, as the same operators run on the same numbers."""
    layer, x = layer_of(params_dtype=dtype, **options), torch.randn(6, 3, 32, dtype=dtype)
    expected, ours = step(plainly, layer, x), step(way, layer, x)
    assert_equal(ours, expected)
    assert not torch.equal(expected["output"], layer(x)), "dropout is on"


@REENTRANT
def test_checkpoints_nest(reentrant):
    layers, x, recompute = nn.ModuleList([layer_of(), layer_of()]), torch.randn(5, 2, 32), keeping(reentrant)

    class Stack(nn.Module):
        def __init__(self, run):
            super().__init__()
            self.layers, self.run = layers, run

        def forward(self, x):
            for layer in self.layers:
                x = self.run(layer, x)
            return nn.functional.dropout(x, 0.3)

    assert_equal(step(recompute, Stack(recompute), x), step(plainly, Stack(plainly), x))


@REENTRANT
def test_torch_autocast_is_as_in_the_first_pass(reentrant):
    layer, x = layer_of(), torch.randn(5, 2, 32)

    def under_autocast(run):
        def forward(module, x):
            with torch.autocast("cpu", torch.bfloat16):
                return run(module, x)

        return step(forward, layer, x)

    ours = under_autocast(keeping(reentrant))
    assert_equal(ours, under_autocast(plainly))
    assert ours["output"].dtype == torch.bfloat16


@REENTRANT
@pytest.mark.parametrize("forked", [False, True], ids=["not in a fork", "in a fork"])
@pytest.mark.parametrize("backward_forked", [False, True], ids=["backward not", "backward in a fork"])
def test_the_tracker_is_as_in_the_first_pass(reentrant, forked, backward_forked):
    tracker, seen = RngStatesTracker("cpu"), []

    def function(x):
        seen.append(tracker.active)
        x = nn.functional.dropout(x, 0.5)
        with tracker.fork():
            x = x * nn.functional.dropout(x.sin(), 0.5)
        return nn.functional.dropout(x, 0.5)

    def run(way):
        torch.manual_seed(0)
        tracker.reset()
        tracker.add("model-parallel-rng", 3)
        tracker.add("other", 4)
        x = torch.linspace(-1, 1, 64, requires_grad=True)
        if forked:
            with tracker.fork():
                y = way(function, x)
        else:
            y = way(function, x)
        if backward_forked:
            with tracker.fork("other"):
                y.square().sum().backward()
                torch.rand(3)
        else:
            y.square().sum().backward()
        assert tracker.active is None
        return {"output": y, "gradient": x.grad, "default": torch.get_rng_state(), **tracker.get_states()}

    expected = run(plainly)
    ours = run(lambda *args: te.checkpoint(*args, get_rng_state_tracker=lambda: tracker, use_reentrant=reentrant))
    assert_equal(ours, expected)
    assert seen == ["model-parallel-rng" if forked else None] * 3


def test_a_tracker_that_knows_only_its_states_will_do():
    class Tracker:
        states = torch.zeros(1)

        def get_states(self):
            return self.states.clone()

        def set_states(self, states):
            self.states = states

    tracker, seen = Tracker(), []

    def function(x):
        tracker.states = tracker.states + 1
        seen.append(tracker.states.item())
        return x.sin()

    y = te.checkpoint(function, torch.ones(2, requires_grad=True), get_cuda_rng_tracker=lambda: tracker)
    tracker.states = torch.full((1,), 9.0)
    y.sum().backward()
    assert seen == [1, 1] and tracker.states.item() == 9


class InFp8(nn.Module):
    """Two layers in a region; the checkpoint stands in it or around it."""

    def __init__(self, recipe, run, region_inside, shared=False):
        super().__init__()
        torch.manual_seed(0)
        first = te.LayerNormMLP(32, 64)
        self.layers = nn.ModuleList([first, first if shared else te.LayerNormMLP(32, 64)])
        self.recipe, self.run, self.region_inside = recipe, run, region_inside

    def forward(self, x):
        if self.region_inside:
            for layer in self.layers:
                x = self.run(self.in_region, layer, x)
            return x
        return self.in_region(lambda x: [x := self.run(layer, x) for layer in self.layers][-1], x)

    def in_region(self, function, x):
        with te.fp8_autocast(fp8_recipe=self.recipe):
            return function(x)

    def fp8_state(self):
        return {name: tensor.clone() for name, tensor in self.state_dict().items() if ".fp8" in name or "_fp8" in name}


def fp8_steps(module):
    """After every forward and every backward pass of three steps: state, output, gradients. Amplitudes grow."""
    seen = {}
    for number in range(3):
        x = ((number + 1) ** 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(number))).requires_grad_()
        module.zero_grad()
        y = module(x)
        seen |= {f"{number} {name} after forward": tensor for name, tensor in module.fp8_state().items()}
        y.square().sum().backward()
        seen |= {f"{number} {name} after backward": tensor for name, tensor in module.fp8_state().items()}
        seen |= {f"{number} {name}": p.grad.clone() for name, p in module.named_parameters()}
        seen |= {f"{number} output": y.detach(), f"{number} input": x.grad}
    return seen


@REENTRANT
@RECIPES
@pytest.mark.parametrize("region_inside", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_fp8_state_is_step_by_step_that_of_a_run_without_checkpoints(reentrant, recipe, region_inside, shared):
    """Bit for bit; the table has rtol .125. A layer in two checkpoints of one region counts once in both directions."""
    expected = fp8_steps(InFp8(recipe, plainly, region_inside, shared))
    ours = fp8_steps(InFp8(recipe, keeping(reentrant), region_inside, shared))
    assert_equal(ours, expected)
    assert any("amax_history" in name for name in expected) == (recipe is DELAYED)


@REENTRANT
@RECIPES
@pytest.mark.parametrize("region_inside", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_passes_in_regions_of_their_own_before_their_backward_passes(reentrant, recipe, region_inside, nested):
    """Each takes its own scales again, and a pass in high precision stays so; torch.utils.checkpoint mixes them up."""
    way = keeping(reentrant)
    twice = (lambda function, *args: way(lambda *a: way(function, *a), *args)) if nested else way

    def run(run):
        module = InFp8(recipe, run, region_inside)
        inputs = [(10.0**number * torch.ones(5, 32)).requires_grad_() for number in range(4)]
        inputs = [(x + torch.randn(5, 32, generator=torch.Generator().manual_seed(1))).detach() for x in inputs]
        inputs = [x.requires_grad_() for x in inputs]
        outputs = [module(x) for x in inputs[:2]] + [run(module.layers[0], inputs[2])] + [module(inputs[3])]
        for y in outputs:
            y.square().sum().backward()
        gradients = {f"gradient {number}": x.grad for number, x in enumerate(inputs)}
        return gradients | module.fp8_state() | {name: p.grad for name, p in module.named_parameters()}

    assert_equal(run(twice), run(plainly))


@REENTRANT
def test_the_region_is_as_in_the_first_pass(reentrant):
    seen = []

    def function(x):
        seen.append(active_region())
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    with te.fp8_autocast(fp8_recipe=DELAYED):
        y = keeping(reentrant)(function, x)
    z = keeping(reentrant)(function, x)
    with te.fp8_autocast(enabled=False):
        (y + z).backward()
        assert not active_region().enabled
    assert active_region() is None
    assert [region and region.recipe for region in seen[:2]] == [DELAYED, None]
    assert sorted(map(id, seen[2:])) == sorted(map(id, seen[:2]))


@REENTRANT
def test_backward_inside_of_the_region_counts_once(reentrant):
    def run(way):
        module, x = te.Linear(32, 32, init_method=nn.init.ones_), torch.ones(2, 32, requires_grad=True)
        with te.fp8_autocast(fp8_recipe=DELAYED):
            way(module, x).sum().backward()
        return module.fp8.state_dict()

    assert_equal(run(keeping(reentrant)), run(plainly))


@REENTRANT
def test_a_graph_that_is_kept_is_computed_again_each_time(reentrant):
    def run(way):
        torch.manual_seed(0)
        module, x = te.Linear(32, 32), torch.randn(4, 32, requires_grad=True)
        with te.fp8_autocast(fp8_recipe=DELAYED):
            y = nn.functional.dropout(way(module, x), 0.5).sum()
        y.backward(retain_graph=True)
        y.backward()
        return {"x": x.grad, "weight": module.weight.grad, **module.fp8.state_dict()}

    assert_equal(run(keeping(reentrant)), run(plainly))


@REENTRANT
def test_arguments_and_results_of_every_kind(reentrant):
    def function(x, factor, parts, *, shift, mask=None, debug_name="a"):
        assert factor == 3 and mask is None and debug_name == "b"
        return x * factor + shift, parts["a"][0] * x, "text", x.detach()

    def gradients(run):
        x, shift, part = (torch.randn(4, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(3))
        first, second, text, third = run(function, x, 3, {"a": [part]}, shift=shift, debug_name="b")
        assert text == "text" and not third.requires_grad
        (first * second).sum().backward()
        return {"x": x.grad, "shift": shift.grad, "part": part.grad}

    assert_equal(gradients(keeping(reentrant)), gradients(plainly))


@REENTRANT
def test_parameters_learn_where_no_argument_has_a_gradient(reentrant):
    module, x = te.Linear(8, 8), torch.randn(3, 8)
    te.checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(module.weight.grad, x.sum(0).expand(8, 8))


def test_without_gradients_it_calls_the_function():
    calls = []
    with torch.no_grad():
        out = te.checkpoint(lambda x: calls.append(x) or [x], torch.ones(1, requires_grad=True))
    assert isinstance(out, list) and len(calls) == 1


def test_only_the_argument_is_kept():
    layer, x = layer_of(), torch.randn(6, 3, 32, requires_grad=True)
    parameters = list(layer.parameters())
    without = count_saved_bytes(lambda: layer(x), parameters)
    assert without > 10 * x.nbytes
    for reentrant in (True, False):
        assert count_saved_bytes(lambda: keeping(reentrant)(layer, x), parameters) == x.nbytes  # noqa: B023


def test_torch_compile_takes_it_into_its_graph():
    torch.compiler.reset()  # its limit of recompilations counts those of other tests
    layer = layer_of(hidden_dropout=0.0, attention_dropout=0.0)
    model = copy.deepcopy(layer)

    def forward(x):
        with te.fp8_autocast():
            return te.checkpoint(model, x)

    x = torch.randn(6, 2, 32)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    ours, expected = step(lambda _, x: compiled(x), model, x), step(lambda _, x: forward(x), model, x)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((3,), {}, "function is 3; it must be callable"),
        ((torch.sin, True, None), {}, "the second argument is True, .* not all three are given by position"),
        ((torch.sin, False, None, None), {"tp_group": 3}, "not all three are given by position alone"),
        ((torch.sin, False, RngStatesTracker("cpu"), None), {}, "get_rng_state_tracker is <.*a function that gives"),
        (
            (torch.sin, False, lambda: 3, None, torch.ones(1)),
            {},
            "get_rng_state_tracker gives 3, which has no get_states",
        ),
        (
            (torch.sin,),
            {"distribute_saved_activations": 1},
            "distribute_saved_activations is 1; it must be True or False",
        ),
        ((torch.sin,), {"tp_group": "world"}, "tp_group is 'world'; it must be None or a process group"),
        (
            (torch.sin, torch.ones(1)),
            {"distribute_saved_activations": True},
            "True but tp_group is None; give the ranks",
        ),
        ((torch.sin, True, None, None, torch.ones(1)), {}, "True but tp_group is None; give the ranks"),
        (
            (torch.sin,),
            {"get_rng_state_tracker": print, "get_cuda_rng_tracker": print},
            "two names of one argument; give one",
        ),
        ((torch.sin, torch.ones(1)), {"debug": True}, "use_reentrant=True goes without context_fn and debug"),
    ],
)
def test_wrong_arguments_are_one_clear_error(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        te.checkpoint(*args, **kwargs)


def test_a_function_that_does_more_the_second_time_is_told():
    layers, calls = [te.Linear(16, 16), te.Linear(16, 16)], []

    def function(x):
        calls.append(x)
        return layers[len(calls) - 1](x)

    with te.fp8_autocast():
        y = te.checkpoint(function, torch.randn(2, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="a recomputation calls a layer that its first pass did not call"):
        y.sum().backward()
