"""A stack of layers replayed from CUDA graphs against the same stack without, and over a key-value cache."""

import dataclasses

import pytest
import torch

from xformer_train.kernels import AttentionMask, KeyValueCache, LayerConfig, LayerStack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = LayerConfig(256, 4, 1024, num_hidden_layers=3)


def batches(count, size=100):
    """(hidden states, mask, gradient of the output) with other values and other padding each."""
    for index in range(count):
        real = torch.arange(size, device="cuda") < torch.tensor(
            [[size - index], [size // 2 + index], [1]], device="cuda"
        )
        x, dy = torch.randn(2, 3, size, 256, device="cuda", dtype=torch.bfloat16)
        yield x.requires_grad_(), AttentionMask(key_mask=real), dy


@pytest.mark.parametrize("flags", [False, True])
def test_replays_equal_eager_steps_with_the_same_seeds(flags):
    """Gradients add up over micro-batches, and every pass drops something else."""
    config = dataclasses.replace(CONFIG, normalize_invertible=flags, gelu_checkpoint=flags)
    results = []
    for graph in (False, True):
        torch.manual_seed(3)
        stack = LayerStack(config, 3, cuda_graph=graph).to("cuda", torch.bfloat16)
        outputs = []
        for x, mask, dy in batches(4):
            y = stack(x, mask)
            y.backward(dy)
            outputs += [y.detach().clone(), x.grad.clone()]
        results.append([*outputs, *(parameter.grad for parameter in stack.parameters())])
        assert len(stack._graphs) == graph
    for eager, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, eager)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 20])
def test_tokens_over_a_cache_give_what_the_whole_text_gives(window):
    """The prompt by our kernels, the tokens behind it by torch's attention."""
    config = dataclasses.replace(CONFIG, num_key_value_heads=2, rope_theta=1e4, attention_window=window)
    stack = LayerStack(config, 3).to("cuda").eval()
    x = torch.randn(2, 70, 256, device="cuda")
    tokens = torch.arange(70, device="cuda") >= torch.tensor([[0], [9]], device="cuda")
    cache, outputs = KeyValueCache(80), []
    for piece in x.split([60, 1, 1, 8], 1):
        end = cache.length + piece.shape[1]
        outputs.append(stack(piece, AttentionMask(causal=True, key_mask=tokens[:, :end]), cache))
    whole = stack(x, AttentionMask(causal=True, key_mask=tokens))
    torch.testing.assert_close(torch.cat(outputs, 1)[tokens], whole[tokens], atol=1e-3, rtol=1e-3)


def test_the_same_input_is_dropped_differently_in_each_replay():
    stack = LayerStack(CONFIG, 2, cuda_graph=True).to("cuda", torch.bfloat16)
    ((x, mask, _),) = batches(1)
    outputs = [stack(x, mask).detach().clone() for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_evaluation_and_other_shapes_run_beside_a_graph():
    stack = LayerStack(CONFIG, 2, cuda_graph=True).to("cuda", torch.bfloat16)
    for size in (100, 64, 100):
        ((x, mask, dy),) = batches(1, size)
        stack(x, mask).backward(dy)
    assert len(stack._graphs) == 2
    with torch.no_grad():
        stack.eval()(x, mask)
    assert len(stack._graphs) == 2
    with pytest.raises(ValueError, match="cuda_graph=True needs masks of"):
        stack.train()(x, AttentionMask(bias=torch.zeros(3, 1, 1, 100, device="cuda", dtype=torch.bfloat16)))


def test_a_backward_pass_behind_the_next_call_is_refused():
    stack = LayerStack(CONFIG, 2, cuda_graph=True).to("cuda", torch.bfloat16)
    (x, mask, dy), (other, other_mask, _) = batches(2)
    y = stack(x, mask)
    stack(other, other_mask)
    with pytest.raises(ValueError, match="run backward once after each call"):
        y.backward(dy)
