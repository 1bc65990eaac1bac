"""LayerNorms that hand the amax of their output to the FP8 product behind them: when, what, and who takes it."""

import pytest
import torch

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer, te
from xformer_train.kernels.fp8 import norm as fp8_norm
from xformer_train.kernels.fp8 import products as fp8_products
from xformer_train.kernels.fp8.linear import DelayedScaling, Float8CurrentScaling, Fp8State, fp8_autocast, fp8_linear
from xformer_train.kernels.fp8.norm import norm_before
from xformer_train.kernels.ops.norm.residual_norm import norm, residual_norm

H = 32
DROPOUT = {"eps": 1e-5, "p": 0.3, "seed": torch.tensor(7), "site": 2}


def draw(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, H).to(dtype).unbind()
    bias, weight, norm_bias = torch.randn(3, H).to(dtype).unbind()
    return [
        tensor.requires_grad_() for tensor in (x.clone(), bias.clone(), residual.clone(), weight.clone(), norm_bias)
    ]


@pytest.mark.parametrize("invertible", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (0,)])
def test_the_amax_is_that_of_the_rounded_output_and_nothing_else_changes(shape, dtype, invertible):
    inputs = draw(*shape, dtype=dtype)
    *_, residual, weight, norm_bias = inputs
    dz, dy = torch.randn(2, *shape, H).to(dtype)
    with fp8_autocast():
        z, y, amax = norm_before(Fp8State(), *inputs, invertible=invertible, **DROPOUT)
        parameters = residual, weight, norm_bias
        _, alone, alone_amax = norm_before(Fp8State(), None, None, *parameters, eps=1e-5, invertible=invertible)
    expected_z, expected = residual_norm(*inputs, invertible=invertible, **DROPOUT)
    for ours, theirs in ((amax, y), (alone_amax, alone)):
        assert ours.dtype == torch.float32 and ours.shape == () and not ours.requires_grad
        assert ours == (theirs.abs().max() if theirs.numel() else 0)
    assert torch.equal(y, expected) and torch.equal(z, expected_z)
    gradients = [torch.autograd.grad((a, b), inputs, (dz, dy)) for a, b in ((z, y), (expected_z, expected))]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    expected = norm(residual, weight, norm_bias, eps=1e-5, invertible=invertible)
    gradients = [torch.autograd.grad(out, (residual, weight, norm_bias), dy) for out in (alone, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_it_is_given_to_products_with_current_scaling_alone():
    *_, residual, weight, norm_bias = draw(5)

    def amax(state):
        return norm_before(state, None, None, residual, weight, norm_bias, eps=1e-5)[2]

    state = Fp8State()
    assert amax(state) is None
    with fp8_autocast():
        assert amax(state) is not None and amax(None) is None
        with fp8_autocast(enabled=False):
            assert amax(state) is None
    for enabled in (True, False):
        with fp8_autocast(enabled, not enabled, DelayedScaling()):
            assert amax(Fp8State()) is None


def test_a_product_takes_the_amax_it_is_given():
    x, weight, state = torch.randn(5, H), torch.randn(16, H), Fp8State()
    with fp8_autocast():
        expected = fp8_linear(x, weight, None, state)
        assert torch.equal(fp8_linear(x, weight, None, state, amax=x.abs().max()), expected)
        assert not torch.equal(fp8_linear(x, weight, None, state, amax=100 * x.abs().max()), expected)


def test_no_number_among_the_outputs_reaches_the_product():
    *_, residual, weight, norm_bias = draw(5)
    with torch.no_grad(), fp8_autocast():
        residual[2, 3] = torch.nan
        _, y, amax = norm_before(Fp8State(), None, None, residual, weight, norm_bias, eps=1e-5)
        assert amax.isnan()
        out = fp8_linear(y, torch.randn(16, H), None, Fp8State(), amax=amax)
    assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


def post_ln(layer_norm_first):
    config = LayerConfig(
        H, 2, 48, pre_layer_norm=layer_norm_first, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return TransformerLayer(config)


LAYERS = {
    "pre-LN": (2, lambda: post_ln(True)),
    "post-LN": (1, lambda: post_ln(False)),
    "te.LayerNormLinear": (1, lambda: te.LayerNormLinear(H, 48)),
    "te.LayerNormMLP": (1, lambda: te.LayerNormMLP(H, 48)),
    "te.LayerNormMLP gated": (1, lambda: te.LayerNormMLP(H, 48, activation="geglu")),
    "te.LayerNormMLP RMSNorm": (1, lambda: te.LayerNormMLP(H, 48, normalization="RMSNorm")),
    "te.TransformerLayer": (2, lambda: te.TransformerLayer(H, 48, 2, hidden_dropout=0.0, attention_dropout=0.0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_hand_it_over_and_compute_the_same(name, monkeypatch):
    torch.manual_seed(1)
    count, make = LAYERS[name]
    layer, x, dy = make(), torch.randn(6, 3, H), torch.randn(6, 3, 48 if "Linear" in name else H)
    seen = []
    quantize = fp8_products._quantize

    def watched(x, scale, amax, *rest):
        seen.append(amax is not None)
        return quantize(x, scale, amax, *rest)

    monkeypatch.setattr(fp8_products, "_quantize", watched)
    results = []
    for recipe in (Float8CurrentScaling(), None, DelayedScaling()):
        if recipe is None:
            monkeypatch.setattr(fp8_norm, "takes_amax", lambda *_: False)
        leaf = x.clone().requires_grad_()
        seen.clear()
        with fp8_autocast(fp8_recipe=recipe):
            y = layer(leaf, AttentionMask()) if isinstance(layer, TransformerLayer) else layer(leaf)
        assert sum(seen) == (0 if results else count)
        results.append((y, *torch.autograd.grad(y, (leaf, *layer.parameters()), dy)))
        if recipe is None:
            monkeypatch.undo()
            monkeypatch.setattr(fp8_products, "_quantize", watched)
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))


@pytest.mark.parametrize("invertible", [False, True])
def test_the_operator_keeps_torchs_rules(invertible):
    x, vector = torch.randn(2, 5, H), torch.rand(H)
    options = 1e-5, 0.3, 2, invertible, "auto", True
    arguments = x[0], vector, x[1], vector, vector, torch.tensor(3), *options
    operator = torch.ops.xformer_train.residual_norm_forward.default
    torch.library.opcheck(operator, arguments)
    *_, y, _, _, amax = operator(*arguments)
    assert amax == y.abs().max()


def test_it_is_traced():
    torch.compiler.reset()

    def function(x, bias, residual, weight, norm_bias, matrix):
        with fp8_autocast():
            _, y, amax = norm_before(state, None, None, x, weight, norm_bias, eps=1e-5)
            first = fp8_linear(y, matrix, None, state, amax=amax)
            z, y, amax = norm_before(state, first, bias, residual, weight, norm_bias, **DROPOUT)
            return z + fp8_linear(y, matrix, None, state, amax=amax)

    state, inputs = Fp8State(), [*draw(5), torch.randn(H, H, requires_grad=True)]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = run(*inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
