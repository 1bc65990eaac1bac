"""Ops that hand their input on for the residual stream: backward adds its gradient within the pass that makes dx."""

import pytest
import torch
from helpers.exactness import allowed_error

from xformer_train.kernels import LayerConfig, TransformerLayer
from xformer_train.kernels.ops import linear
from xformer_train.kernels.ops.mlp.mlp import MlpOptions, mlp, mlp_and_input
from xformer_train.kernels.ops.norm.residual_norm import norm, norm_and_input
from xformer_train.kernels.ops.parallel_linear import linear_and_input
from xformer_train.kernels.parallel.collectives import ONE_PROCESS

OPTIONS = MlpOptions("gelu", False, False, "auto", ONE_PROCESS)
OPS = {  # inputs -> (op alone, op with its input)
    "linear": (
        lambda x, w1, b1, *_: linear.linear(x, w1, b1),
        lambda x, w1, b1, *_: linear_and_input(x, w1, b1, None),
    ),
    "mlp": (
        lambda x, w1, b1, w2, _: mlp(x, w1, b1, w2, "gelu", gelu_checkpoint=False),
        lambda x, w1, b1, w2, _: mlp_and_input(x, w1, b1, w2, OPTIONS),
    ),
    "norm": (
        lambda x, _, __, ___, vector: norm(x, vector, vector, eps=1e-5),
        lambda x, _, __, ___, vector: norm_and_input(x, vector, vector, eps=1e-5, invertible=False, kernels="auto")[
            ::-1
        ],
    ),
}


def inputs(dtype, shape=(3, 5, 7)):
    torch.manual_seed(1)
    width = shape[-1]
    tensors = torch.randn(shape), torch.randn(11, width), torch.randn(11), torch.randn(width, 11), torch.randn(width)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def gradients(function, given, weights):
    """Gradients of the sum of both results, weighted."""
    loss = sum(
        (result * weight.to(result.dtype)).sum() for result, weight in zip(function(*given), weights, strict=True)
    )
    return torch.autograd.grad(loss, given, allow_unused=True)


@pytest.fixture(params=[False, True], ids=["added behind", "added inside"])
def adds_inside(request, monkeypatch):
    monkeypatch.setattr(linear, "_adds_inside", lambda _: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_gradients_are_those_of_the_op_and_of_the_residual_stream_added(name, dtype, adds_inside):
    alone, with_input = OPS[name]
    given, exact_given = inputs(dtype), inputs(torch.float64)
    weights = [torch.randn_like(result, dtype=torch.float64) for result in with_input(*exact_given)]
    ours = gradients(with_input, given, weights)
    torchs = gradients(lambda x, *rest: (alone(x, *rest), x), given, weights)
    exact = gradients(
        lambda x, *rest: (alone(x, *rest), x), [g.detach().double().requires_grad_() for g in given], weights
    )
    for mine, same_dtype, reference in zip(ours, torchs, exact, strict=True):
        if reference is None:
            assert mine is None
            continue
        if dtype == torch.float32 and not adds_inside:
            assert torch.equal(mine, same_dtype)
        assert (mine.double() - reference).norm() <= allowed_error(same_dtype, reference)


@pytest.mark.usefixtures("adds_inside")
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("name", OPS)
def test_either_result_may_go_unused(name, used):
    alone, with_input = OPS[name]
    given = inputs(torch.float64)
    result = with_input(*given)[used]
    expected = (alone(*given), given[0])[used]
    assert torch.equal(result, expected)
    weight = torch.randn_like(result)
    ours = torch.autograd.grad((result * weight).sum(), given, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), given, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None) or not (other if one is None else one).any()
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("pre_layer_norm", [False, True])
def test_a_layer_whose_products_add_the_residual_gradient_has_the_same_gradients(monkeypatch, pre_layer_norm, p):
    config = LayerConfig(
        16,
        2,
        24,
        pre_layer_norm=pre_layer_norm,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        initializer_range=0.3,
    )
    torch.manual_seed(2)
    layer = TransformerLayer(config).double()
    x, dout = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True), torch.randn(2, 9, 16, dtype=torch.float64)
    results = []
    for inside in (False, True):
        monkeypatch.setattr(linear, "_adds_inside", lambda _, inside=inside: inside)
        torch.manual_seed(3)
        given = dout.clone()
        results.append(torch.autograd.grad(layer(x), [x, *layer.parameters()], given))
        assert torch.equal(given, dout)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("place", ["attention_output", "mlp_norm", "output"])
def test_gradients_that_a_hook_keeps_are_not_overwritten(monkeypatch, place):
    monkeypatch.setattr(linear, "_adds_inside", lambda _: True)
    torch.manual_seed(2)
    layer = TransformerLayer(LayerConfig(16, 2, 24, pre_layer_norm=False, initializer_range=0.3)).eval()
    kept = []
    getattr(layer, place).register_full_backward_hook(lambda _, __, douts: kept.extend([douts[0], douts[0].clone()]))
    layer(torch.randn(2, 9, 16, requires_grad=True)).square().sum().backward()
    assert torch.equal(kept[0], kept[1])
