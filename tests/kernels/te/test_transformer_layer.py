"""te.TransformerLayer against the layer written out in plain torch with the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from conformance import step
from torch import nn

from xformer_train.kernels import te

HIDDEN, FFN, HEADS = 24, 40, 4
NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


class Attention(nn.Module):
    """Queries, keys and values from three projections, heads in order, scores written out; masked: True where hidden."""

    def __init__(self, layer):
        super().__init__()
        c, self.layer = layer.c, [layer]
        queries, keys = HEADS * c["head_dim"], c["groups"] * c["head_dim"]
        self.query = nn.Linear(HIDDEN, queries, bias=c["bias"])
        self.key = nn.Linear(HIDDEN, keys, bias=c["bias"])
        self.value = nn.Linear(HIDDEN, keys, bias=c["bias"])
        self.proj = nn.Linear(queries, HIDDEN, bias=c["bias"])

    def forward(self, x, source, masked, angles=None):  # x, source: (S, B, H)
        c = self.layer[0].c
        q, k, v = (
            p(y).unflatten(-1, (-1, c["head_dim"])).permute(1, 2, 0, 3)
            for p, y in ((self.query, x), (self.key, source), (self.value, source))
        )
        if angles is not None:
            q, k = (turn(part, angles) for part in (q, k))
        share = HEADS // c["groups"]
        k, v = (part.repeat_interleave(share, 1) for part in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(c["head_dim"])
        probabilities = scores.masked_fill(masked, -torch.inf).softmax(-1).nan_to_num(0)
        return self.proj((probabilities @ v).permute(2, 0, 1, 3).flatten(2))


def turn(x, angles):
    """RoFormer's formula with complex numbers: column i and i + half are real and imaginary part."""
    half = angles.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(
        torch.ones_like(angles[:, 0, 0, :half]), angles[:, 0, 0, :half]
    )
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


class Layer(nn.Module):
    def __init__(self, **c):
        super().__init__()
        defaults = {"head_dim": HIDDEN // HEADS, "groups": HEADS, "bias": True, "norm": "LayerNorm", "post_ln": False}
        self.c = c = defaults | {"output_ln": False, "decoder": False, "swiglu": False, "erf": False, "eps": 1e-5} | c
        norm = NORMS[c["norm"]]
        if not c["output_ln"]:
            self.norm1 = norm(HIDDEN, eps=c["eps"])
        self.attention = Attention(self)
        if c["decoder"]:
            self.norm_cross, self.cross = norm(HIDDEN, eps=c["eps"]), Attention(self)
        self.norm2 = norm(HIDDEN, eps=c["eps"])
        self.fc1 = nn.Linear(HIDDEN, FFN * (1 + c["swiglu"]), bias=c["bias"])
        self.fc2 = nn.Linear(FFN, HIDDEN, bias=c["bias"])
        if c["output_ln"]:
            self.norm3 = norm(HIDDEN, eps=c["eps"])

    def forward(self, x, masked, encoder_output=None, cross_masked=None, angles=None):
        c = self.c
        y = x if c["output_ln"] else self.norm1(x)
        x = (y if c["post_ln"] else x) + self.attention(y, y, masked, angles)
        if c["decoder"]:
            y = self.norm_cross(x)
            x = (y if c["post_ln"] else x) + self.cross(y, encoder_output, cross_masked)
        y = self.norm2(x)
        f = self.fc1(y)
        if c["swiglu"]:
            f = F.silu(f[..., :FFN]) * f[..., FFN:]
        else:
            f = F.gelu(f, approximate="none" if c["erf"] else "tanh")
        x = (y if c["post_ln"] else x) + self.fc2(f)
        return self.norm3(x) if c["output_ln"] else x


def by_reference_names(ours, values):
    """Parameters or gradients of our layer, by name, as those of `Layer`: names, and the layout of fused projections."""
    c, result = ours.config, {}
    dim, groups = c.head_dim, c.groups
    share = HEADS // groups
    names = {
        "self_attention.layernorm_qkv.layer_norm": "norm1",
        "inter_attention.layernorm_query.layer_norm": "norm_cross",
        "layernorm_mlp.layer_norm": "norm2",
        "layernorm_mlp.fc1": "fc1",
        "layernorm_mlp.fc2": "fc2",
    }
    for name, value in values.items():
        if name == "input":
            result[name] = value
            continue
        half = "attention" if name.startswith("self_") else "cross"
        kind = "bias" if name.endswith("bias") else "weight"
        stem = name[: -len(kind) - 1]
        last = name.split(".")[-1]
        if stem in names:
            result[f"{names[stem]}.{kind}"] = value
        elif name.startswith("layernorm."):
            result[f"norm3.{kind}"] = value
        elif stem.endswith("proj"):
            result[f"{half}.proj.{kind}"] = value
        elif last.removesuffix("_bias") in ("query", "key", "value"):
            result[f"{half}.{last.removesuffix('_bias')}.{kind}"] = value
        elif stem.endswith("qkv"):  # group by group: its queries, its key, its value
            q, k, v = value.unflatten(0, (groups, share + 2, dim)).split([share, 1, 1], 1)
            result |= {f"{half}.{n}.{kind}": p.flatten(0, 2) for n, p in (("query", q), ("key", k), ("value", v))}
        elif stem.endswith("layernorm_query"):
            result[f"{half}.query.{kind}"] = value
        else:
            assert stem.endswith("key_value")
            k, v = value.unflatten(0, (groups, 2, dim)).unbind(1)
            result |= {f"{half}.key.{kind}": k.flatten(0, 1), f"{half}.value.{kind}": v.flatten(0, 1)}
    return result


def pair(ours_options, reference_options, dtype=torch.float32):
    """Our layer in the dtype, all of its weights random, and the reference with the same weights in fp32 or wider."""
    ours = te.TransformerLayer(HIDDEN, FFN, HEADS, **{"hidden_dropout": 0.0, "attention_dropout": 0.0} | ours_options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    ours = ours.to(dtype)
    reference = Layer(**reference_options).to(torch.promote_types(dtype, torch.float32))
    reference.load_state_dict(by_reference_names(ours, dict(ours.named_parameters())))
    return ours, reference


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


PADDING = torch.arange(7) >= torch.tensor([7, 4, 6])[:, None]  # (B, S), True is hidden
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


def build(**options):
    return te.TransformerLayer(**{"hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2} | options)


X = torch.randn(5, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(num_attention_heads=3), "hidden_size=8 is not divisible by num_attention_heads=3"),
        (lambda: build(num_gqa_groups=3), "num_gqa_groups=3"),
        (lambda: build(hidden_dropout=1.0), "hidden_dropout=1.0"),
        (lambda: build(drop_path_rate=1.5), "drop_path_rate=1.5"),
        (lambda: build(self_attn_mask_type="diagonal"), "self_attn_mask_type='diagonal'"),
        (lambda: build(attn_input_format="hbsd"), "attn_input_format='hbsd'"),
        (lambda: build(layer_type="both"), "layer_type='both'"),
        (lambda: build(attn_input_format="thd", layer_type="decoder"), "this version"),
        (lambda: build(fuse_wgrad_accumulation=True), "fuse_qkv_params=True"),
        (lambda: build(tp_size=2), "set_parallel_mode=True"),
        (
            lambda: build(tp_size=3, num_attention_heads=4, set_parallel_mode=True),
            "num_attention_heads=4 is not divisible",
        ),
        (lambda: build(sequence_parallel=True), "sequence_parallel=True"),
        (
            lambda: build(tp_size=2, set_parallel_mode=True, sequence_parallel=True, attn_input_format="bshd"),
            "'sbhd' alone",
        ),
        (lambda: build(tp_size=2, set_parallel_mode=True)(X), "set_tensor_parallel_group"),
        (lambda: build()(X[0]), "'sbhd' has 3 dims"),
        (lambda: build()(X[..., :7]), "hidden_size=8"),
        (lambda: build()(X.bfloat16()), "the parameters are torch.float32"),
        (lambda: build()(X, torch.zeros(2, 1, 1, 5)), "must be bool"),
        (lambda: build()(X, torch.zeros(2, 5, dtype=torch.bool)), r"\(B or 1, 1, Sq or 1, Sk\)"),
        (lambda: build()(X, torch.zeros(2, 1, 1, 4, dtype=torch.bool)), "B=2, Sq=5, Sk=5"),
        (lambda: build(self_attn_mask_type="no_mask")(X, torch.zeros(2, 1, 1, 5, dtype=torch.bool)), "'no_mask'"),
        (lambda: build(self_attn_mask_type="arbitrary")(X), "'arbitrary'"),
        (lambda: build()(X, inference_params=object()), "inference_params"),
        (lambda: build()(X, None, X), "layer_type='encoder'"),
        (lambda: build(layer_type="decoder")(X), "encoder_output is missing"),
        (lambda: build(layer_type="decoder")(X, None, X[:, :1]), "equally many"),
        (
            lambda: build(layer_type="decoder")(X, None, X, enc_dec_attn_mask_type="causal"),
            "enc_dec_attn_mask_type='causal'",
        ),
        (lambda: build(attn_input_format="thd")(X[0]), "cu_seqlens_q"),
        (lambda: build()(X, cu_seqlens_q=torch.tensor([0, 5], dtype=torch.int32)), "attn_input_format='thd'"),
        (lambda: build()(X, rotary_pos_emb=torch.zeros(4, 1, 1, 4)), "rotary_pos_emb"),
    ],
)
def test_wrong_use_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="window_size"):
        build(window_size=(2, 2))
