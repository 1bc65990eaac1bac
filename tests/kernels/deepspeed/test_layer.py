"""What DeepSpeed's layer computes: as the core does, with masks, modes and dropout seeds, and what its call refuses."""

import math

import pytest
import torch
from helpers.deepspeed_door import layer, perturbed
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels import TransformerLayer

CORE_NAMES = {
    "attn_qkvw": "qkv.weight",
    "attn_qkvb": "qkv.bias",
    "attn_ow": "attention_output.weight",
    "attn_ob": "attention_output.bias",
    "inter_w": "intermediate.weight",
    "inter_b": "intermediate.bias",
    "output_w": "output.weight",
    "output_b": "output.bias",
}
PRE_LN_NAMES = {
    "norm_w": "attention_norm.weight",
    "norm_b": "attention_norm.bias",
    "attn_nw": "mlp_norm.weight",
    "attn_nb": "mlp_norm.bias",
}
POST_LN_NAMES = {
    "attn_nw": "attention_norm.weight",
    "attn_nb": "attention_norm.bias",
    "norm_w": "mlp_norm.weight",
    "norm_b": "mlp_norm.bias",
}


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_the_layer_computes_what_the_core_does_with_the_same_parameters(pre_layer_norm):
    ours = perturbed(layer(pre_layer_norm=pre_layer_norm))
    core = TransformerLayer(ours.config)
    names = CORE_NAMES | (PRE_LN_NAMES if pre_layer_norm else POST_LN_NAMES)
    core.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    x = torch.randn(2, 7, 24)
    results = []
    for module in (ours, core):
        torch.manual_seed(5)
        y = module(x)
        y.square().sum().backward()
        results.append(y)
    assert torch.equal(*results)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, core.get_parameter(names[name]).grad), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers_train(dtype):
    made = layer(fp16=True) if dtype == torch.float16 else layer().to(dtype)
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[0.0] * 5, [0.0] * 3 + [torch.finfo(torch.float32).min] * 2])
    y = made(x, mask)
    assert y.dtype == dtype and y.isfinite().all()
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in made.parameters())


@pytest.mark.parametrize("fully_masked", [False, True])
def test_the_mask_may_be_four_or_two_dimensional_of_any_float_dtype_and_minus_infinity(fully_masked):
    made = layer().eval()
    x = torch.randn(2, 5, 24)
    padding = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1] if fully_masked else [0, 0, 0, 1, 1]], dtype=torch.bool)
    keep = torch.zeros(2, 5)
    expected = made(x, keep.masked_fill(padding, -1e4).view(2, 1, 1, 5))
    assert torch.equal(made(x, keep.masked_fill(padding, -1e4)), expected)
    assert torch.equal(made(x, keep.double().masked_fill(padding, -1e4)), expected)
    lowest = made(x, keep.masked_fill(padding, -math.inf))
    assert lowest.isfinite().all()
    if not fully_masked:
        torch.testing.assert_close(lowest, expected)
        changed = x.clone()
        changed[1, 3:] += 1
        assert torch.equal(made(changed, keep.masked_fill(padding, -1e4))[1, :3], expected[1, :3])
    assert torch.equal(made(x, keep), made(x))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 1, 5, 5), r"shape \(2, 1, 5, 5\)"),
        (torch.zeros(2, 3, 1, 5), r"shape \(2, 3, 1, 5\)"),
        (torch.zeros(1, 1, 1, 5), r"shape \(1, 1, 1, 5\)"),
        (torch.zeros(2, 1, 1, 6), r"shape \(2, 1, 1, 6\)"),
        (torch.zeros(2, 1, 5), r"shape \(2, 1, 5\)"),
        (torch.zeros(5), r"shape \(5,\)"),
        (torch.ones(2, 5, dtype=torch.bool), "torch.bool"),
        (torch.ones(2, 5, dtype=torch.int64), "torch.int64"),
    ],
)
def test_a_mask_that_is_not_one_additive_value_per_key_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        layer()(torch.randn(2, 5, 24), mask)


def test_no_gradient_flows_into_the_mask():
    mask = torch.zeros(2, 1, 1, 5, requires_grad=True)
    layer()(torch.randn(2, 5, 24), mask).sum().backward()
    assert mask.grad is None


def test_arguments_of_deepspeeds_forward_are_refused_unless_they_have_their_default():
    made, x = layer().eval(), torch.randn(1, 3, 24)
    assert torch.equal(made(x, None, None, None, None, None, None, False, None), made(x))
    for name in ("head_mask", "layer_head_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_value"):
        with pytest.raises(ValueError, match=f"^{name} was given"):
            made(x, **{name: torch.ones(3)})
    with pytest.raises(ValueError, match="output_attentions was given"):
        made(x, output_attentions=True)
    with pytest.raises(ValueError, match=r"hidden_states is torch\.float64, the parameters are torch\.float32"):
        made(x.double())


def test_input_beyond_the_configured_sizes_is_refused():
    made = layer(batch_size=2, max_seq_length=5)
    made(torch.randn(1, 5, 24))
    with pytest.raises(ValueError, match=r"\(3, 5, 24\), above batch_size=2"):
        made(torch.randn(3, 5, 24))
    with pytest.raises(ValueError, match=r"\(2, 6, 24\), above max_seq_length=5"):
        made(torch.randn(2, 6, 24))
    with pytest.raises(ValueError, match=r"\(5, 24\); give it as \(B, S, H\)"):
        made(torch.randn(5, 24))


def test_return_tuple_wraps_the_output():
    x = torch.randn(1, 3, 24)
    wrapped = layer(return_tuple=True).eval()(x)
    assert isinstance(wrapped, tuple) and len(wrapped) == 1
    assert torch.equal(wrapped[0], layer().eval()(x))


def test_non_contiguous_input_gives_the_same_output_and_gradients():
    made, dense = layer(), torch.randn(2, 7, 24)
    strided = dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    results = []
    for x in (dense, strided):
        torch.manual_seed(8)
        leaf = x.detach().requires_grad_()
        y = made(leaf, torch.zeros(2, 14)[:, ::2])
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *made.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_training_sets_the_mode_a_layer_starts_in_and_the_module_decides_afterwards():
    x = torch.randn(2, 5, 24)
    made = layer(training=False)
    assert not made.training and torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def dropped_output(seed, torch_seed=1):
    made, x = layer(seed=seed), torch.linspace(-1, 1, 240).view(2, 5, 24)
    torch.manual_seed(torch_seed)
    return made(x)


def test_the_dropout_seed_and_torchs_generator_decide_the_masks_together():
    assert torch.equal(dropped_output(1234), dropped_output(1234))
    assert not torch.equal(dropped_output(1234), dropped_output(1235))
    assert not torch.equal(dropped_output(1234), dropped_output(1234, torch_seed=2))


def test_the_dropout_seed_leaves_initial_weights_and_torchs_generator_alone():
    assert torch.equal(layer().attn_qkvw, layer(seed=1234).attn_qkvw)
    states = []
    for seed in (-1, 1234):
        dropped_output(seed)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_with_a_dropout_seed_reproduces_the_masks(reentrant):
    made = layer(seed=1234)
    x = torch.randn(2, 9, 24, requires_grad=True)
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(made(x).square().sum(), x)
    torch.manual_seed(1)
    checkpoint(made, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(plain, x.grad)


@pytest.mark.parametrize("dtypes", [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)])
def test_an_input_of_another_dtype_than_the_parameters_is_refused(dtypes):
    dtype, fp16 = dtypes
    x = torch.zeros(2, 5, 24, dtype=dtype)
    with pytest.raises(ValueError, match="convert one of them"):
        layer(fp16=fp16)(x)


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_gradients_are_reported_by_the_names_of_deepspeeds_own_tests(pre_layer_norm):
    made, found = perturbed(layer(pre_layer_norm=pre_layer_norm)), []
    made(torch.randn(2, 5, 24), grads=found).square().sum().backward()
    reported = {name: gradient for gradient, name in found}
    assert len(found) == len(reported) == 12
    for short in ("O", "int", "out", "norm", "N2", "V"):
        ours = {"O": "attn_o", "int": "inter_", "out": "output_", "norm": "norm_", "N2": "attn_n", "V": "attn_qkv"}[
            short
        ]
        for kind in ("w", "b"):
            gradient = made.get_parameter(ours + kind).grad
            assert torch.equal(reported[f"{short}_{kind.upper()}"], gradient[-24:] if short == "V" else gradient), short
    with torch.no_grad():
        made(torch.randn(2, 5, 24), grads=found)
