"""A region belongs to the thread that opened it; backward passes may run in any thread, as those of GPUs do."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.fp8_linear import Layer
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, TransformerLayer, te
from xformer_train.kernels.fp8.linear import DelayedScaling, Float8CurrentScaling, fp8_autocast, is_fp8_enabled

RECIPES = [Float8CurrentScaling(), DelayedScaling(amax_history_len=2)]


def in_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_another_threads_linear_layer_stays_in_high_precision():
    torch.manual_seed(0)
    layer, x, inside, done = Layer(32, 48), torch.randn(5, 32), threading.Event(), threading.Event()
    expected = layer(x)

    def hold_a_region_open():
        with fp8_autocast():
            inside.set()
            done.wait(60)
            return is_fp8_enabled()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(hold_a_region_open)
        assert inside.wait(60)
        try:
            assert not is_fp8_enabled()
            assert torch.equal(layer(x), expected)
        finally:
            done.set()
        assert other.result()
    with fp8_autocast():
        assert not in_another_thread(is_fp8_enabled)
        assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_two_threads_with_regions_of_their_own_give_what_one_gives(recipe):
    """Their regions are open at the same time, and each ends while the other is open or not."""
    both_inside = threading.Barrier(2)

    def steps(seed, meet):
        layer, generator = TransformerLayer(CONFIG), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        results = []
        for amplitude in (1.0, 30.0, 5.0):
            x = (amplitude * torch.randn(2, 5, 32, generator=generator)).requires_grad_()
            with fp8_autocast(fp8_recipe=recipe):
                meet()
                y = te.checkpoint(layer, x)
                meet()
            y.square().sum().backward()
            results += [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
        return results + list(layer.state_dict().values())

    expected = [steps(seed, lambda: None) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda seed: steps(seed, lambda: both_inside.wait(60)), (1, 2)))
    for ours, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


CONFIG = LayerConfig(32, 2, 64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
WRAPS = {
    "kept": lambda layer, x: layer(x),
    "te.checkpoint": te.checkpoint,
    "te.checkpoint, not reentrant": lambda layer, x: te.checkpoint(layer, x, use_reentrant=False),
    "torch's, reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "torch's": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_backward_pass_in_another_thread_is_that_of_its_forward_pass(recipe, wrap):
    """Recomputations find their recipe and scales there, with and without a region that the thread itself has open."""

    def run(backward):
        torch.manual_seed(1)
        layer = TransformerLayer(CONFIG)
        results = []
        for amplitude in (1.0, 30.0):
            x = (amplitude * torch.randn(2, 5, 32)).requires_grad_()
            with fp8_autocast(fp8_recipe=recipe):
                y = wrap(layer, x)
            layer.zero_grad()
            backward(y.square().sum())
            results += [x.grad, *(p.grad.clone() for p in layer.parameters())]
        return results + list(layer.state_dict().values())

    def in_a_region(loss):
        with fp8_autocast(enabled=False):
            loss.backward()

    expected = run(torch.Tensor.backward)
    for other in (torch.Tensor.backward, in_a_region):
        got = run(lambda loss, other=other: in_another_thread(other, loss))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_stack_recomputes_its_layers_in_the_thread_of_the_backward_pass():
    def run(backward):
        torch.manual_seed(1)
        stack = LayerStack(CONFIG, 2, fp8=True, activation_checkpointing="full")
        x = torch.randn(2, 5, 32, requires_grad=True)
        backward(stack(x, AttentionMask()).square().sum())
        return [x.grad, *(p.grad for p in stack.parameters())]

    got = run(lambda loss: in_another_thread(loss.backward))
    assert all(torch.equal(a, b) for a, b in zip(got, run(torch.Tensor.backward), strict=True))
