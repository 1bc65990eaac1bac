"""residual_norm, norm and residual_add on the reference path: outputs, every gradient, and what is kept for backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from xformer_train.kernels.ops.dropout import keep_mask, keep_scale
from xformer_train.kernels.ops.norm.residual_norm import norm, residual_add, residual_norm

SEED = torch.tensor(1234)
SIZES = [(1, 1), (63, 5), (3, 1000)]  # (T, H)
# the norm, and whether it has a bias
NORMS = pytest.mark.parametrize(
    ("kind", "with_norm_bias"), [("layer_norm", True), ("layer_norm", False), ("rms_norm", False)]
)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs_of(T, H):
    """x, bias, residual, weight, norm_bias; x not contiguous; weights of both signs that allow the inversion."""
    torch.manual_seed(T + H)
    sign = torch.where(torch.arange(H) % 3 == 0, -1.0, 1.0)
    weight = (sign * (0.5 + torch.rand(H))).double().requires_grad_()
    return randn(2, T, H).transpose(0, 1), randn(H), randn(T, 2, H), weight, randn(H)


def plain(x, bias, residual, weight, norm_bias, p, kind="layer_norm"):
    """The same in plain torch, with the same mask."""
    summed = x if bias is None else x + bias
    if p:
        summed = summed * keep_mask(torch.Size([x.numel() // x.shape[-1], x.shape[-1]]), p, SEED, 2).view(x.shape)
        summed = summed * keep_scale(p)
    z = residual + summed
    return z, plain_norm(z, weight, norm_bias, kind)


def plain_norm(z, weight, norm_bias, kind):
    if kind == "rms_norm":
        return F.rms_norm(z, weight.shape, weight, 1e-5)
    return F.layer_norm(z, weight.shape, weight, norm_bias, 1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@NORMS
@pytest.mark.parametrize(("invertible", "with_bias"), list(itertools.product([False, True], [False, True])))
def test_residual_norm_equals_plain_torch_with_the_same_mask(size, p, invertible, with_bias, kind, with_norm_bias):
    x, bias, residual, weight, norm_bias = inputs_of(*size)
    bias, norm_bias = bias if with_bias else None, norm_bias if with_norm_bias else None
    options = {"eps": 1e-5, "p": p, "seed": SEED, "site": 2, "invertible": invertible, "kind": kind}
    ours = residual_norm(x, bias, residual, weight, norm_bias, **options)
    theirs = plain(x, bias, residual, weight, norm_bias, p, kind)
    wanted = [t for t in (x, bias, residual, weight, norm_bias) if t is not None]
    dz, dy = torch.randn(2, *residual.shape, dtype=torch.float64).transpose(1, 2).contiguous().transpose(1, 2)
    ours_gradients = torch.autograd.grad(ours, wanted, (dz, dy))
    for a, b in zip((*ours, *ours_gradients), (*theirs, *torch.autograd.grad(theirs, wanted, (dz, dy))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("used", ["z", "y", "both"])
@pytest.mark.parametrize("invertible", [False, True])
@NORMS
def test_gradcheck_whichever_output_is_used(used, invertible, kind, with_norm_bias):
    inputs = inputs_of(2, 6)
    inputs = inputs if with_norm_bias else inputs[:4]

    def forward(*tensors):
        tensors = tensors if with_norm_bias else (*tensors, None)
        z, y = residual_norm(*tensors, eps=1e-5, p=0.4, seed=SEED, site=1, invertible=invertible, kind=kind)
        return {"z": z, "y": y, "both": (z, y)}[used]

    if used == "z":  # LayerNorm's parameters have no part in z
        inputs = [*inputs[:3], *(t.detach() for t in inputs[3:])]
    assert torch.autograd.gradcheck(forward, tuple(inputs))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("invertible", [False, True])
@NORMS
def test_norm_equals_torchs(size, invertible, kind, with_norm_bias):
    _, _, z, weight, norm_bias = inputs_of(*size)
    norm_bias = norm_bias if with_norm_bias else None
    ours = norm(z, weight, norm_bias, eps=1e-5, invertible=invertible, kind=kind)
    theirs = plain_norm(z, weight, norm_bias, kind)
    dy = torch.randn_like(theirs)
    wanted = (z, weight, norm_bias) if with_norm_bias else (z, weight)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(theirs, wanted, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_residual_add_equals_plain_torch_with_the_same_mask(size, p, with_bias):
    x, bias, residual, weight, norm_bias = inputs_of(*size)
    bias = bias if with_bias else None
    ours = residual_add(x, bias, residual, p=p, seed=SEED, site=2)
    theirs, _ = plain(x, bias, residual, weight, norm_bias, p)
    wanted = [t for t in (x, bias, residual) if t is not None]
    dz = torch.randn_like(residual).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, wanted, dz), torch.autograd.grad(theirs, wanted, dz), strict=True):
        torch.testing.assert_close(a, b)


def test_no_seed_means_no_dropout():
    x, bias, residual, weight, norm_bias = inputs_of(3, 7)
    z, _ = residual_norm(x, bias, residual, weight, norm_bias, eps=1e-5, p=0.5, seed=None, site=1)
    torch.testing.assert_close(z, residual + x + bias)
    torch.testing.assert_close(residual_add(x, bias, residual, p=0.5, seed=None, site=1), residual + x + bias)


def test_gradients_of_inputs_without_dropout_do_not_share_memory():
    x, residual = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    for _ in range(2):  # the second pass adds to the gradients of the first in place
        residual_norm(x, None, residual, torch.ones(6), torch.zeros(6), eps=1e-5, p=0.0, seed=None, site=1)[
            0
        ].sum().backward()
    assert torch.equal(x.grad, torch.full((4, 6), 2.0))
    assert torch.equal(residual.grad, torch.full((4, 6), 2.0))


def kept_bytes(run, given):
    """Bytes that `run` saves for backward, besides the storages of the tensors in `given`."""
    storages = {t.untyped_storage().data_ptr(): 0 for t in given}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    return sum(storages.values()), outputs


def test_kept_for_backward_are_z_and_statistics_or_y_and_one_statistic():
    T, H = 50, 24
    x, residual = torch.randn(T, H, requires_grad=True), torch.randn(T, H)
    bias, weight, norm_bias = torch.zeros(H), torch.ones(H), torch.zeros(H)
    given = [x, residual, bias, weight, norm_bias, SEED]

    def bytes_of(**flags):
        return kept_bytes(
            lambda: residual_norm(x, bias, residual, weight, norm_bias, eps=1e-5, p=0.1, seed=SEED, site=1, **flags),
            given,
        )

    plain_bytes, (_, y) = bytes_of()
    assert plain_bytes == (T * H + 2 * T) * 4
    inverted_bytes, (_, inverted_y) = bytes_of(invertible=True)
    assert inverted_bytes == (T * H + T) * 4
    assert torch.equal(y, inverted_y)
    assert kept_bytes(lambda: residual_add(x, bias, residual, p=0.1, seed=SEED, site=1), given)[0] == 0
    # The projection that follows keeps y anyway: with the inversion, nothing else of size (T, H) stays.
    projection = torch.randn(5, H, requires_grad=True)
    both, _ = kept_bytes(
        lambda: F.linear(
            residual_norm(x, bias, residual, weight, norm_bias, eps=1e-5, p=0.1, seed=SEED, site=1, invertible=True)[1],
            projection,
        ),
        [*given, projection],
    )
    assert both == (T * H + T) * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("invertible", [False, True])
@NORMS
def test_half_precision_is_within_twice_torchs_own_error(dtype, invertible, kind, with_norm_bias):
    exact = [t.detach() for t in inputs_of(63, 40)]
    half = [t.to(dtype).requires_grad_() for t in exact]
    half = half if with_norm_bias else half[:4]
    exact = [t.detach().double().requires_grad_() for t in half]
    dz, dy = torch.randn(2, *half[2].shape).to(dtype).unbind()

    def results(outputs, inputs, scale):
        return *outputs, *torch.autograd.grad(outputs, inputs, (dz.to(scale), dy.to(scale)))

    none = [] if with_norm_bias else [None]
    truth = results(plain(*exact, *none, 0.1, kind), exact, torch.float64)
    torchs = results(plain(*half, *none, 0.1, kind), half, dtype)
    ours = residual_norm(*half, *none, eps=1e-5, p=0.1, seed=SEED, site=2, invertible=invertible, kind=kind)
    for a, b, c in zip(results(ours, half, dtype), torchs, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"x is \(3, 8\)"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "float64"),
        ({"bias": torch.zeros(9)}, r"bias has shape \(9,\)"),
        ({"weight": torch.zeros(1)}, r"weight has shape \(1,\)"),
        ({"p": 1.0}, "p=1.0 is not a dropout probability"),
        ({"kind": "rms_norm"}, "norm_bias is given, and an RMSNorm has none"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {
        "x": torch.zeros(4, 8),
        "bias": torch.zeros(8),
        "residual": torch.zeros(4, 8),
        "weight": torch.zeros(8),
        "norm_bias": torch.zeros(8),
        "eps": 1e-5,
        "p": 0.1,
        "seed": SEED,
        "site": 1,
    }
    with pytest.raises(ValueError, match=message):
        residual_norm(**(arguments | change))
