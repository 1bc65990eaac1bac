"""mlp and activated on the reference path: output, every gradient, and what is kept for backward."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from xformer_train.kernels.ops.choices import Activation
from xformer_train.kernels.ops.mlp.activation import activated
from xformer_train.kernels.ops.mlp.mlp import mlp
from xformer_train.kernels.parallel.sharding import Partition, take_shard

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x) ** 2,
}
every_activation = pytest.mark.parametrize("activation", get_args(Activation))


def inputs_of(T, H, width, gated=False):
    """x not contiguous, w1, b1, w2."""
    torch.manual_seed(T + H + width)
    rows = 2 * width if gated else width
    shapes = ((2, T, H), (rows, H), (rows,), (H, width))
    x, w1, b1, w2 = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x.transpose(0, 1), w1, b1, w2


def plain(x, w1, b1, w2, activation, gated=False):
    return F.linear(plain_activation(F.linear(x, w1, b1), activation, gated), w2)


def plain_activation(f, activation, gated):
    if not gated:
        return FUNCTIONS[activation](f)
    g, u = f.chunk(2, -1)
    return FUNCTIONS[activation](g) * u


@every_activation
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gelu_checkpoint", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (63, 5, 7), (3, 10, 1000)])
def test_mlp_equals_plain_torch(activation, gated, with_bias, gelu_checkpoint, size):
    x, w1, b1, w2 = inputs_of(*size, gated)
    inputs = (x, w1, b1, w2) if with_bias else (x, w1, None, w2)
    wanted = [tensor for tensor in inputs if tensor is not None]
    ours = mlp(*inputs, activation, gated=gated, gelu_checkpoint=gelu_checkpoint)
    theirs = plain(*inputs, activation, gated)
    dy = torch.randn_like(theirs).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(theirs, wanted, dy), strict=True):
        torch.testing.assert_close(a, b)


@every_activation
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(activation, gated):
    def run(*inputs):
        return mlp(*inputs, activation, gated=gated, gelu_checkpoint=True)

    assert torch.autograd.gradcheck(run, inputs_of(2, 3, 4, gated))


@every_activation
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (7, 3, 26), (40, 2000)])
def test_activated_equals_plain_torch(activation, gated, shape):
    torch.manual_seed(0)
    f = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64, requires_grad=True)[..., ::2]  # not contiguous
    ours, theirs = activated(f, activation, gated=gated), plain_activation(f, activation, gated)
    da = torch.randn_like(theirs)
    before = da.clone()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, f, da), torch.autograd.grad(theirs, f, da))
    assert torch.equal(da, before), "the gradient that came in is somebody else's"


def test_a_gate_has_two_halves():
    with pytest.raises(ValueError, match="f has last dim 7"):
        activated(torch.zeros(3, 7), "silu", gated=True)


@pytest.mark.parametrize("gated", [False, True])
def test_backward_can_run_twice(gated):
    inputs = inputs_of(5, 6, 7, gated)
    y = mlp(*inputs, "gelu", gated=gated, gelu_checkpoint=True)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("processes", [2, 3])
def test_parts_of_both_halves_of_a_gate_add_up_to_the_whole(processes):
    """As processes share it: each has as many rows of what passes the activation as of what that multiplies."""
    x, w1, b1, w2 = inputs_of(5, 7, 6, gated=True)
    cut = Partition(0, (6, 6))
    whole = mlp(x, w1, b1, w2, "silu", gated=True, gelu_checkpoint=False)
    parts = []
    for rank, part in enumerate(w2.chunk(processes, 1)):
        shards = (take_shard(parameter, cut, rank, processes) for parameter in (w1, b1))
        parts.append(mlp(x, *shards, part, "silu", gated=True, gelu_checkpoint=True))
    torch.testing.assert_close(sum(parts), whole)
    wanted, dy = (x, w1, b1, w2), torch.randn_like(whole)
    ours, theirs = (torch.autograd.grad(y, wanted, dy) for y in (sum(parts), whole))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gelu_checkpoint", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_kept_for_backward_are_the_input_and_what_the_activation_read_and_gave(gelu_checkpoint, gated):
    T, H, width, rows = 50, 8, 32, 64 if gated else 32
    x = torch.randn(T, H, requires_grad=True)
    w1, b1, w2 = torch.randn(rows, H), torch.randn(rows), torch.randn(H, width)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mlp(x, w1, b1, w2, "gelu", gated=gated, gelu_checkpoint=gelu_checkpoint)
    assert y.requires_grad
    wide = rows if gelu_checkpoint else rows + width
    assert sum(kept.values()) == (T * H + T * wide + H * (rows + width)) * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_activation
@pytest.mark.parametrize("gated", [False, True])
def test_half_precision_is_within_twice_torchs_own_error(dtype, activation, gated):
    half = [t.detach().mul(0.5).to(dtype).requires_grad_() for t in inputs_of(63, 16, 24, gated)]
    exact = [t.detach().double().requires_grad_() for t in half]
    dy = torch.randn(half[0].shape).to(dtype)

    def results(y, inputs):
        return y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))

    truth = results(plain(*exact, activation, gated), exact)
    torchs = results(plain(*half, activation, gated), half)
    ours = results(mlp(*half, activation, gated=gated, gelu_checkpoint=True), half)
    for a, b, c in zip(ours, torchs, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-6


def test_shapes_that_do_not_fit_are_refused():
    x, w1, b1, w2 = inputs_of(2, 3, 4)
    with pytest.raises(ValueError, match=r"w2 \(4, 3\) do not fit"):
        mlp(x, w1, b1, w2.t(), "gelu", gelu_checkpoint=False)
    with pytest.raises(ValueError, match=r"must be \(..., H\), \(2F, H\), \(2F,\) or None, and \(H, F\)"):
        mlp(x, w1, b1, w2, "silu", gated=True, gelu_checkpoint=False)
