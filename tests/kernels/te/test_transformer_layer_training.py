"""te.TransformerLayer in training: dropout, recomputation, main_grad, torch.compile, casts, state dicts of other versions."""

import pytest
import torch
from helpers.conformance import step
from helpers.te_layer import FFN, HEADS, HIDDEN, PADDING

from xformer_train.kernels import te


@pytest.mark.parametrize("options", [{}, {"layer_type": "decoder"}])
def test_core_attention_computed_again_gives_the_same_bits_with_dropout(options):
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, attention_dropout=0.3, **options)
    x = torch.randn(7, 3, HIDDEN)
    encoded = (torch.randn(5, 3, HIDDEN),) if options else ()
    results = []
    for again in (False, True):
        torch.manual_seed(5)
        results.append(step(layer, x, None, *encoded, checkpoint_core_attention=again))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_dropout_follows_the_seed_and_the_mode_and_is_at_both_places():
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, attention_dropout=0.0, hidden_dropout=0.5)
    x = torch.randn(7, 3, HIDDEN)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    with torch.no_grad():  # leave one half alone: each drops half of what it adds, whole numbers of times
        for silent in (layer.layernorm_mlp.fc2_weight, layer.self_attention.proj.weight):
            kept = silent.clone()
            silent.zero_()
            added = layer.train()(x) - x
            whole = layer.eval()(x) - x
            ratio = added / whole
            assert ((ratio.abs() < 1e-3) | ((ratio - 2).abs() < 1e-2)).float().mean() > 0.99
            assert 0.35 < (ratio.abs() < 1e-3).float().mean() < 0.65
            silent.copy_(kept)


@pytest.mark.parametrize("layout", ["sbhd", "bshd", "thd"])
def test_drop_path_drops_samples_in_every_format(layout):
    layer = te.TransformerLayer(
        HIDDEN, FFN, HEADS, hidden_dropout=0.0, attention_dropout=0.0, drop_path_rate=0.5, attn_input_format=layout
    )
    torch.nn.init.zeros_(layer.layernorm_mlp.fc2_weight)
    samples, length = 64, 3
    shape = {"sbhd": (length, samples, HIDDEN), "bshd": (samples, length, HIDDEN), "thd": (samples * length, HIDDEN)}[
        layout
    ]
    x = torch.randn(shape)
    borders = {"cu_seqlens_q": torch.arange(samples + 1, dtype=torch.int32) * length} if layout == "thd" else {}
    torch.manual_seed(0)
    added = layer(x, **borders) - x
    expected = layer.eval()(x, **borders) - x
    by_sample = {
        "sbhd": lambda y: y.transpose(0, 1),
        "bshd": lambda y: y,
        "thd": lambda y: y.unflatten(0, (samples, length)),
    }
    added, expected = by_sample[layout](added), by_sample[layout](expected)
    dropped = (added.abs() < 1e-6).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(added[~dropped], 2 * expected[~dropped], atol=1e-5, rtol=1e-4)


def test_a_drop_path_rate_of_one_is_the_residual_and_no_nan():
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, drop_path_rate=1.0)
    x = torch.randn(7, 3, HIDDEN, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, x)
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_unfused_names_of_later_versions_are_loaded():
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS)
    state = layer.state_dict()
    later = {}
    for name, value in state.items():
        part = name.removeprefix("self_attention.").removesuffix("_bias")
        if part in ("query", "key", "value"):
            later[f"self_attention.layernorm_qkv.{part}_{'bias' if name.endswith('_bias') else 'weight'}"] = value
        else:
            later[name] = value
    later["self_attention.core_attention._extra_state"] = torch.zeros(1)
    other = te.TransformerLayer(HIDDEN, FFN, HEADS)
    other.load_state_dict(later)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name])


def test_main_grad_of_the_whole_layer():
    fused = te.TransformerLayer(HIDDEN, FFN, HEADS, fuse_qkv_params=True, fuse_wgrad_accumulation=True).eval()
    plain = te.TransformerLayer(HIDDEN, FFN, HEADS, fuse_qkv_params=True).eval()
    plain.load_state_dict(fused.state_dict())
    for parameter in fused.parameters():
        parameter.main_grad = torch.full_like(parameter, torch.nan)
    for i, x in enumerate(torch.randn(2, 7, 3, HIDDEN)):
        fused(x, is_first_microbatch=i == 0).square().sum().backward()
        plain(x).square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (ours.ndim == 2), name
        torch.testing.assert_close(ours.main_grad if ours.ndim == 2 else ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fuse_qkv_params": True, "output_layernorm": True, "apply_residual_connection_post_layernorm": True},
        {"layer_type": "decoder", "num_gqa_groups": 2},
        {"normalization": "RMSNorm", "activation": "swiglu", "bias": False, "drop_path_rate": 0.0},
    ],
)
@pytest.mark.parametrize(("dropped", "recompute"), [(0.0, False), (0.2, False), (0.2, True)])
def test_compiled_without_a_graph_break(options, dropped, recompute):
    torch.compiler.reset()  # its limit of recompilations counts those of other tests
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, hidden_dropout=dropped, attention_dropout=dropped, **options)
    x = torch.randn(7, 3, HIDDEN)
    arguments = (PADDING[:, None, None], *((torch.randn(5, 3, HIDDEN),) if "layer_type" in options else ()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected, expected_grads = step(layer, x, *arguments)
    torch.manual_seed(3)
    out, grads = step(compiled, x, *arguments, checkpoint_core_attention=recompute)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected_grads[name.removeprefix("_orig_mod.")], atol=1e-4, rtol=1e-4)


def test_sanity_no_tokens_frozen_weights_casts_and_autocast():
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS)
    assert layer(torch.randn(0, 3, HIDDEN)).shape == (0, 3, HIDDEN)
    assert layer(torch.randn(7, 0, HIDDEN)).shape == (7, 0, HIDDEN)
    x = torch.randn(7, 3, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer = layer.half().to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer = layer.float().requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_packed_layer_in_a_checkpoint_takes_borders_of_keys_too(reentrant):
    """The reentrant kind hands its recomputation tensors that are others, with the same numbers."""
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, attn_input_format="thd")
    borders = torch.tensor([0, 3, 7], dtype=torch.int32)
    packing = {"cu_seqlens_q": borders, "cu_seqlens_kv": borders.clone(), "max_seqlen_q": 4, "max_seqlen_kv": 4}
    gradients = []
    for run in (lambda x: layer(x, **packing), lambda x: te.checkpoint(layer, x, use_reentrant=reentrant, **packing)):
        torch.manual_seed(5)
        x = torch.randn(7, HIDDEN, requires_grad=True)
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("options", [{}, {"layer_type": "decoder", "fuse_qkv_params": True, "output_layernorm": True}])
def test_a_layer_on_meta_gets_the_values_of_one_built_elsewhere(options):
    """All modules inside of it, drawn in the same order."""
    torch.manual_seed(0)
    expected = te.TransformerLayer(8, 16, 2, **options)
    layer = te.TransformerLayer(8, 16, 2, **options, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    for (name, ours), theirs in zip(layer.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
