"""Muon on one process against torch.optim.Muon on the same matrices, and what its Newton-Schulz iterations give."""

from unittest import mock

import pytest
import torch
from torch import nn

from xformer_train.kernels import LayerConfig
from xformer_train.kernels.layers.layer import TransformerLayer
from xformer_train.kernels.layers.projection import matrices_of
from xformer_train.launcher.config.optimizers import OptimizerConfig
from xformer_train.launcher.optim.newton_schulz import orthogonalize
from xformer_train.launcher.optim.optimizer import build_optimizer

WIDTH = 12


def layer(**options):
    torch.manual_seed(5)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 20}
    return TransformerLayer(LayerConfig(**sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **options))


GATED = {"num_key_value_heads": 2, "gated_mlp": True, "hidden_act": "silu"}


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = layer(**options)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.layer(x))


def gradients_of(model, seed):
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(x).square().mean().backward()


def cut(weight, partition):
    return list(weight.split(partition.parts, 0)) if partition.parts else [weight]


def in_fp32(tensor):
    """What takes the place of Tensor.bfloat16 where torch's Muon shall iterate in fp32."""
    return tensor.float().clone()


@pytest.mark.parametrize("options", [{}, GATED], ids=["fused_qkv", "shared_keys_and_gates"])
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize(("nesterov", "weight_decay", "momentum"), [(True, 0.1, 0.95), (False, 0.0, 0.8)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ten_steps_are_those_of_torch_on_the_same_matrices(options, adjust_lr, nesterov, weight_decay, momentum, dtype):
    model = Model(**options)
    names = {"adjust_lr": adjust_lr, "nesterov": nesterov, "weight_decay": weight_decay, "momentum": momentum}
    config = OptimizerConfig(type="muon", lr=0.01, adamw_lr=0.002, newton_schulz_dtype=dtype, **names)
    optimizer = build_optimizer(model, config)

    found = matrices_of(model)
    theirs = [nn.Parameter(part.detach().clone()) for weight, partition in found for part in cut(weight, partition)]
    others = [p for p in model.parameters() if all(p is not weight for weight, _ in found)]
    copies = [nn.Parameter(p.detach().clone()) for p in others]
    muon = torch.optim.Muon(
        theirs, 0.01, weight_decay, momentum, nesterov, ns_steps=config.newton_schulz_steps, adjust_lr_fn=adjust_lr
    )
    groups = [
        {"params": [p for p in copies if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in copies if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, 0.002, fused=True)
    for step in range(10):
        gradients_of(model, step)
        of_matrices = [part for weight, partition in found for part in cut(weight.grad, partition)]
        for copied, gradient in zip(theirs, of_matrices, strict=True):
            copied.grad = gradient.clone()
        for copied, parameter in zip(copies, others, strict=True):
            copied.grad = parameter.grad.clone()
        optimizer.step()
        with mock.patch.object(torch.Tensor, "bfloat16", in_fp32 if dtype == "fp32" else torch.Tensor.bfloat16):
            muon.step()
        adamw.step()
    ours = [part for weight, partition in found for part in cut(weight, partition)]
    assert len(ours) == (7 if options else 6)
    tolerance = (
        1e-6 if dtype == "fp32" else 2e-3
    )  # of bf16 products, summed in another order where they come in batches
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance)
    assert all(torch.equal(mine, expected) for mine, expected in zip(others, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32), (1, 9), (9, 1), (1, 1)], ids=str)
def test_singular_values_come_near_one_and_directions_stay(shape, dtype):
    """The usual five steps leave them between about 0.7 and 1.2; squares have some near nothing, which come less far."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    (result,) = orthogonalize([matrix.to(dtype)], 5)
    assert (result.shape, result.dtype) == (shape, dtype)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ result.float() @ v.T
    ours, rest = turned.diag(), turned - turned.diag().diag()
    error = 1e-3 if dtype == torch.float32 else 0.1
    assert rest.abs().max() < error
    large = values > 0.02 * values.square().sum().sqrt()
    assert ours[large].min() > 0.6
    assert ours.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_rank_two_becomes_two_directions_and_one_of_zeros_stays_zero(dtype):
    """Five steps multiply what rounding adds by up to 480: in bf16, whose input is no more of rank 2, it is seen."""
    generator = torch.Generator().manual_seed(4)
    low = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    of_rank_2, zeros, empty = orthogonalize([low.to(dtype), torch.zeros(20, 30, dtype=dtype), torch.zeros(0, 30)], 5)
    values = torch.linalg.svdvals(of_rank_2.float())
    assert values[:2].min() > 0.6
    assert values[2] < (1e-3 if dtype == torch.float32 else 1.3)
    assert not zeros.any()
    assert empty.shape == (0, 30)


@pytest.mark.parametrize("decay", [0, 2, 6])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_iterations_of_long_matrices_that_share_a_product_are_as_exact_as_plain_ones(decay, steps):
    """Singular values fall by 10^-decay; the plain iterations are written out here, and in fp64 once more."""
    generator = torch.Generator().manual_seed(7)
    u, v = (torch.linalg.qr(torch.randn(n, 70, generator=generator, dtype=torch.float64))[0] for n in (70, 150))
    matrix = u @ torch.diag(10 ** -(decay * torch.linspace(0, 1, 70, dtype=torch.float64))) @ v.T

    def plain(x):
        x = x / x.norm()
        for _ in range(steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x

    def error(x):
        return (x.double() - exact).norm() / exact.norm()

    exact = plain(matrix)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        (ours,) = orthogonalize([matrix.to(dtype)], steps)
        assert error(ours) < max(tolerance, 2 * error(plain(matrix.to(dtype))))
        assert torch.linalg.matrix_norm(ours.float(), 2) < 1.3


def test_matrices_of_one_shape_together_have_the_bits_of_each_alone():
    """So it does not matter which matrices a process happens to step together."""
    generator = torch.Generator().manual_seed(6)
    for dtype in (torch.float32, torch.bfloat16):
        matrices = [torch.randn(150, 70, generator=generator).to(dtype) for _ in range(5)]
        matrices += [torch.randn(shape, generator=generator).to(dtype) for shape in ((70, 150), (70, 90), (70, 90))]
        together = orthogonalize(matrices, 5)
        assert all(torch.equal(orthogonalize([m], 5)[0], t) for m, t in zip(matrices, together, strict=True))


def test_a_zero_gradient_moves_a_matrix_by_its_decay_alone():
    model = Model()
    optimizer = build_optimizer(model, OptimizerConfig(type="muon", lr=0.01, weight_decay=0.5))
    before = model.layer.qkv.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.layer.qkv.weight, before * (1 - 0.01 * 0.5))


def test_frozen_matrices_and_those_without_gradient_are_left_alone():
    model = Model()
    model.layer.output.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(type="muon", lr=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients_of(model, 0)
    model.layer.intermediate.weight.grad = None
    optimizer.step()
    same = {name for name, p in model.named_parameters() if p.ndim == 2 and torch.equal(p, before[name])}
    assert same == {"layer.output.weight", "layer.intermediate.weight"}


def test_a_model_whose_layers_are_all_frozen_is_refused():
    model = Model()
    model.layer.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"optimizer\.type=muon steps the matrices of the layers, and the model has none"
    ):
        build_optimizer(model, OptimizerConfig(type="muon"))


def test_what_the_iterations_multiply_in_follows_the_precision_unless_it_is_given():
    def chosen(precision, **keys):
        optimizer = build_optimizer(Model(), OptimizerConfig(type="muon", **keys), precision=precision)
        return optimizer.param_groups[0]["newton_schulz_dtype"]

    assert [chosen(precision) for precision in ("fp32", "fp16", "bf16", "fp8")] == ["fp32", "fp32", "bf16", "bf16"]
    assert chosen("fp32", newton_schulz_dtype="bf16") == "bf16"
    assert chosen("bf16", newton_schulz_dtype="fp32") == "fp32"
