"""The linear layer by each library of fp32 products on a CPU, those of values and of gradients of weights apart."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from xformer_train.kernels.ops.linear import (
    CpuLibraries,
    available_cpu_libraries,
    cpu_libraries,
    linear,
    using_cpu_libraries,
    weight_gradient,
)

LIBRARIES = [CpuLibraries(*names) for names in itertools.product(available_cpu_libraries(), repeat=2)]


def results(function, x, weight, bias):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves)
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("libraries", LIBRARIES, ids="-".join)
@pytest.mark.parametrize("sizes", [(3, 5, 19, 7), (2, 3, 5, 48), (1, 1, 4, 1), (0, 3, 6, 5)])
def test_values_and_gradients_are_those_of_torch(libraries, sizes):
    batch, tokens, inputs, outputs = sizes
    torch.manual_seed(0)
    x = torch.randn(tokens, batch, inputs).transpose(0, 1)
    weight, bias = torch.randn(inputs, outputs).t(), torch.randn(outputs)
    with using_cpu_libraries(libraries):
        assert cpu_libraries() == libraries
        found = results(linear, x, weight, bias)
    for ours, theirs in zip(found, results(F.linear, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("libraries", LIBRARIES, ids="-".join)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (4, 0, 3), (4, 3, 0)])
def test_gradients_of_weights_of_nothing_are_zero(libraries, sizes):
    rows, outputs, inputs = sizes
    with using_cpu_libraries(libraries):
        found = weight_gradient(torch.ones(rows, outputs), torch.ones(rows, inputs))
    assert torch.equal(found, torch.zeros(outputs, inputs))


def test_what_was_compiled_follows_another_choice():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 17), torch.randn(33, 17)
    compiled = torch.compile(lambda x, weight: linear(x, weight).sum(-1), backend="aot_eager", fullgraph=True)
    for libraries in LIBRARIES:
        with using_cpu_libraries(libraries):
            torch.testing.assert_close(compiled(x, weight), linear(x, weight).sum(-1))
