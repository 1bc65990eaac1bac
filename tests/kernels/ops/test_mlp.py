"""mlp on the reference path: output, every gradient, and what is kept for backward."""

import pytest
import torch
import torch.nn.functional as F

from xformer_train.kernels.ops.mlp.mlp import mlp


def inputs_of(T, H, width):
    """x not contiguous, w1, b1, w2."""
    torch.manual_seed(T + H + width)
    shapes = ((2, T, H), (width, H), (width,), (H, width))
    x, w1, b1, w2 = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x.transpose(0, 1), w1, b1, w2


def plain(x, w1, b1, w2, activation):
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh" if activation == "gelu_tanh" else "none"), w2)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("gelu_checkpoint", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (63, 5, 7), (3, 10, 1000)])
def test_mlp_equals_plain_torch(activation, gelu_checkpoint, size):
    inputs = inputs_of(*size)
    ours = mlp(*inputs, activation, gelu_checkpoint=gelu_checkpoint)
    theirs = plain(*inputs, activation)
    dy = torch.randn_like(theirs).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gradcheck(activation):
    assert torch.autograd.gradcheck(lambda *inputs: mlp(*inputs, activation, gelu_checkpoint=True), inputs_of(2, 3, 4))


def test_backward_can_run_twice():
    inputs = inputs_of(5, 6, 7)
    y = mlp(*inputs, "gelu", gelu_checkpoint=True)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gelu_checkpoint", [False, True])
def test_kept_for_backward_are_the_input_and_one_or_two_wide_tensors(gelu_checkpoint):
    T, H, width = 50, 8, 32
    x = torch.randn(T, H, requires_grad=True)
    w1, b1, w2 = torch.randn(width, H), torch.randn(width), torch.randn(H, width)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mlp(x, w1, b1, w2, "gelu", gelu_checkpoint=gelu_checkpoint)
    assert y.requires_grad
    wide = 1 if gelu_checkpoint else 2
    assert sum(kept.values()) == (T * H + wide * T * width + 2 * H * width) * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_half_precision_is_within_twice_torchs_own_error(dtype, activation):
    half = [t.detach().mul(0.5).to(dtype).requires_grad_() for t in inputs_of(63, 16, 24)]
    exact = [t.detach().double().requires_grad_() for t in half]
    dy = torch.randn(half[0].shape).to(dtype)

    def results(y, inputs):
        return y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))

    truth = results(plain(*exact, activation), exact)
    torchs = results(plain(*half, activation), half)
    for a, b, c in zip(results(mlp(*half, activation, gelu_checkpoint=True), half), torchs, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-6


def test_shapes_that_do_not_fit_are_refused():
    x, w1, b1, w2 = inputs_of(2, 3, 4)
    with pytest.raises(ValueError, match=r"w2 \(4, 3\) do not fit"):
        mlp(x, w1, b1, w2.t(), "gelu", gelu_checkpoint=False)
