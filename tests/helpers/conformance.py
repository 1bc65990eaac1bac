"""What the tests of te modules share: the same weights in ours and in plain torch, and the comparison of a whole step.

The reference computes in fp32 or wider from weights that the dtype under test holds exactly, so that it adds no rounding.
"""

import torch


def step(module, x, *args, **kwargs):
    """(output, gradients by name, the input's as "input") of one step with a random dy, the same for the same output shape."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = module(x, *args, **kwargs)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    out.backward(dy.to(out.dtype))
    return out.detach(), {"input": x.grad, **{n: p.grad for n, p in module.named_parameters()}}


def assert_same_step(ours, reference, names, *, out, grads):
    """Compares two results of `step`. names: our parameter -> the reference's; out, grads: (atol, rtol)."""
    torch.testing.assert_close(ours[0].to(reference[0].dtype), reference[0], atol=out[0], rtol=out[1])
    assert set(ours[1]) == {"input", *names}
    for name, other in {"input": "input", **names}.items():
        torch.testing.assert_close(
            ours[1][name].to(reference[0].dtype),
            reference[1][other],
            atol=grads[0],
            rtol=grads[1],
            msg=lambda text, name=name: f"{name}: {text}",
        )


def share_parameters(ours, reference, names):
    """Gives both modules the same weights, all of them random, biases and norms too, in the dtype of ours."""
    theirs = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            other = theirs.pop(names[name])
            parameter.copy_(other + 0.1 * torch.randn_like(other))
            other.copy_(parameter)
    assert not theirs, "of the reference, nothing is left over"
