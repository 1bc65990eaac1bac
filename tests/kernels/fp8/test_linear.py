"""FP8 products and the linear layer made of them: rounding, gradients, what is kept, what is refused."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.fp8_linear import Layer, results, sqnr
from torch import nn

from xformer_train.kernels.fp8.linear import (
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    check_fp8_features,
    fp8_autocast,
    fp8_path,
)
from xformer_train.kernels.fp8.products import dgrad, fprop, quantize, wgrad
from xformer_train.kernels.ops.linear import linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WIDE_WGRAD = (False, False, True)


def quantized(x, dtype, scale=None):
    """All of x in FP8, as quantize gives it."""
    return quantize(x, scale, dtype, rows=True, columns=True)[0]


@pytest.mark.parametrize(("dtype", "least"), [(E4M3, 31.0), (E5M2, 25.0)])
def test_a_cast_keeps_what_the_mantissa_can(dtype, least):
    """Measured on gaussian numbers: 31.6 dB with 3 bits, 25.6 dB with 2."""
    torch.manual_seed(0)
    x = torch.randn(500, 96)
    q = quantized(x, dtype)
    assert sqnr(x, q.rows.float() * q.scale_inv) > least


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_numbers_beyond_the_range_become_its_ends(dtype, wide):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[1.3 * largest, -1e30, math.inf, -math.inf, math.nan, 1.0, 0.0, -2.0]] * 2, dtype=wide)
    q, amax = quantize(x, torch.tensor(1.0), dtype, rows=True, columns=False)
    expected = torch.tensor([largest, -largest, largest, -largest, math.nan, 1.0, 0.0, -2.0])
    torch.testing.assert_close(q.rows[1].float(), expected, rtol=0, atol=0, equal_nan=True)
    assert amax.isnan()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_scale_puts_amax_at_the_end_of_the_range(dtype):
    for amax in (3e-30, 0.02, 1.0, 5e20):
        q = quantized(torch.tensor([[amax / 2, -amax]]), dtype)
        torch.testing.assert_close(q.rows.float(), torch.finfo(dtype).max * torch.tensor([[0.5, -1]]), rtol=0, atol=0)
    for unusable in (0.0, math.inf, math.nan):
        assert quantized(torch.tensor([[unusable, 0.0]]), dtype).scale_inv == 1
    tiny = quantized(torch.tensor([[1e-40]]), dtype)  # largest / 1e-40 is infinite in fp32
    torch.testing.assert_close(tiny.rows.float() * tiny.scale_inv, torch.tensor([[1e-40]]), rtol=0.1, atol=0)


def test_columns_are_the_transpose_padded_with_zeros():
    x = torch.randn(24, 19).t()  # not contiguous
    q = quantized(x, E4M3)
    assert q.rows.shape == (19, 24) and q.columns.shape == (24, 32)
    assert q.rows.is_contiguous() and q.columns.is_contiguous()
    torch.testing.assert_close(q.columns.float(), F.pad(q.rows.float(), (0, 0, 0, 13)).t())


def test_products_are_those_of_the_fp8_numbers():
    """The only errors left are fp32's sums and the last rounding."""
    torch.manual_seed(0)
    T, K, N = 21, 32, 48
    x, w, dy, bias = torch.randn(T, K), torch.randn(N, K), torch.randn(T, N) * 1e-3, torch.randn(N)
    x_q, w_q, dy_q = quantized(x, E4M3), quantized(w, E4M3), quantized(dy, E5M2)
    x, w, dy = (q.rows.double() * q.scale_inv for q in (x_q, w_q, dy_q))
    for ours, exact in (
        (fprop(x_q, w_q, bias, torch.float32), x @ w.t() + bias),
        (dgrad(dy_q, w_q, torch.float32), dy @ w),
        (wgrad(dy_q, x_q, torch.float32), dy.t() @ x),
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())
    half = fprop(x_q, w_q, bias.bfloat16(), torch.bfloat16)
    assert torch.equal(half, fprop(x_q, w_q, bias.bfloat16(), torch.float32).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):  # must not reach into the emulation
        assert torch.equal(dgrad(dy_q, w_q, torch.float32), dgrad(dy_q, w_q, torch.float32).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(128,), (7, 19), (1,)])
@pytest.mark.parametrize("override", [(False, False, False), WIDE_WGRAD])
def test_output_and_gradients_are_near_the_wide_linear(dtype, tokens, override):
    """Measured on gaussian numbers: 28.6 dB forward, 24.6 dB for gradients; a lone token leaves the average more noise."""
    torch.manual_seed(1)
    layer = Layer(256, 128, dtype)
    x = torch.randn(*tokens, 256, dtype=dtype, requires_grad=True)
    dy = torch.randn(*tokens, 128, dtype=dtype)
    slack = 3 if tokens == (1,) else 0
    ours = results(layer, x, dy, Float8CurrentScaling(override_linear_precision=override))
    theirs = results(layer, x, dy)
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), theirs, ours, strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        if name == "dbias" or (name == "dweight" and override == WIDE_WGRAD):
            assert torch.equal(a, b), name
        else:
            assert sqnr(a, b) > (27 if name == "y" else 23) - slack, name
            assert not torch.equal(a, b), f"{name} had no FP8 operand"


def test_e4m3_gradients_round_less_than_e5m2():
    torch.manual_seed(2)
    layer, x = Layer(64, 64), torch.randn(100, 64, requires_grad=True)
    dy = torch.randn(100, 64)
    _, exact, *_ = results(layer, x, dy)
    _, coarse, *_ = results(layer, x, dy, Float8CurrentScaling())
    _, fine, *_ = results(layer, x, dy, Float8CurrentScaling(fp8_format=Format.E4M3))
    assert sqnr(exact, fine) > sqnr(exact, coarse) + 2


def test_padding_tokens_changes_no_number():
    torch.manual_seed(3)
    layer, x, dy = Layer(32, 48), torch.randn(21, 32), torch.randn(21, 48)
    padded = (F.pad(t, (0, 0, 0, 11)) for t in (x, dy))
    short = results(layer, x.requires_grad_(), dy, Float8CurrentScaling())
    long_x, long_dy = padded
    long = results(layer, long_x.detach().requires_grad_(), long_dy, Float8CurrentScaling())
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a, b[:21] if b.shape[0] == 32 else b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recipe", [Float8CurrentScaling(), DelayedScaling()])
def test_no_tokens(recipe):
    layer, x = Layer(32, 16), torch.zeros(2, 0, 32, requires_grad=True)
    y, dx, dweight, dbias = results(layer, x, torch.zeros(2, 0, 16), recipe)
    assert y.shape == (2, 0, 16) and dx.shape == x.shape
    assert not dweight.any() and not dbias.any()


def test_odd_strides_of_inputs_and_gradients():
    torch.manual_seed(4)
    layer, x = Layer(32, 16), torch.randn(5, 9, 32, requires_grad=True)
    dy = torch.randn(16, 9, 5)
    crooked = results(layer, x, dy.permute(2, 1, 0), Float8CurrentScaling())
    straight = results(layer, x, dy.permute(2, 1, 0).contiguous(), Float8CurrentScaling())
    results(layer, x, torch.ones(()).expand(5, 9, 16), Float8CurrentScaling())
    transposed = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for a, b, c in zip(
        crooked, straight, results(layer, transposed, dy.permute(2, 1, 0), Float8CurrentScaling()), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("override", [(False, False, False), WIDE_WGRAD])
def test_kept_for_backward_is_one_byte_per_number(override):
    T, K, N = 40, 64, 32
    layer, x = Layer(K, N, torch.bfloat16), torch.randn(T, K, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    recipe = Float8CurrentScaling(override_linear_precision=override)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), fp8_autocast(fp8_recipe=recipe):
        layer(x)
    sizes = sorted(tensor.untyped_storage().nbytes() for tensor in kept if tensor.numel() > 1)
    assert sizes == sorted([K * N, 2 * T * K] if override == WIDE_WGRAD else [K * N, K * 48])


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_gradients_nobody_asked_for_are_not_computed(frozen):
    layer, x = Layer(32, 16), torch.randn(3, 32, requires_grad=True)
    all_tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    all_tensors[frozen].requires_grad_(False)
    with fp8_autocast():
        layer(x).sum().backward()
    assert [name for name, tensor in all_tensors.items() if tensor.grad is None] == [frozen]


def test_backward_can_run_twice():
    layer, x = Layer(32, 16), torch.randn(3, 32, requires_grad=True)
    with fp8_autocast():
        y = layer(x)
    first = torch.autograd.grad(y.sum(), (x, layer.weight), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, layer.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_outside_of_regions_it_is_linear_in_the_dtype_of_x():
    layer, x = Layer(32, 16), torch.randn(3, 32)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))
    with fp8_autocast(enabled=False):
        half = layer(x.bfloat16())
    assert torch.equal(half, linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))


@pytest.mark.parametrize("enabled", [False, True])
def test_main_grad_takes_the_weights_gradient(enabled):
    torch.manual_seed(5)
    layer, x, dy = Layer(32, 16, torch.bfloat16), torch.randn(20, 32).bfloat16(), torch.randn(20, 16).bfloat16()
    recipe = Float8CurrentScaling() if enabled else None
    _, _, expected, _ = results(layer, x.requires_grad_(), dy, recipe)
    main_grad = torch.full((16, 32), 7.0)
    for first, factor, tolerance in ((True, 1, 1e-2), (None, 2, 1e-2), (False, 3, 1e-2)):  # bf16 keeps 8 bits
        with fp8_autocast(enabled):
            layer(x, first, main_grad).backward(dy)
        assert layer.weight.grad is None
        torch.testing.assert_close(main_grad, factor * expected.float(), rtol=tolerance, atol=factor * 0.02)
    if enabled:  # a gradient that is rounded to bf16 on its way would have no more bits than that
        assert not torch.equal(main_grad, main_grad.bfloat16().float())


def test_a_cached_weight_is_used_until_the_weight_changes():
    torch.manual_seed(6)
    layer, x = Layer(32, 16), torch.randn(20, 32)

    def y(is_first_microbatch):
        with fp8_autocast():
            return layer(x, is_first_microbatch).detach()

    first = y(True)
    layer.weight.data.mul_(2)  # which no version counter sees, so the kept weight is still valid to the layer
    assert torch.equal(y(False), first)
    assert not torch.equal(y(None), first)
    with torch.no_grad():
        layer.weight.mul_(2)
    changed = y(False)
    assert torch.equal(changed, y(None)) and not torch.equal(changed, first)
    layer.bfloat16()
    assert layer.fp8.weight_cache is None


def test_a_weight_cached_without_gradients_serves_a_backward_pass():
    torch.manual_seed(7)
    layer, x, dy = Layer(32, 16), torch.randn(20, 32, requires_grad=True), torch.randn(20, 16)
    expected = results(layer, x, dy, Float8CurrentScaling())
    with torch.no_grad(), fp8_autocast():
        layer(x, True)
    for a, b in zip(expected, results(layer, x, dy, Float8CurrentScaling(), is_first_microbatch=False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inside", [False, True])
def test_current_scaling_compiles_to_one_graph(inside):
    torch.manual_seed(8)
    model, x = nn.Sequential(Layer(32, 64), nn.GELU(), Layer(64, 16)), torch.randn(3, 7, 32, requires_grad=True)

    def in_region(x):
        with fp8_autocast():
            return model(x)

    def gradients(function, outer):
        with fp8_autocast(outer):
            y = function(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))

    compiled = torch.compile(in_region if inside else model, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(model, True), gradients(compiled, not inside), strict=True):
        assert torch.equal(a, b)


def test_one_graph_serves_any_number_of_tokens():
    layer = Layer(32, 16)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 32, 17):
        x, dy = torch.randn(tokens, 32, requires_grad=True), torch.randn(tokens, 16)
        expected = results(layer, x, dy, Float8CurrentScaling())
        with fp8_autocast(), torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x)
        for a, b in zip(expected[1:], torch.autograd.grad(y, (x, layer.weight, layer.bias), dy), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_operators_keep_torchs_rules(dtype):
    x, inverse, other = torch.randn(5, 32), torch.tensor(2.0), torch.tensor(3.0)
    a, b = torch.randn(5, 32).to(dtype), torch.randn(16, 32).to(E4M3)
    cases = [
        ("fp8_quantize", (x, scale, amax, dtype, rows, columns))
        for scale, amax, rows, columns in itertools.product(
            (None, inverse), (None, x.abs().max()), (True, False), (True, False)
        )
    ] + [
        ("fp8_product", (a, b, inverse, other, bias, out_dtype, True))
        for bias, out_dtype in itertools.product((None, torch.randn(16)), (torch.float32, torch.bfloat16))
    ]
    for name, arguments in cases:
        operator = getattr(torch.ops.xformer_train, name).default
        # test_schema compares by torch.allclose, which FP8 has not
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
        results = operator(*arguments)
        places = [t.untyped_storage().data_ptr() for t in results] if name == "fp8_quantize" else [results.data_ptr()]
        places += [t.untyped_storage().data_ptr() for t in arguments if isinstance(t, torch.Tensor)]
        places = [place for place in places if place]  # empty tensors have none
        assert len(set(places)) == len(places), "results share memory"


def test_wrong_shapes_and_dtypes_are_named():
    layer = Layer(32, 16)
    with pytest.raises(ValueError, match=r"x has last dim 16, weight is \(16, 32\)"):
        layer(torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"in_features is 40; FP8 .* pad it to 48"):
        check_fp8_features(40, 32)
    with pytest.raises(ValueError, match=r"out_features is 30522; .* pad it to 30528"):
        check_fp8_features(32, 30522)
    with pytest.raises(ValueError, match="in_features is 24"), fp8_autocast():
        Layer(24, 16)(torch.zeros(3, 24))
    with pytest.raises(ValueError, match=r"x is torch\.float64"), fp8_autocast():
        layer(torch.zeros(3, 32, dtype=torch.float64))
    Layer(24, 16)(torch.zeros(3, 24))  # legal in high precision


def test_the_path_can_be_asked():
    assert fp8_path(torch.device("cpu")) == "FP8 emulated: same rounding, no speed"
