"""Gradients of te modules that are summed into `main_grad`."""

import pytest
import torch

from xformer_train.kernels import te


@pytest.mark.parametrize("build_module", [te.Linear, te.LayerNormLinear, te.LayerNormMLP])
def test_main_grad_gets_what_grad_would_and_the_first_micro_batch_overwrites(build_module):
    fused = build_module(16, 16, fuse_wgrad_accumulation=True)
    plain = build_module(16, 16)
    plain.load_state_dict(fused.state_dict())
    weights = [n for n, p in fused.named_parameters() if p.ndim == 2]
    for name in weights:
        fused.get_parameter(name).main_grad = torch.full_like(fused.get_parameter(name), 1e6)  # stale
    batches = torch.randn(3, 5, 2, 16)
    for i, x in enumerate(batches):
        fused(x, is_first_microbatch=i == 0).square().sum().backward()
        plain(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        ours = fused.get_parameter(name)
        if name in weights:
            assert ours.grad is None
            torch.testing.assert_close(ours.main_grad, parameter.grad)
        else:
            torch.testing.assert_close(ours.grad, parameter.grad)
    fused(batches[0]).square().sum().backward()  # None adds
    plain(batches[0]).square().sum().backward()
    torch.testing.assert_close(fused.get_parameter(weights[0]).main_grad, plain.get_parameter(weights[0]).grad)


def test_a_weight_without_main_grad_gets_grad():
    fused, plain = te.LayerNormMLP(16, 16, fuse_wgrad_accumulation=True), te.LayerNormMLP(16, 16)
    plain.load_state_dict(fused.state_dict())
    fused.fc1_weight.main_grad = torch.zeros(16, 16)
    for is_first in (True, False):
        x = torch.randn(5, 2, 16)
        fused(x, is_first_microbatch=is_first).square().sum().backward()
        plain(x).square().sum().backward()
    torch.testing.assert_close(fused.fc1_weight.main_grad, plain.fc1_weight.grad)
    assert fused.fc1_weight.grad is None
    torch.testing.assert_close(fused.fc2_weight.grad, plain.fc2_weight.grad)


def test_main_grad_is_filled_by_a_compiled_module():
    torch.compiler.reset()
    module, x = te.LayerNormMLP(16, 16, fuse_wgrad_accumulation=True), torch.randn(5, 2, 16)
    module.fc1_weight.main_grad, module.fc2_weight.main_grad = torch.zeros(2, 16, 16)
    torch.compile(module, fullgraph=True, backend="aot_eager")(x, is_first_microbatch=True).square().sum().backward()
    compiled = module.fc1_weight.main_grad.clone()
    module(x, is_first_microbatch=True).square().sum().backward()
    torch.testing.assert_close(compiled, module.fc1_weight.main_grad)
    assert compiled.any()


def test_main_grad_is_wider_than_the_weights():
    ours = te.Linear(8, 8, fuse_wgrad_accumulation=True, params_dtype=torch.bfloat16)
    ours.weight.main_grad = torch.zeros(8, 8)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for _ in range(300):  # in bf16 the sum would stand still after 256 equal terms
        ours(x).sum().backward()
    expected = 300 * x.float().sum(0).expand(8, 8)
    torch.testing.assert_close(ours.weight.main_grad, expected, atol=0.3, rtol=1e-2)
