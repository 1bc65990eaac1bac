"""The feed-forward half with casts inside of GELU, against a linear layer, GELU and a linear layer, each with its own."""

import itertools

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
)
from xformer_train.kernels.fp8.mlp import fp8_mlp
from xformer_train.kernels.ops.mlp.activation import (
    activated,
    activation_backward_reference,
    activation_forward_reference,
)
from xformer_train.kernels.ops.mlp.mlp import mlp

H, F = 32, 48
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CURRENT, DELAYED = Float8CurrentScaling(), DelayedScaling(amax_history_len=2, amax_compute_algo="max")
RECIPES = [CURRENT, Float8CurrentScaling(fp8_format=Format.E4M3), DELAYED]


class Gelu(torch.autograd.Function):
    """The GELU of kernels/ops/mlp/activation.py on a CPU, whose tanh approximation differs from torch's in the last bits."""

    @staticmethod
    def forward(ctx, f, activation):
        ctx.save_for_backward(f)
        ctx.activation = activation
        return activation_forward_reference(f, activation, False)

    @staticmethod
    def backward(ctx, da):
        (f,) = ctx.saved_tensors
        return activation_backward_reference(da.clone(), f, ctx.activation, False)[0], None


class Mlp(nn.Module):
    def __init__(self, fused, dtype=torch.float32, activation="gelu_tanh"):
        super().__init__()
        self.fused, self.activation = fused, activation
        self.w1 = nn.Parameter(torch.randn(F, H, dtype=dtype) / H**0.5)
        self.b1 = nn.Parameter(torch.randn(F, dtype=dtype))
        self.w2 = nn.Parameter(torch.randn(H, F, dtype=dtype) / F**0.5)
        self.fp8_1, self.fp8_2 = Fp8State(), Fp8State()

    def forward(self, x, first=None, main_grads=(None, None), gelu=Gelu.apply):
        if self.fused:
            options = {"is_first_microbatch": first, "main_grads": main_grads}
            return fp8_mlp(x, self.w1, self.b1, self.w2, self.activation, self.fp8_1, self.fp8_2, **options)
        main1, main2 = main_grads
        f = fp8_linear(x, self.w1, self.b1, self.fp8_1, is_first_microbatch=first, main_grad=main1)
        a = gelu(f, self.activation)
        return fp8_linear(a, self.w2, None, self.fp8_2, is_first_microbatch=first, main_grad=main2)


def pair(**options):
    torch.manual_seed(0)
    fused, steps = Mlp(True, **options), Mlp(False, **options)
    steps.load_state_dict(fused.state_dict())
    return fused, steps


def step(model, x, dy, recipe, wrap=lambda function, x: function(x), **options):
    """Output and gradients of a step, then the state behind it."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    with fp8_autocast(recipe is not None, fp8_recipe=recipe):
        y = wrap(lambda x: model(x, **options), x)
    y.backward(dy)
    state = {name: tensor for name, tensor in model.state_dict().items() if "fp8" in name}
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad for n, p in model.named_parameters()}, **state}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] is None) == (tensor is None), name
        assert tensor is None or (ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)), name


def draw(*shape, dtype=torch.float32, factor=1.0):
    return factor * torch.randn(*shape, H, dtype=dtype), torch.randn(*shape, H, dtype=dtype)


@pytest.mark.parametrize("recipe", RECIPES, ids=["current", "E4M3", "delayed"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_three_ops_bit_for_bit(recipe, activation, dtype):
    """Also the scales and amaxes of delayed scaling, over steps whose amplitudes grow."""
    fused, steps = pair(dtype=dtype, activation=activation)
    for number, tokens in enumerate(((37,), (3, 16), (1,), (2, 0))):
        x, dy = draw(*tokens, dtype=dtype, factor=2.0**number)
        ours, theirs = (step(model, x, dy, recipe) for model in (fused, steps))
        assert_equal(ours, theirs)
    assert len(ours) == (11 if recipe is DELAYED else 5)


@pytest.mark.parametrize("recipe", [CURRENT, DELAYED], ids=["current", "delayed"])
@pytest.mark.parametrize(
    ("activation", "gated", "with_bias"),
    [("silu", True, False), ("gelu", True, True), ("relu2", False, True), ("gelu", False, False)],
)
def test_other_activations_and_gates_are_three_ops_bit_for_bit(activation, gated, with_bias, recipe):
    """Gates, SiLU and squared ReLU are not computed inside of a cast."""
    torch.manual_seed(0)
    rows = 2 * F if gated else F
    parameters = [torch.randn(rows, H) / 6, torch.randn(rows) if with_bias else None, torch.randn(H, F) / 7]
    inputs, results = [draw(21)[0] for _ in range(3)], []
    for fused in (True, False):
        states, seen = (Fp8State(), Fp8State()), []
        for given in inputs:
            leaves = [None if p is None else p.clone().requires_grad_() for p in (given, *parameters)]
            x, w1, b1, w2 = leaves
            with fp8_autocast(fp8_recipe=recipe):
                if fused:
                    y = fp8_mlp(x, w1, b1, w2, activation, *states, gated=gated)
                else:
                    a = activated(fp8_linear(x, w1, b1, states[0]), activation, gated=gated)
                    y = fp8_linear(a, w2, None, states[1])
            y.square().sum().backward()
            seen += [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]
        results.append(seen)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_parameters_may_be_wider_than_the_input():
    fused, steps = pair()
    x, dy = draw(21, dtype=torch.bfloat16)
    assert_equal(*(step(model, x, dy, CURRENT) for model in (fused, steps)))


def test_with_gradients_of_weights_in_high_precision_it_is_three_ops():
    recipe = DelayedScaling(override_linear_precision=(False, False, True))
    fused, steps = pair()
    x, dy = draw(21)
    assert_equal(step(fused, x, dy, recipe), step(steps, x, dy, recipe, gelu=activated))


@pytest.mark.parametrize("recipe", [CURRENT, DELAYED], ids=["current", "delayed"])
def test_micro_batches_share_weights_and_main_grads(recipe):
    fused, steps = pair()
    results = []
    for model in (fused, steps):
        torch.manual_seed(1)
        main_grads = torch.full((F, H), torch.nan), torch.full((H, F), torch.nan)
        seen = {}
        for number, first in enumerate((True, False, None)):
            seen |= {
                (number, k): v for k, v in step(model, *draw(21), recipe, first=first, main_grads=main_grads).items()
            }
            if first:
                kept = model.fp8_1.weight_cache, model.fp8_2.weight_cache
        assert kept[0] is not None and kept[1] is not None
        assert model.w1.grad is None and model.w2.grad is None
        results.append(seen | dict(enumerate(main_grads)))
    assert results[0][0].isfinite().all()
    assert_equal(*results)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", [CURRENT, DELAYED], ids=["current", "delayed"])
def test_recomputation_changes_nothing(recipe, reentrant):
    fused, steps = pair()
    for number in range(3):
        x, dy = draw(21, factor=4.0**number)
        ours = step(fused, x, dy, recipe, lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
        assert_equal(ours, step(steps, x, dy, recipe))


def test_outside_of_regions_it_is_mlp_in_the_dtype_of_x():
    fused, _ = pair()
    x, _ = draw(5)
    assert torch.equal(fused(x), mlp(x, fused.w1, fused.b1, fused.w2, "gelu_tanh", gelu_checkpoint=False))
    assert fused(x.bfloat16()).dtype == torch.bfloat16
    main_grads = torch.zeros(F, H), torch.zeros(H, F)
    fused(x, main_grads=main_grads).sum().backward()
    assert all(main_grad.any() for main_grad in main_grads) and fused.w1.grad is None and fused.w2.grad is None


def test_calibrating_records_all_four_amaxes_in_high_precision():
    fused, steps = pair()
    x, _ = draw(21)
    with fp8_autocast(enabled=False, calibrating=True, fp8_recipe=DELAYED):
        assert torch.equal(fused(x), steps(x, gelu=activated))
    for ours, theirs in ((fused.fp8_1, steps.fp8_1), (fused.fp8_2, steps.fp8_2)):
        assert_equal(ours.state_dict(), theirs.state_dict())
        assert (theirs.state_dict()["scale"][:2] != 1).all()


def kept(model, x):
    """Bytes of each tensor that is kept for backward, scales left out."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), fp8_autocast():
        model(x)
    return sorted(size for size in sizes if size > 4)


def test_gelus_output_is_kept_in_fp8_alone():
    model, T = Mlp(True, torch.bfloat16), 40
    x = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
    everything = {"x": 48 * H, "f": 2 * T * F, "gelu": 48 * F, "w1": F * H, "w2": H * F}
    assert kept(model, x) == sorted(everything.values())
    model.w1.requires_grad_(False)
    assert kept(model, x) == sorted(everything[name] for name in ("f", "gelu", "w1", "w2"))
    model.w2.requires_grad_(False)
    assert kept(model, x) == sorted(everything[name] for name in ("f", "w1", "w2"))
    model.w1.requires_grad_(True)
    assert kept(model, x.detach()) == sorted(everything[name] for name in ("x", "f", "w2"))


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=4)))
def test_gradients_nobody_asked_for_are_not_computed(trained):
    fused, steps = pair()
    x, dy = draw(21)
    grads = []
    for model in (fused, steps):
        leaf = x.clone()
        tensors = [leaf, model.w1, model.b1, model.w2]
        for tensor, flag in zip(tensors, trained, strict=True):
            tensor.requires_grad_(flag)
        with fp8_autocast():
            y = model(leaf)
        if any(trained):
            y.backward(dy)
        grads.append({i: tensor.grad for i, tensor in enumerate(tensors)})
    assert [grad is not None for grad in grads[0].values()] == list(trained)
    assert_equal(*grads)


def test_backward_can_run_twice():
    fused, _ = pair()
    x, dy = draw(21)
    with fp8_autocast():
        y = fused(x.requires_grad_())
    first = torch.autograd.grad(y, (x, *fused.parameters()), dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, *fused.parameters()), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("recipe", [CURRENT, DELAYED], ids=["current", "delayed"])
def test_it_compiles(recipe):
    torch.compiler.reset()
    model, _ = pair()
    compiled = torch.compile(model, fullgraph=recipe is CURRENT, dynamic=True, backend="aot_eager")
    for tokens in (21, 32):
        x, dy = draw(tokens)
        other = Mlp(True)
        other.load_state_dict(model.state_dict())
        ours = {}
        with fp8_autocast(fp8_recipe=recipe):
            leaf = x.clone().requires_grad_()
            y = compiled(leaf)
        model.zero_grad()
        y.backward(dy)
        ours = {"y": y.detach(), "dx": leaf.grad, **{n: p.grad for n, p in model.named_parameters()}}
        theirs = step(other, x, dy, recipe)
        assert_equal(ours, {name: theirs[name] for name in ours})


@pytest.mark.parametrize("scale", [None, torch.tensor(2.0)])
def test_operators_keep_torchs_rules(scale):
    f, da = torch.randn(2, 5, 32)
    cases = [("fp8_gelu_quantize", (f, scale, "gelu", E4M3, columns)) for columns in (True, False)]
    cases += [
        ("fp8_gelu_backward_", (da.clone(), f, scale, "gelu_tanh", E5M2, rows, columns))
        for rows, columns in itertools.product((True, False), repeat=2)
    ]
    for name, arguments in cases:
        operator = getattr(torch.ops.xformer_train, name).default
        # test_schema compares by torch.allclose, which FP8 has not
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
        places = [t.untyped_storage().data_ptr() for t in (*operator(*arguments), *arguments) if torch.is_tensor(t)]
        places = [place for place in places if place]  # empty tensors have none
        assert len(set(places)) == len(places), "results share memory"


def test_wrong_shapes_and_dtypes_are_named():
    fused, _ = pair()
    with pytest.raises(ValueError, match=r"x \(3, 16\), w1 \(48, 32\), b1 \(48,\) and w2 \(32, 48\) do not fit"):
        fused(torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"x is torch\.float64"), fp8_autocast():
        fused(torch.zeros(3, H, dtype=torch.float64))
    states = Fp8State(), Fp8State()
    with pytest.raises(ValueError, match=r"out_features is 40; .* pad it to 48"), fp8_autocast():
        fp8_mlp(torch.zeros(3, H), torch.zeros(40, H), torch.zeros(40), torch.zeros(H, 40), "gelu", *states)
