"""A stack of layers against the layers one by one."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack
from xformer_train.kernels.layers import layer, layer_stack
from xformer_train.kernels.ops.dropout import draw_seed
from xformer_train.kernels.parallel.collectives import TensorParallel

CONFIG = LayerConfig(24, 3, 40, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.3)
MASK = AttentionMask(causal=True)


@pytest.mark.parametrize("drops", [True, False])
def test_a_stack_is_its_layers_in_order_each_with_a_seed_of_its_own(drops):
    stack, x = LayerStack(CONFIG, 3).train(drops), torch.randn(2, 9, 24)
    torch.manual_seed(5)
    y = stack(x, MASK)
    torch.manual_seed(5)
    seeds = draw_seed(x.device, (3,)).unbind()
    assert len({int(seed) for seed in seeds}) == 3
    hidden = x
    for one, seed in zip(stack, seeds, strict=True):
        hidden = one(hidden, MASK, seed=seed)
    assert torch.equal(y, hidden)
    assert next(iter(stack.state_dict())) == "0.attention_norm.weight"


@pytest.mark.parametrize("training", [True, False])
def test_a_stack_asks_once_which_norms_may_be_inverted(training, monkeypatch):
    """The answer makes the host wait for a GPU."""
    asked = []

    def are_invertible(weights, biases, dtype):
        asked.append((len(weights), len(biases), dtype))
        return [True] * len(weights)

    monkeypatch.setattr(layer, "are_invertible", are_invertible)
    stack = LayerStack(dataclasses.replace(CONFIG, normalize_invertible=True), 3)
    with torch.set_grad_enabled(training):
        stack(torch.randn(2, 9, 24), MASK)
    assert asked == ([(6, 6, torch.float32)] if training else [])


def test_a_cuda_graph_is_no_matter_without_a_gpu():
    stack = LayerStack(CONFIG, 2, cuda_graph=True)
    x = torch.randn(2, 9, 24, requires_grad=True)
    stack(x, MASK).sum().backward()
    assert x.grad is not None


def test_a_slice_of_a_stack_is_its_layers():
    """To freeze some, say."""
    stack = LayerStack(CONFIG, 3)
    first = stack[:2].requires_grad_(False)
    assert list(first) == [stack[0], stack[1]]
    assert stack[-1].qkv.weight.requires_grad
    assert not stack[1].qkv.weight.requires_grad


def replayed_scale():
    """x -> scale * x as a graph of static tensors, which a GPU would replay; and the scale."""
    scale = nn.Parameter(torch.tensor(3.0))
    x, y, dy, dx = torch.zeros(4, 2).unbind()
    dscale = torch.zeros(())
    graph = SimpleNamespace(
        parameters=[scale], inputs=[x], output=y, doutput=dy, gradients=[dx, dscale], last_pass=None
    )
    graph.forward = SimpleNamespace(replay=lambda: y.copy_(scale.detach() * x))
    graph.backward = SimpleNamespace(replay=lambda: [dx.copy_(scale.detach() * dy), dscale.copy_(dy @ x)])
    return lambda given: layer_stack._Replay.apply(graph, given, scale), scale


def test_a_replay_passes_gradients_of_its_own_call():
    replay, scale = replayed_scale()
    for _ in range(2):
        x = torch.ones(2, requires_grad=True)
        replay(x).sum().backward()
        assert torch.equal(x.grad, torch.full((2,), 3.0))
    assert scale.grad == 4


@pytest.mark.parametrize("again", ["forward", "backward"])
def test_a_graph_that_holds_another_call_by_now_gives_no_gradients(again):
    """Its tensors are those of its last pass: gradients of an earlier one would be wrong, and nobody would notice."""
    replay, _ = replayed_scale()
    y = replay(torch.ones(2, requires_grad=True))
    if again == "forward":
        replay(torch.zeros(2))
    else:
        y.sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="cuda_graph=True keeps the tensors of one call"):
        y.sum().backward()


class Captured:
    """Stands for a CUDA graph, which holds the addresses of its stack's parameters."""

    def __deepcopy__(self, memo):
        raise TypeError("CUDA graphs cannot be copied")


def test_graphs_stay_with_the_parameters_they_were_captured_with():
    stack = LayerStack(CONFIG, 1, cuda_graph=True)
    stack._graphs["a shape"] = Captured()
    assert not copy.deepcopy(stack)._graphs
    assert stack._graphs
    nn.Sequential(stack).bfloat16()
    assert not stack._graphs


@dataclasses.dataclass
class Processes:
    """A process group as far as a stack looks at it before its first collective."""

    count: int

    def size(self):
        return self.count

    def rank(self):
        return 0

    def __deepcopy__(self, memo):
        raise TypeError("process groups cannot be copied")


@pytest.mark.parametrize(
    ("processes", "changes", "options", "message"),
    [
        (2, {}, {}, "num_attention_heads=3 is not divisible by the 2 processes"),
        (3, {}, {}, "intermediate_size=40 is not divisible by the 3 processes"),
        (
            3,
            {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 42},
            {},
            "num_key_value_heads=2 heads of 4 columns cannot be divided over the 3 processes",
        ),
        (3, {"intermediate_size": 42}, {"cuda_graph": True}, "cuda_graph=True captures no collectives"),
        (3, {"hidden_size": 48, "intermediate_size": 48}, {"fp8": True}, None),
        (3, {"hidden_size": 24, "intermediate_size": 48}, {"fp8": True}, "FP8 products need multiples of 16 on each"),
    ],
)
def test_sizes_and_options_that_processes_cannot_share_are_refused(processes, changes, options, message):
    def build():
        config = dataclasses.replace(CONFIG, **changes)
        return LayerStack(config, 1, parallel=TensorParallel(Processes(processes)), **options)

    if message is None:
        assert build()[0].qkv.weight.shape == (48, 48)
        return
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("shape", "sizes"), [((2, 7, 24), "B=2 times S=7"), ((14, 24), "T=14")])
def test_tokens_that_processes_cannot_share_are_refused(shape, sizes):
    config = dataclasses.replace(CONFIG, intermediate_size=42)
    stack = LayerStack(config, 1, parallel=TensorParallel(Processes(3), sequence=True))
    with pytest.raises(ValueError, match=f"{sizes} tokens are not divisible by the t=3 processes"):
        stack(torch.randn(shape), MASK)


def test_sequence_parallelism_needs_a_group():
    with pytest.raises(ValueError, match="sequence=True"):
        TensorParallel(sequence=True)


def test_a_copy_of_a_shared_stack_shares_the_group_and_weights_are_not_drawn_again():
    config = dataclasses.replace(CONFIG, intermediate_size=42)
    stack = copy.deepcopy(LayerStack(config, 1, parallel=TensorParallel(Processes(3))))
    assert stack.parallel.size == 3
    with pytest.raises(ValueError, match="build a new layer"):
        stack[0].reset_parameters()
