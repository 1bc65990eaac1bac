"""head_norm on the reference path: the norms of query and key heads, every gradient, and what is kept for backward."""

import pytest
import torch
import torch.nn.functional as F

from xformer_train.kernels.ops.norm.head_norm import head_norm


def draw(shape, dtype=torch.float64):
    """qkv, not contiguous, and both weights."""
    torch.manual_seed(sum(shape))
    qkv = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, requires_grad=True)[..., ::2]
    return qkv, *(torch.randn(shape[-1], dtype=dtype, requires_grad=True) for _ in range(2))


def plain(qkv, q_weight, k_weight, eps, key_heads):
    if key_heads is None:
        q, k, v = qkv.unbind(-3)
    else:
        q, k, v = qkv.split((qkv.shape[-2] - 2 * key_heads, key_heads, key_heads), -2)
    q, k = (F.rms_norm(x, weight.shape, weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    return torch.stack((q, k, v), -3) if key_heads is None else torch.cat((q, k, v), -2)


CASES = [((1, 3, 1, 1), None), ((7, 3, 5), 1), ((2, 9, 3, 4, 6), None), ((2, 9, 8, 7), 2), ((60, 5, 64), 1)]


@pytest.mark.parametrize(("shape", "key_heads"), CASES)
def test_it_equals_plain_torch(shape, key_heads):
    inputs = draw(shape)
    ours = head_norm(*inputs, eps=1e-6, key_heads=key_heads)
    theirs = plain(*inputs, 1e-6, key_heads)
    torch.testing.assert_close(ours, theirs)
    dout = torch.randn_like(theirs).transpose(0, -1).contiguous().transpose(0, -1)
    before = dout.clone()
    for a, b in zip(torch.autograd.grad(ours, inputs, dout), torch.autograd.grad(theirs, inputs, dout), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(dout, before)
    assert ours.is_contiguous()
    assert ours.untyped_storage().data_ptr() != inputs[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("key_heads", [None, 1])
def test_gradcheck(key_heads):
    inputs = draw((2, 3, 2, 5) if key_heads is None else (3, 5, 4))
    assert torch.autograd.gradcheck(lambda *x: head_norm(*x, eps=1e-6, key_heads=key_heads), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_twice_torchs_own_error(dtype):
    half = [t.detach().to(dtype).requires_grad_() for t in draw((40, 8, 24))]
    exact = [t.detach().double().requires_grad_() for t in half]
    dout = torch.randn(half[0].shape).to(dtype)

    def results(out, inputs):
        return out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))

    truth, torchs = (results(plain(*given, 1e-6, 2), given) for given in (exact, half))
    for a, b, c in zip(results(head_norm(*half, eps=1e-6, key_heads=2), half), torchs, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-6


def test_backward_can_run_twice_and_kept_are_the_heads_and_a_number_for_each_that_is_normed():
    T, heads, D = 30, 8, 16
    qkv, q_weight, k_weight = torch.randn(T, heads, D, requires_grad=True), torch.ones(D), torch.ones(D)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = head_norm(qkv, q_weight, k_weight, eps=1e-6, key_heads=2)
    assert sum(kept.values()) == (T * heads * D + T * (heads - 2) + 2 * D) * 4
    first, second = (torch.autograd.grad(out.square().sum(), qkv, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("shape", "key_heads", "message"),
    [
        ((4, 2, 3, 6), None, "does not fit key_heads=None"),
        ((4, 6, 6), 3, r"qkv \(4, 6, 6\) does not fit key_heads=3"),
        ((4, 6, 5), 2, r"q_weight \(6,\) and k_weight \(6,\) do not fit heads of 5 columns"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, key_heads, message):
    with pytest.raises(ValueError, match=message):
        head_norm(torch.zeros(shape), torch.zeros(6), torch.zeros(6), eps=1e-6, key_heads=key_heads)
