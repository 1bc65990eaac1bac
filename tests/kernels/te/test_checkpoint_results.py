"""te.checkpoint passes the gradients of all that a function returns, in whatever it is returned."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from xformer_train.kernels import te

Pair = namedtuple("Pair", "first second")
RESULTS = {
    "tensor": lambda a, b: a + b,
    "tuple": lambda a, b: (a, b, 3),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b, "none": None},
    "ordered dict": lambda a, b: OrderedDict(b=b, a=a),
    "named tuple": Pair,
    "nested": lambda a, b: ({"rows": [a, (b, "text")]}, None),
    "transformers": lambda a, b: BaseModelOutput(last_hidden_state=a, hidden_states=(b, a)),
    "empty": lambda a, b: [],
    "no tensors": lambda a, b: {"n": 1},
}


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    result = result.values() if isinstance(result, dict) else result
    return (
        [t for part in result if not isinstance(part, str) for t in tensors(part)]
        if hasattr(result, "__iter__")
        else []
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", RESULTS)
def test_gradients_flow_from_results_of_every_kind(kind, reentrant):
    torch.manual_seed(0)
    mlp, linear, x = te.LayerNormMLP(16, 32), nn.Linear(16, 16), torch.randn(3, 16)

    def function(x):
        return RESULTS[kind](mlp(x), linear(x).relu())

    found = []
    for run in (function, lambda x: te.checkpoint(function, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *mlp.parameters(), *linear.parameters()]
        result = run(leaf)
        values = tensors(result)
        for leaf in leaves:
            leaf.grad = None
        if values:
            sum((i + 1) * value.square().sum() for i, value in enumerate(values)).backward()
        found.append((result, values, [leaf.grad for leaf in leaves]))
    (expected, values, gradients), (ours, our_values, our_gradients) = found
    assert type(ours) is type(expected)
    assert len(values) == len(our_values)
    assert all(map(torch.equal, our_values, values))
    assert [g is None for g in our_gradients] == [g is None for g in gradients]
    assert all(torch.equal(g, e) for g, e in zip(our_gradients, gradients, strict=True) if g is not None)
    if isinstance(expected, dict):
        assert list(ours) == list(expected)


def test_an_object_with_tensors_is_refused_where_they_would_lose_their_gradients():
    @dataclass
    class Output:
        hidden: torch.Tensor

    linear, x = te.Linear(16, 16), torch.randn(3, 16, requires_grad=True)
    with pytest.raises(ValueError, match="returns a Output, whose tensors would lose their gradients"):
        te.checkpoint(lambda x: [Output(linear(x))], x)
    te.checkpoint(lambda x: Output(linear(x)), x, use_reentrant=False).hidden.sum().backward()
    assert x.grad is not None
