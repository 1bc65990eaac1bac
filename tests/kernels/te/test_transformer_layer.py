"""te.TransformerLayer against the layer written out in plain torch with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from helpers.conformance import step
from helpers.te_layer import FFN, HEADS, HIDDEN, PADDING, by_reference_names, pair

from xformer_train.kernels import te
from xformer_train.kernels.fp8.linear import Fp8State
from xformer_train.kernels.ops.attention.attention import AttentionMask
from xformer_train.kernels.te.core_attention import Dropping, Visibility, cross_attention


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


CASES = {
    "gpt": ({}, {}),
    "fused": ({"fuse_qkv_params": True}, {}),
    "no bias": ({"bias": False}, {"bias": False}),
    "post-LN residual": ({"apply_residual_connection_post_layernorm": True}, {"post_ln": True}),
    "output norm": ({"output_layernorm": True, "fuse_qkv_params": True}, {"output_ln": True}),
    "groups": ({"num_gqa_groups": 2}, {"groups": 2}),
    "fused groups": ({"num_gqa_groups": 2, "fuse_qkv_params": True}, {"groups": 2}),
    "one group": ({"num_gqa_groups": 1, "fuse_qkv_params": True}, {"groups": 1}),
    "kv_channels": ({"kv_channels": 10}, {"head_dim": 10}),
    "exact gelu": ({"activation": "gelu_erf", "layernorm_epsilon": 1e-12}, {"erf": True, "eps": 1e-12}),
    "rms": ({"normalization": "RMSNorm", "output_layernorm": True}, {"norm": "RMSNorm", "output_ln": True}),
}


def compare(ours, reference, inputs, reference_inputs, dtype):
    out, grads = step(ours, *inputs[:-1], **inputs[-1])
    expected, expected_grads = step(reference, *reference_inputs[:-1], **reference_inputs[-1])
    # row 1 of the table: out 5e-3 / 1e-1, gradients 5e-2 / 1e-1, rtol 1e-2; in fp32 less explains all rounding
    wide = dtype == torch.float32
    tolerance = {"atol": 1e-4 if wide else 1e-1, "rtol": 1e-3 if wide else 2e-2}
    torch.testing.assert_close(out.to(expected.dtype), expected, **tolerance)
    grads = by_reference_names(ours, grads)
    assert grads.keys() == expected_grads.keys()
    for name, gradient in grads.items():
        scale = 1 if wide else max(1, expected_grads[name].abs().max().item() / 4)  # a sum over 21 tokens reaches 20
        torch.testing.assert_close(
            gradient.to(expected.dtype) / scale,
            expected_grads[name] / scale,
            **tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_causal_layer(case, dtype):
    ours, reference = pair(*CASES[case], dtype)
    x = torch.randn(7, 3, HIDDEN, dtype=dtype)
    compare(ours, reference, (x, None, {}), (x.to(reference.fc1.weight.dtype), causal(7), {}), dtype)


@pytest.mark.parametrize("fuse", [True, False])
def test_original_bert_is_both_post_ln_flags(fuse):
    """Written as BERT writes it, norm behind each half, with the map of the names from the docstring."""
    options = {"output_layernorm": True, "apply_residual_connection_post_layernorm": True, "fuse_qkv_params": fuse}
    ours, reference = pair(options | {"self_attn_mask_type": "padding"}, {"output_ln": True, "post_ln": True})
    x, masked = torch.randn(7, 3, HIDDEN), PADDING[:, None, None]
    compare(ours, reference, (x, masked, {}), (x, masked, {}), torch.float32)
    attended = reference.norm2(x + reference.attention(x, x, masked))
    out = reference.norm3(attended + reference.fc2(F.gelu(reference.fc1(attended), approximate="tanh")))
    torch.testing.assert_close(ours(x, masked), out, atol=1e-4, rtol=1e-4)


def test_llama_like_layer_with_rotary_embedding():
    options = {"normalization": "RMSNorm", "activation": "swiglu", "bias": False, "num_gqa_groups": 2}
    ours, reference = pair(options, {"norm": "RMSNorm", "swiglu": True, "bias": False, "groups": 2})
    x = torch.randn(7, 3, HIDDEN)
    for dim in (6, 4):  # a whole head, a part of it
        angles = te.RotaryPositionEmbedding(dim)(9)
        assert angles.shape == (9, 1, 1, dim)
        compare(
            ours,
            reference,
            (x, None, {"rotary_pos_emb": angles}),
            (x, causal(7), {"angles": angles[:7]}),
            torch.float32,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("post_ln", [False, True])
def test_decoder(dtype, fuse, groups, post_ln):
    options = {"layer_type": "decoder", "fuse_qkv_params": fuse, "num_gqa_groups": groups}
    options |= {"apply_residual_connection_post_layernorm": post_ln}
    ours, reference = pair(options, {"decoder": True, "groups": groups, "post_ln": post_ln}, dtype)
    x, encoded = torch.randn(7, 3, HIDDEN, dtype=dtype), torch.randn(5, 3, HIDDEN, dtype=dtype)
    hidden = (torch.arange(5) >= torch.tensor([5, 3, 1])[:, None])[:, None, None]
    wide = reference.fc1.weight.dtype
    compare(
        ours,
        reference,
        (x, None, encoded, hidden, {}),
        (x.to(wide), causal(7), encoded.to(wide), hidden, {}),
        dtype,
    )


MASKS = {
    "padding": (PADDING[:, None, None], PADDING[:, None, None]),
    "padding per query": (PADDING[:, None, None].expand(3, 1, 7, 7), PADDING[:, None, None]),
    "padding_causal": (PADDING[:, None, None], PADDING[:, None, None] | causal(7)),
    "causal": (PADDING[:, None, None], PADDING[:, None, None] | causal(7)),
    "causal per query": (causal(7)[None, None], causal(7)[None, None]),
    "no_mask": (None, torch.zeros(7, 7, dtype=torch.bool)),
    "arbitrary": (torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.5,) * 2,
    "left padding": (PADDING.flip(1)[:, None, None], PADDING.flip(1)[:, None, None] | causal(7)),
    "nothing seen": (torch.ones(3, 1, 1, 7, dtype=torch.bool),) * 2,
}
TYPES = {"padding per query": "padding", "causal per query": "causal", "left padding": "padding_causal"}


@pytest.mark.parametrize("kind", MASKS)
def test_mask_types(kind):
    """A True hides, and a query that sees no key gives zeros and zero gradients, as the reference's nan_to_num does."""
    given, masked = MASKS[kind]
    ours, reference = pair({"self_attn_mask_type": TYPES.get(kind, "padding" if kind == "nothing seen" else kind)}, {})
    x = torch.randn(7, 3, HIDDEN)
    out, grads = step(ours, x, given)
    assert all(g.isfinite().all() for g in grads.values())
    assert out.isfinite().all()
    expected = blind_safe_step(reference, x, masked)
    torch.testing.assert_close(out, expected[0], atol=1e-4, rtol=1e-3)
    for name, gradient in by_reference_names(ours, grads).items():
        torch.testing.assert_close(
            gradient, expected[1][name], atol=1e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


def blind_safe_step(reference, x, masked):
    """The reference's step with softmax of a row of -inf replaced by zeros in a way that has a gradient."""
    masked = masked.expand(3, HEADS, 7, 7)
    blind = masked.all(-1, keepdim=True)
    softmax = torch.Tensor.softmax

    def safe(scores, dim):
        return softmax(scores.masked_fill(blind, 0.0), dim).masked_fill(blind, 0.0)

    torch.Tensor.softmax = safe
    try:
        return step(reference, x, masked)
    finally:
        torch.Tensor.softmax = softmax


def test_a_call_may_name_another_mask_type():
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS).eval()
    x = torch.randn(7, 3, HIDDEN)
    other = te.TransformerLayer(HIDDEN, FFN, HEADS, self_attn_mask_type="no_mask").eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, None, self_attn_mask_type="no_mask"), other(x, None))
    assert not torch.allclose(layer(x, None), other(x, None))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("mask_type", ["padding", "padding_causal"])
def test_input_formats_agree(rotary, mask_type):
    """The same tokens as (S, B, H), (B, S, H) and packed (T, H): outputs at tokens and all gradients."""
    lengths = torch.tensor([7, 4, 6])
    options = {"self_attn_mask_type": mask_type, "hidden_dropout": 0.0, "attention_dropout": 0.0, "num_gqa_groups": 2}
    layers = {
        f: te.TransformerLayer(HIDDEN, FFN, HEADS, attn_input_format=f, **options) for f in ("sbhd", "bshd", "thd")
    }
    for layer in layers.values():
        layer.load_state_dict(layers["sbhd"].state_dict())
    x = torch.randn(3, 7, HIDDEN)
    borders = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    extra = {"rotary_pos_emb": te.RotaryPositionEmbedding(6)(7)} if rotary else {}
    hidden = PADDING[:, None, None]
    results = {}
    for name, layer in layers.items():
        inp = {"sbhd": x.transpose(0, 1), "bshd": x, "thd": x[~PADDING]}[name].detach().requires_grad_()
        packing = {"cu_seqlens_q": borders, "cu_seqlens_kv": borders, "max_seqlen_q": 7, "max_seqlen_kv": 7}
        if name == "thd":
            out = layer(inp, **extra, **packing)
            torch.testing.assert_close(layer(inp, **extra, cu_seqlens_q=borders), out)  # looks the length up
        else:
            out = layer(inp, hidden, **extra)
        tokens = {"sbhd": lambda y: y.transpose(0, 1)[~PADDING], "bshd": lambda y: y[~PADDING], "thd": lambda y: y}[
            name
        ]
        dy = torch.randn(17, HIDDEN, generator=torch.Generator().manual_seed(3))
        layer.zero_grad()
        tokens(out).backward(dy)
        results[name] = [tokens(out), tokens(inp.grad), *(p.grad for p in layer.parameters())]
    for name in ("bshd", "thd"):
        for ours, expected in zip(results[name], results["sbhd"], strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_products_of_queries_and_keys_beyond_fp16_are_scaled_before_they_are_summed():
    """64 * 40 * 40 is over 65504, an eighth of it is not."""
    torch.manual_seed(0)
    outs = []
    for dtype in (torch.float16, torch.float32):
        q = torch.full((1, 6, 2, 64), 40.0, dtype=dtype, requires_grad=True)
        kv = torch.full((1, 6, 2, 2, 64), 40.0, dtype=dtype)
        kv[:, 3, 0] = 39.5
        kv[:, :, 1] = torch.arange(6.0)[None, :, None, None]
        dropping = Dropping(0.3, torch.tensor(5), 1)
        out = cross_attention(q, kv, Visibility(AttentionMask()), dropping, recompute=False)
        outs.append((out, *torch.autograd.grad(out.sum(), q)))
    for half, exact, atol in zip(*outs, (0.02, 0.2), strict=True):  # a gradient is a sum of terms 40 times as large
        torch.testing.assert_close(half.float(), exact, atol=atol, rtol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"apply_residual_connection_post_layernorm": True},
        {"output_layernorm": True},
        {"normalization": "RMSNorm", "output_layernorm": True},
        {"layer_type": "decoder"},
    ],
    ids=str,
)
def test_hooks_on_all_modules_inside_run_and_what_they_change_counts(options):
    torch.manual_seed(0)
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, **options).eval()
    x = torch.randn(7, 2, HIDDEN)
    rest = {"encoder_output": torch.randn(5, 2, HIDDEN)} if "layer_type" in options else {}
    expected, called, factors, seen = layer(x, **rest), [], torch.linspace(0.5, 2, HIDDEN), {}
    modules = {name: module for name, module in layer.named_modules() if not isinstance(module, Fp8State)}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(layer(x, **rest), expected)
    assert sorted(called) == sorted(modules)

    def scale(_, args):
        seen["x"] = args[0] * factors
        return seen["x"], *args[1:]

    layer.layernorm_mlp.register_forward_pre_hook(scale)
    layer.layernorm_mlp.register_forward_hook(lambda _, args, output: seen.update(output=output))
    y = layer(x, **rest)
    assert not torch.allclose(y, expected)
    for ours, direct in zip(seen["output"], layer.layernorm_mlp.forward(seen["x"]), strict=True):
        torch.testing.assert_close(ours, direct)
    if not options:
        torch.testing.assert_close(y, seen["x"] / factors + seen["output"][0] + seen["output"][1])
