"""Every op as an operator of torch.library: what traces rely on, on the CPU path and on the GPU path without a GPU."""

import itertools
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer
from xformer_train.kernels.layers.layer import invertible_norms
from xformer_train.kernels.ops.attention import attention
from xformer_train.kernels.ops.attention.attention_product import _product_forward as product_forward
from xformer_train.kernels.ops.attention.heads import _turned_heads as turned_heads
from xformer_train.kernels.ops.attention.rotary import rotary_table
from xformer_train.kernels.ops.choices import Activation
from xformer_train.kernels.ops.loss import cross_entropy
from xformer_train.kernels.ops.loss.cross_entropy import linear_cross_entropy
from xformer_train.kernels.ops.mlp import activation
from xformer_train.kernels.ops.norm import head_norm, residual_norm

T, H, F, V = 5, 8, 12, 7
OPTIONS = (1e-5, 0.3, 2, False, "auto")  # eps, p, site, inverted, kernels
NO_DROPOUT = (1e-5, 0.0, 2, False, "auto")


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def cases():
    """(operator's name, arguments)"""
    seed, vector = torch.tensor(3), rows(H)
    z, statistic = rows(T, H), rows(T).abs()
    yield "residual_norm_forward", (rows(T, H), vector, z, vector, vector, seed, *OPTIONS)
    yield "residual_norm_forward", (None, None, z, vector, vector, None, *NO_DROPOUT)
    half = rows(T, H, dtype=torch.bfloat16)
    yield "residual_norm_forward", (half, None, half, vector.bfloat16(), vector.bfloat16(), seed, *OPTIONS)
    yield "residual_norm_backward", (z, z, z, statistic, statistic, vector, vector, vector, seed, *OPTIONS)
    yield "residual_norm_backward", (None, z, z, statistic, statistic, vector, vector, None, None, *NO_DROPOUT)
    inverted = (1e-5, 0.3, 2, True, "auto")
    yield "residual_norm_backward", (z, z, z, None, statistic, vector, vector, vector, seed, *inverted)
    for bias in (vector, None):
        yield "residual_add_forward", (z, bias, rows(T, H), seed, *OPTIONS)
        yield "residual_add_backward", (z, bias, seed, *OPTIONS)
    yield "residual_add_backward", (z, vector, None, *NO_DROPOUT)
    rms = (1e-5, 0.3, 2, False, "auto", True, "rms_norm")
    yield "residual_norm_forward", (z, None, rows(T, H), vector, None, seed, *rms)
    yield "residual_norm_backward", (z, z, z, None, statistic, vector, None, None, seed, *rms)
    yield "residual_norm_backward", (None, z, z, statistic, statistic, vector, None, None, None, *NO_DROPOUT)
    for name, gated in itertools.product(get_args(Activation), (False, True)):
        f = rows(T, 2 * F if gated else F)
        yield "activation_forward", (f, name, gated, "auto")
        backward = "gate_backward_" if gated else "activation_backward_"
        for recompute, with_bias in itertools.product((False, True), (False, True)):
            yield backward, (rows(T, F), f, name, recompute, with_bias, "auto")
    for dtype in (torch.float32, torch.bfloat16):
        heads, weight = rows(T, 5, H, dtype=dtype), rows(H, dtype=dtype)
        yield "head_norm_forward", (heads, weight, weight, 1e-6, 1, "auto")
        yield "head_norm_backward", (rows(T, 5, H, dtype=dtype), heads, rows(T, 4), weight, weight, 1, "auto")
    qkv, packed, borders = rows(2, 4, 3, 2, 3), rows(6, 3, 2, 3), torch.tensor([0, 2, 6], dtype=torch.int32)
    mask = AttentionMask(cu_seqlens=borders, max_length=4)
    yield from attention_cases(qkv, packed, mask, seed)
    for bias in (vector, None):
        yield "onednn_product", (rows(T, F), rows(H, F), bias)
    labels = torch.tensor([0, 6, -100, 3, 3])
    for dtype in (torch.float32, torch.bfloat16):
        yield "softmax_loss_", (rows(T, V, dtype=dtype), labels, "auto")


def attention_cases(qkv, packed, mask, seed):
    """B=2, S=4 of N=2 heads with D=3 columns; then S=70 in windows, N=4 of G=2 with D=4, which rotary turns."""
    for layout, bias, places in (
        (qkv, None, None),
        (qkv, rows(2, 1, 1, 4), None),
        (packed, mask.additive(4, packed), mask.rows_when_padded(6)),
    ):
        pattern = (2, 4, 2, None, False, None, 0.3, 1)
        yield "attention_product_forward", (layout, bias, places, None, seed, *pattern, "nothing")
        out, parts, *kept = product_forward(layout, bias, places, None, seed, *pattern, "nothing")
        saved = parts if places is None else [layout]
        for probabilities, dropped in (kept, (kept[0], []), ([], [])):
            yield "attention_product_backward", (out, saved, probabilities, dropped, bias, places, None, seed, *pattern)
    grouped, rotary = rows(2, 70, 8, 4), rotary_table(70, 4, 1e4)
    for given_seed, p, recompute in ((None, 0.0, "core"), (seed, 0.3, "dropout"), (seed, 0.3, "nothing")):
        bias = AttentionMask(causal=True).additive(70, grouped, 3)
        arguments = (grouped, bias, None, rotary, given_seed, 2, 70, 4, 2, True, 3, p, 1)
        yield "attention_product_forward", (*arguments, recompute)
        out, parts, *kept = product_forward(*arguments, recompute)
        yield "attention_product_backward", (out, parts, *kept, *arguments[1:])
    for layout, key_heads, table in ((qkv, None, None), (grouped, 2, rotary), (grouped.transpose(0, 1), 2, rotary)):
        yield "attention_heads_first", (layout, table, key_heads)
    for layout, key_heads in ((rows(2, 70, 3, 2, 4), None), (grouped, 2), (grouped.transpose(0, 1), 2)):
        table = rotary_table(layout.shape[1], 4, 1e4)
        yield "attention_turned_heads", (layout, table, key_heads)
        parts = turned_heads(layout, table, key_heads)
        yield "attention_turned_back", (*parts, table, key_heads)
    yield "attention_heads_last", (rows(8, 70, 4), rows(4, 70, 4), rows(4, 70, 4), rotary, 2, 2, 4)
    yield "attention_heads_last", (*rows(3, 4, 4, 3), None, None, 2, 2)


@pytest.mark.parametrize(("name", "arguments"), list(cases()))
def test_operators_keep_torchs_rules(name, arguments):
    """Schema (what is overwritten, nothing shared) and fake results of every operator."""
    operator = getattr(torch.ops.xformer_train, name).default
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


OF_2018: dict[str, Any] = {}
OF_TODAY: dict[str, Any] = {
    "norm": "rms_norm",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "gated_mlp": True,
    "num_key_value_heads": 1,
    "qk_norm": True,
    "rope_theta": 1e4,
    "attention_window": 2,
}


@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", [OF_2018, OF_TODAY], ids=["of 2018", "of today"])
def test_no_step_of_the_gpu_path_makes_the_host_wait(flags, pre_layer_norm, packed, kind, monkeypatch):
    """On the meta device, where reading a value raises, the ops of the GPU path are their fake implementations."""
    for module in (activation, attention, cross_entropy, head_norm, residual_norm):
        monkeypatch.setattr(module, "uses_triton", lambda *_: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    config = LayerConfig(
        24,
        3,
        40,
        pre_layer_norm=pre_layer_norm,
        normalize_invertible=flags,
        gelu_checkpoint=flags,
        attn_dropout_checkpoint=flags,
        stochastic_mode=flags,
        **kind,
    )

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    layer = TransformerLayer(config).to("meta", torch.bfloat16)
    if packed:
        mask = AttentionMask(cu_seqlens=empty(4, dtype=torch.int32), max_length=9)
    else:
        mask = AttentionMask(key_mask=empty(3, 9, dtype=torch.bool))
    x = empty(*((20,) if packed else (3, 9)), 24).requires_grad_()
    y = layer(x, mask, invertible=(flags, flags))
    weight = empty(50, 24).requires_grad_()
    loss = linear_cross_entropy(y.flatten(0, -2), weight, None, empty(y.numel() // 24, dtype=torch.int64))
    loss.backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in layer.parameters())


@pytest.mark.parametrize(("index", "expected"), [(0, []), (1, [1])])
def test_an_op_runs_on_the_device_of_its_tensors(index, expected, monkeypatch):
    """Triton launches on the current device, whatever the tensors' is."""
    entered = []

    @contextmanager
    def device(other):
        entered.append(other.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        z, vector = torch.empty(T, H, device=f"cuda:{index}"), torch.empty(H, device=f"cuda:{index}")
        residual_norm.norm(z, vector, vector, eps=1e-5, kernels="reference")
    assert entered == expected


def test_a_trace_asks_to_be_told_which_norms_may_be_inverted():
    config = LayerConfig(24, 3, 40, normalize_invertible=True)
    layer, x = TransformerLayer(config), torch.randn(2, 9, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="invertible_norms"):
        compiled(x)
    (answer,) = invertible_norms([layer])
    assert answer == (True, True)
    compiled(x, invertible=answer).sum().backward()
