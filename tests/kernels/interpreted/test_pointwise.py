"""The pointwise GPU kernels against the references of their contract files, with the same dropout mask."""

import dataclasses
import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from helpers.gpu_masks import INTERPRETED, SEED, gpu_mask

from xformer_train.kernels.ops.choices import IGNORED, Activation
from xformer_train.kernels.ops.loss.cross_entropy_triton import softmax_loss_
from xformer_train.kernels.ops.mlp.activation import (
    activation_backward_reference,
    activation_forward_reference,
    gate_backward_reference,
)
from xformer_train.kernels.ops.mlp.activation_triton import activation_backward, activation_forward, gate_backward
from xformer_train.kernels.ops.mlp.mlp import mlp
from xformer_train.kernels.ops.norm import residual_norm as contract
from xformer_train.kernels.ops.norm.head_norm import head_norm_backward_reference, head_norm_forward_reference
from xformer_train.kernels.ops.norm.head_norm_triton import head_norm_backward, head_norm_forward
from xformer_train.kernels.ops.norm.residual_norm import Options, Saved
from xformer_train.kernels.ops.norm.residual_norm_triton import (
    residual_add_backward,
    residual_add_forward,
    residual_norm_backward,
    residual_norm_forward,
    sum_partials,
)

OPTIONS = Options(eps=1e-5, p=0.1, site=2, inverted=False, kernels="auto")


def relative_error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_close(actual, exact, same_dtype):
    """At most twice the error that torch makes in the same type, against fp64; 1e-6 is what fp32 sums in any order reach."""
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    assert (actual.double() - exact).norm() <= 2 * (same_dtype.double() - exact).norm() + 1e-6 * exact.norm() + 1e-6


@dataclasses.dataclass
class Inputs:
    x: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    norm_bias: torch.Tensor
    dz: torch.Tensor
    dy: torch.Tensor

    def to(self, dtype):
        return Inputs(**{field.name: getattr(self, field.name).to(dtype) for field in dataclasses.fields(self)})


def draw_inputs(num_rows, H, dtype):
    torch.manual_seed(num_rows + H)
    x, residual, dz = torch.randn(3, num_rows, H).unbind()
    dy = torch.randn(H, num_rows).t()  # not contiguous
    bias, norm_bias = torch.randn(2, H).unbind()
    # Weights of both signs, far enough from zero to be inverted in half precision.
    weight = torch.where(torch.arange(H) % 3 == 0, -1.0, 1.0) * (0.5 + torch.rand(H))
    return Inputs(x, bias, residual, weight, norm_bias, dz, dy).to(dtype)


def all_results(forward, backward, inputs, seed, options, with_dz, with_norm_bias=True):
    """z, y and every gradient. The forward with its own results kept for backward."""
    i = inputs
    norm_bias = i.norm_bias if with_norm_bias else None
    z, y, mean, rstd = forward(i.x, i.bias, i.residual, i.weight, norm_bias, seed, options)
    kept, mean = (y, None) if options.inverted else (z, mean)
    assert (mean is None) == (options.inverted or options.kind == "rms_norm")
    saved = Saved(kept, mean, rstd, i.weight, norm_bias, i.bias, seed)
    return z, y, *backward(i.dz if with_dz else None, i.dy, saved, options)


@pytest.mark.parametrize(
    ("size", "dtype", "p", "inverted", "with_dz"),
    [
        ((1, 1), torch.float32, 0.0, False, True),
        ((63, 1000), torch.float32, 0.1, False, True),
        ((63, 1000), torch.float16, 0.5, True, False),
        ((1000, 63), torch.float32, 0.5, True, True),
        ((1000, 63), torch.float16, 0.0, False, False),
        ((7, 1600), torch.float16, 0.1, False, True),
        ((63, 1000), torch.bfloat16, 0.1, False, True),
    ],
)
@pytest.mark.parametrize(("kind", "with_norm_bias"), [("layer_norm", True), ("layer_norm", False), ("rms_norm", False)])
def test_residual_norm_kernels_equal_the_reference(
    size, dtype, p, inverted, with_dz, kind, with_norm_bias, monkeypatch
):
    inputs = draw_inputs(*size, dtype)
    options = OPTIONS._replace(p=p, inverted=inverted, kind=kind)
    seed = torch.tensor(SEED) if p else None
    if p:
        mask = gpu_mask(*size, p)
        monkeypatch.setattr(contract, "keep_mask", lambda *_: mask)
    given = seed, options, with_dz, with_norm_bias
    ours = all_results(residual_norm_forward, residual_norm_backward, inputs, *given)
    reference = contract.residual_norm_forward_reference, contract.residual_norm_backward_reference
    same_dtype = all_results(*reference, inputs, *given)
    exact = all_results(*reference, inputs.to(torch.float64), *given)
    for name, a, b, c in zip(
        ("z", "y", "dx", "dbias", "dresidual", "dweight", "dnorm_bias"), ours, exact, same_dtype, strict=True
    ):
        if name == "dnorm_bias" and not with_norm_bias:
            assert a is None
            continue
        assert a.dtype == dtype, name
        if dtype == torch.bfloat16 and INTERPRETED:  # which cuts bf16 off where a GPU rounds
            assert relative_error(a, b) < 2**-7, name
        else:
            assert_close(a, b, c)


@pytest.mark.parametrize(
    ("size", "dtype", "key_heads"),
    [
        ((1, 3, 1), torch.float32, 1),
        ((37, 9, 64), torch.float32, 3),
        ((100, 7, 24), torch.float16, 2),
        ((9, 20, 96), torch.bfloat16, 4),
    ],
)
def test_head_norm_kernels_equal_the_reference(size, dtype, key_heads):
    torch.manual_seed(sum(size))
    qkv, dout = (torch.randn(2 * size[2], *size[:2]).permute(1, 2, 0)[..., ::2].to(dtype) for _ in range(2))
    weights = torch.randn(2, size[2]).to(dtype).unbind()

    def results(forward, backward, dtype):
        given, q_weight, k_weight, d = (tensor.to(dtype) for tensor in (qkv, *weights, dout))
        out, rstd = forward(given, q_weight, k_weight, 1e-6, key_heads)
        return out, rstd, *backward(d, given, rstd, q_weight, k_weight, key_heads)

    ours = results(head_norm_forward, head_norm_backward, dtype)
    reference = head_norm_forward_reference, head_norm_backward_reference
    exact, torchs = results(*reference, torch.float64), results(*reference, dtype)
    for name, a, b, c in zip(("out", "rstd", "dqkv", "dq_weight", "dk_weight"), ours, exact, torchs, strict=True):
        assert a.dtype == c.dtype, name
        if dtype == torch.bfloat16 and INTERPRETED:  # which cuts bf16 off where a GPU rounds
            assert relative_error(a, b) < 2**-7, name
        else:
            assert_close(a, b, c)
    assert torch.equal(ours[0][:, -key_heads:], qkv[:, -key_heads:])


@pytest.mark.parametrize("inverted", [False, True])
def test_the_norm_alone_equals_the_reference(inverted):
    inputs = draw_inputs(9, 100, torch.float32)
    options = OPTIONS._replace(p=0.0, inverted=inverted)
    z, y, mean, rstd = residual_norm_forward(
        None, None, inputs.residual, inputs.weight, inputs.norm_bias, None, options
    )
    assert z is inputs.residual
    wide = inputs.to(torch.float64)
    expected = contract.residual_norm_forward_reference(
        None, None, wide.residual, wide.weight, wide.norm_bias, None, options
    )
    for a, b in zip((y, mean, rstd), expected[1:], strict=True):
        assert relative_error(a, b) < 1e-6
    saved = Saved(y if inverted else z, None if inverted else mean, rstd, inputs.weight, inputs.norm_bias, None, None)
    dx, dbias, *gradients = residual_norm_backward(None, inputs.dy, saved, options)
    assert dbias is None
    assert dx is gradients[0]
    exact = Saved(*(None if t is None else t.double() for t in saved))
    for a, b in zip(
        gradients, contract.residual_norm_backward_reference(None, wide.dy, exact, options)[2:], strict=True
    ):
        assert relative_error(a, b) < 1e-6


def rows_of_every_third(H):
    """Rows as of the queries in what a projection to queries, keys and values gives."""
    return torch.randn(2, 3, 3 * H)[..., :H]


@pytest.mark.parametrize("strided", [rows_of_every_third, lambda H: torch.randn(H, 6).t()], ids=["part", "transposed"])
@pytest.mark.parametrize("invertible", [False, True])
def test_the_norm_of_an_input_that_is_not_contiguous_has_the_right_gradients(strided, invertible, monkeypatch):
    monkeypatch.setattr(contract, "uses_triton", lambda *_: True)
    z, weight, norm_bias = strided(20), torch.rand(20) + 0.5, torch.randn(20)
    results = []
    for one in (z, z.contiguous()):
        leaves = [one.detach(), weight.clone(), norm_bias.clone()]
        assert leaves[0].stride() == one.stride()
        y = contract.norm(*(leaf.requires_grad_() for leaf in leaves), eps=1e-5, invertible=invertible)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(z).cumsum(-1))))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("size", "p", "with_bias"),
    [
        ((1, 1), 0.5, True),
        ((63, 1000), 0.5, True),
        ((1000, 63), 0.0, True),
        ((9, 100), 0.1, False),
        ((9, 100), 0.0, False),
    ],
)
def test_residual_add_kernels_equal_the_reference(size, p, with_bias, monkeypatch):
    inputs = draw_inputs(*size, torch.float32)
    options, seed = OPTIONS._replace(p=p), torch.tensor(SEED) if p else None
    bias = inputs.bias if with_bias else None
    mask = gpu_mask(*size, p)
    monkeypatch.setattr(contract, "keep_mask", lambda *_: mask)
    z = residual_add_forward(inputs.x, bias, inputs.residual, seed, options)
    expected = contract.residual_add_forward_reference(inputs.x, bias, inputs.residual, seed, options)
    torch.testing.assert_close(z, expected)
    dx, dbias = residual_add_backward(inputs.dy, bias, seed, options)
    expected_dx, expected_dbias = contract.residual_add_backward_reference(inputs.dy, bias, seed, options)
    torch.testing.assert_close(dx, expected_dx)
    if with_bias:
        torch.testing.assert_close(dbias, expected_dbias, rtol=1e-5, atol=1e-4)  # sums of 1000 values of order 1
    else:
        assert dbias is None


@pytest.mark.parametrize("op", ["residual_norm", "inverted", "norm", "rms_norm", "residual_add", "mlp", "gated_mlp"])
def test_the_public_ops_reach_the_kernels_with_the_right_arguments(op, monkeypatch):
    """Outputs and gradients with the kernels in place of the reference, as on a GPU."""
    inputs = draw_inputs(6, 20, torch.float32)
    leaves = [t.view(2, 3, 20) if t.dim() == 2 else t for t in vars(inputs).values()][:5]
    leaves = [t.detach().requires_grad_() for t in leaves]
    x, bias, residual, weight, norm_bias = leaves
    projections = torch.randn(2, 20, 20, requires_grad=True).unbind()
    projections_and_bias, half = (projections[0], bias, projections[1]), projections[1][:, :10]

    def run(kernels):
        no_dropout = {"p": 0.0, "seed": None, "site": 1, "kernels": kernels}
        outputs = {
            "residual_norm": lambda: contract.residual_norm(*leaves, eps=1e-5, **no_dropout),
            "inverted": lambda: contract.residual_norm(*leaves, eps=1e-5, invertible=True, **no_dropout),
            "norm": lambda: (contract.norm(residual, weight, norm_bias, eps=1e-5, kernels=kernels),),
            "rms_norm": lambda: (contract.norm(residual, weight, None, eps=1e-5, kind="rms_norm", kernels=kernels),),
            "residual_add": lambda: (contract.residual_add(x, bias, residual, **no_dropout),),
            "mlp": lambda: (mlp(x, *projections_and_bias, "gelu", gelu_checkpoint=True, kernels=kernels),),
            "gated_mlp": lambda: (
                mlp(x, projections[0], None, half / 8, "silu", gated=True, gelu_checkpoint=True, kernels=kernels),
            ),
        }[op]()
        torch.manual_seed(1)
        gradients = torch.randn(2, 20, 2, 3).permute(0, 2, 3, 1)[: len(outputs)].unbind()
        return *outputs, *torch.autograd.grad(outputs, [*leaves, *projections], gradients, allow_unused=True)

    expected = run("reference")
    calls = []
    for module in ("norm.residual_norm", "mlp.activation"):
        name = f"xformer_train.kernels.ops.{module}.uses_triton"
        monkeypatch.setattr(name, lambda *_: calls.append(1) or True)
    for a, b in zip(run("auto"), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2  # forward and backward


def test_backward_kernels_repeat_bit_for_bit():
    inputs = draw_inputs(63, 100, torch.float32)
    kernels, seed = (residual_norm_forward, residual_norm_backward), torch.tensor(SEED)
    runs = [all_results(*kernels, inputs, seed, OPTIONS, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 3, 63), (264, 2, 1000)])
def test_sum_partials_sums_the_first_dim_into_tensors_of_their_own(shape):
    partial = torch.randn(shape)
    totals = sum_partials(partial, [torch.empty(0)] * shape[1])
    torch.testing.assert_close(torch.stack(totals), partial.sum(0), rtol=1e-5, atol=1e-5)
    assert len({total.untyped_storage().data_ptr() for total in totals}) == shape[1]


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype", "recompute", "with_bias"),
    [
        ((1, 1), torch.float32, True, True),
        ((63, 1000), torch.float32, False, True),
        ((1000, 63), torch.float16, True, False),
        ((520, 300), torch.float32, True, True),  # more than a tile per program
    ],
)
def test_activation_kernels_equal_the_reference(activation, gated, size, dtype, recompute, with_bias):
    torch.manual_seed(0)
    f = (3 * torch.randn(size[0], size[1] * (2 if gated else 1))).to(dtype)
    f.view(-1)[0] = -30.0
    da = torch.randn(size).to(dtype)

    def results(forward, ungated, gate, dtype):
        given, d = f.to(dtype), da.to(dtype, copy=True)
        a = forward(given, activation, gated)
        if not gated:
            return a, *ungated(d, given, activation, recompute, with_bias)
        df, db = gate(d, given, activation, recompute, with_bias)
        return a, df, db, d if recompute else None

    kernels = activation_forward, activation_backward, gate_backward
    reference = activation_forward_reference, activation_backward_reference, gate_backward_reference
    ours = results(*kernels, dtype)
    exact, torchs = results(*reference, torch.float64), results(*reference, dtype)
    for a, b, c in zip(ours, exact, torchs, strict=True):
        if b is None:
            assert a is None
        else:
            assert_close(a, b, c)
    if recompute:
        assert torch.equal(ours[-1], ours[0])


def test_gelu_is_as_exact_as_fp32_everywhere_and_keeps_what_is_no_number():
    f = torch.linspace(-12, 12, 9001)
    exact = f.double() * 0.5 * (1 + torch.erf(f.double() / math.sqrt(2)))
    assert ((activation_forward(f, "gelu", False) - exact).abs() <= 3e-7 * f.abs().clamp(min=1)).all()
    values = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38])
    limits = torch.tensor(
        [math.inf, math.nan, math.nan, 3e38, 0.0]
    )  # x Phi(x); PyTorch's own erf GELU makes inf of 3e38
    for activation in ("gelu", "gelu_tanh", "silu"):
        torch.testing.assert_close(activation_forward(values, activation, False), limits, equal_nan=True)


@pytest.mark.parametrize(
    ("V", "dtype"), [(1, torch.float32), (63, torch.float16), (1000, torch.float32), (9001, torch.float32)]
)
def test_softmax_loss_overwrites_logits_with_their_gradient(V, dtype):
    torch.manual_seed(0)
    padded = (5 * torch.randn(6, V + 3)).to(dtype)
    logits = padded[:, :V]
    labels = torch.randint(0, V, (6,))
    labels[[1, 4]] = IGNORED
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none", ignore_index=IGNORED)
    losses.sum().backward()
    untouched = padded[:, V:].clone()
    ours = softmax_loss_(logits, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    assert logits[[1, 4]].abs().max() == 0
    assert torch.equal(padded[:, V:], untouched)


def test_softmax_loss_survives_large_and_minus_infinite_logits():
    logits = torch.full((3, 100), -1e4)
    logits[0, 7] = 1e4
    logits[1] = float("-inf")
    logits[1, 3] = 2.0
    losses = softmax_loss_(logits, torch.tensor([7, 3, 5]))
    torch.testing.assert_close(losses, torch.tensor([0.0, 0.0, math.log(100)]))
    assert logits.isfinite().all()


def test_a_label_of_no_row_makes_its_loss_nan_and_no_other():
    logits = torch.zeros(5, 100)
    losses = softmax_loss_(logits[:4], torch.tensor([7, -1, 100, IGNORED]))
    torch.testing.assert_close(losses, torch.tensor([math.log(100), math.nan, math.nan, 0.0]), equal_nan=True)
