"""The cases DeepSpeed tests its transformer kernel with, held to a plain tanh-GELU layer in twice the precision.

DeepSpeed compares one sample of the output, and no gradient of queries and keys; here all of both count. An error is the
Euclidean norm of the difference to the same stack in the next wider precision, per parameter (query, key and value apart).
Ours may be at most twice that of the plain stack in the same precision, plus one rounding of the tensor the parameter is
part of, because some gradients, as that of the key bias, are zero but for rounding.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xformer_train.kernels.deepspeed.config import DeepSpeedTransformerConfig
from xformer_train.kernels.deepspeed.layer import DeepSpeedTransformerLayer

EPS = 1e-12
NAMES = [
    *("query_w", "key_w", "value_w", "attn_ow", "attn_nw", "inter_w", "output_w", "norm_w"),
    *("query_b", "key_b", "value_b", "attn_ob", "attn_nb", "inter_b", "output_b", "norm_b"),
]


@dataclass(frozen=True)
class Case:
    """A stack without dropout. width: intermediate_size / hidden_size, 4 in DeepSpeed's forward tests, 1 in its others."""

    pre_layer_norm: bool
    batch: int
    hidden: int
    seq: int
    heads: int
    depth: int
    width: int = 4
    dtype: torch.dtype = torch.float32

    def __str__(self):
        sizes = f"B{self.batch}-H{self.hidden}-S{self.seq}-A{self.heads}-L{self.depth}-x{self.width}"
        return f"{'pre' if self.pre_layer_norm else 'post'}-{sizes}-{str(self.dtype).removeprefix('torch.')}"

    def scaled(self):
        """The same head size, sequence length and depth, small enough for one core, in fp32; an odd head count stays odd."""
        head_size = self.hidden // self.heads
        if head_size > 256:
            return Case(self.pre_layer_norm, 2, head_size, 16, 1, 2, self.width)
        heads = min(self.heads, 2 + self.heads % 2)
        return Case(self.pre_layer_norm, min(self.batch, 2), head_size * heads, self.seq, heads, self.depth, self.width)


def cases(pre_layer_norm, dtype, width, *sizes):
    return [Case(pre_layer_norm, *size, width, dtype) for size in sizes]


HALF, SINGLE = torch.float16, torch.float32
DEEPSPEEDS_CASES = [
    *cases(True, HALF, 4, (8, 160, 128, 2, 3), (8, 1600, 128, 2, 3), (8, 1600, 128, 25, 3), (8, 256, 52, 4, 3)),
    *cases(True, HALF, 4, (3, 1024, 54, 16, 3), (8, 1024, 384, 16, 3), (8, 1024, 120, 16, 3), (8, 1024, 512, 16, 3)),
    *cases(True, HALF, 4, (8, 128, 128, 2, 3), (8, 4096, 128, 64, 3), (1, 256, 2048, 32, 3), (8, 2048, 2048, 32, 1)),
    *cases(True, SINGLE, 4, (3, 1024, 51, 16, 3), (8, 1024, 381, 16, 3), (8, 1024, 119, 16, 3), (8, 1024, 509, 16, 3)),
    *cases(True, SINGLE, 4, (8, 128, 128, 2, 3), (64, 1024, 128, 16, 3)),
    *cases(True, HALF, 4, (64, 1024, 128, 16, 3)),
    *cases(False, HALF, 4, (64, 160, 128, 2, 24), (8, 160, 128, 2, 3), (8, 1600, 128, 25, 3), (64, 1024, 53, 16, 3)),
    *cases(False, HALF, 4, (64, 1024, 21, 16, 3), (8, 1024, 384, 16, 3), (8, 1024, 511, 16, 3), (8, 1536, 128, 24, 3)),
    *cases(False, HALF, 4, (8, 2048, 128, 32, 3), (8, 2560, 128, 40, 3), (8, 8192, 128, 64, 3), (64, 1024, 128, 16, 3)),
    *cases(
        False, SINGLE, 4, (64, 1024, 56, 16, 3), (64, 1024, 24, 16, 3), (8, 1024, 384, 16, 3), (8, 1024, 512, 16, 3)
    ),
    *cases(
        False, SINGLE, 4, (8, 1536, 128, 24, 3), (8, 2048, 128, 32, 3), (8, 2560, 128, 40, 3), (64, 1024, 128, 16, 3)
    ),
    *cases(False, HALF, 1, (64, 160, 128, 2, 24), (64, 1600, 128, 2, 4), (3, 1024, 56, 16, 24), (3, 128, 56, 2, 24)),
    *cases(False, SINGLE, 1, (3, 1024, 56, 16, 24), (3, 128, 56, 2, 24), (3, 1024, 128, 16, 24)),
    *cases(True, HALF, 1, (8, 1600, 128, 25, 3), (8, 160, 128, 2, 3), (8, 1600, 128, 2, 3), (3, 1024, 120, 16, 24)),
    *cases(True, SINGLE, 1, (3, 1024, 120, 16, 24), (3, 1024, 128, 16, 24)),
]


def initial_values(case):
    """The 16 tensors of every layer in DeepSpeed's order: weights, then biases."""
    H, inner = case.hidden, case.hidden * case.width
    shapes = [(H, H)] * 4 + [(H,), (inner, H), (H, inner), (H,)] + [(H,)] * 5 + [(inner,), (H,), (H,)]
    layers = []
    for _ in range(case.depth):
        values = [0.02 * torch.randn(shape) for shape in shapes]
        for norm in (4, 7):
            values[norm] = 1 + 5 * values[norm]
        layers.append(values)
    return layers


def padded_mask(batch, seq):
    """Random scores to add, and -10000 on the last keys: none of the first sample, half or so of the last one."""
    padding = torch.arange(seq) >= torch.linspace(seq, seq // 2 + 1, batch)[:, None]
    return (torch.randn(batch, seq) - 10000.0 * padding).view(batch, 1, 1, seq)


def plain_layer(x, values, mask, case):
    p = dict(zip(NAMES, values, strict=True))
    size = case.hidden

    def attend(x):
        q, k, v = (
            F.linear(x, p[name + "_w"], p[name + "_b"]).unflatten(2, (case.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(size // case.heads) + mask
        return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), p["attn_ow"], p["attn_ob"])

    def feed_forward(x):
        inner = F.gelu(F.linear(x, p["inter_w"], p["inter_b"]), approximate="tanh")
        return F.linear(inner, p["output_w"], p["output_b"])

    def norm(x, name):
        return F.layer_norm(x, (size,), p[name + "w"], p[name + "b"], EPS)

    if case.pre_layer_norm:
        x = x + attend(norm(x, "norm_"))
        return x + feed_forward(norm(x, "attn_n"))
    x = norm(x + attend(x), "attn_n")
    return norm(x + feed_forward(x), "norm_")


def results(stack, parameters, x, target, case):
    """Output and all gradients of DeepSpeed's test loss by name; `stack` maps hidden states to hidden states."""
    x = x.detach().requires_grad_()
    y = stack(x)
    if case.pre_layer_norm:
        y = F.layer_norm(y, (case.hidden,))
    # fp32, because the sum of the large cases is beyond the largest half-precision number
    loss = (
        (target.float() - y.float()).square().sum() / 64
        if x.dtype != torch.float64
        else (target - y).square().sum() / 64
    )
    gradients = torch.autograd.grad(loss, [x, *parameters.values()])
    return {"output": y.detach(), "hidden_states": gradients[0], **dict(zip(parameters, gradients[1:], strict=True))}


def distance(a, b):
    """The norm of their difference, in fp64 on their device, tensor by tensor: the large cases have gigabytes of gradients."""
    return (a.double() - b.double()).norm()


def plain_results(layers, x, mask, target, case, dtype):
    layers = [[value.to(dtype).detach().requires_grad_() for value in values] for values in layers]
    parameters = {
        f"{i}.{name}": value for i, values in enumerate(layers) for name, value in zip(NAMES, values, strict=True)
    }

    def stack(hidden):
        for values in layers:
            hidden = plain_layer(hidden, values, mask.to(dtype), case)
        return hidden

    return results(stack, parameters, x.to(dtype), target.to(dtype), case)


def door_results(layers, x, mask, target, case, **config):
    options = {
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden * case.width,
        "heads": case.heads,
        "attn_dropout_ratio": 0.0,
        "hidden_dropout_ratio": 0.0,
        "num_hidden_layers": case.depth,
        "initializer_range": 0.02,
        "layer_norm_eps": EPS,
        "pre_layer_norm": case.pre_layer_norm,
        "fp16": case.dtype == torch.float16,
    }
    with x.device:
        made = nn.ModuleList(
            DeepSpeedTransformerLayer(DeepSpeedTransformerConfig(**options, **config), values[:8], values[8:])
            for values in layers
        ).to(case.dtype)

    def stack(hidden):
        for layer in made:
            hidden = layer(hidden, mask.to(case.dtype))
        return hidden

    whole = results(stack, dict(made.named_parameters()), x.to(case.dtype), target.to(case.dtype), case)
    for i in range(case.depth):
        for kind in ("w", "b"):
            parts = whole.pop(f"{i}.attn_qkv{kind}").chunk(3)
            whole |= {f"{i}.{name}_{kind}": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
    return whole


def scale_of(name, exact):
    """The norm of the tensor that a result is part of: queries, keys and values share one."""
    layer, _, parameter = name.rpartition(".")
    if parameter.startswith(("query", "key", "value")):
        return math.sqrt(
            sum(exact[f"{layer}.{part}{parameter[-2:]}"].double().norm() ** 2 for part in ("query", "key", "value"))
        )
    return exact[name].double().norm()


def check(case, device="cpu", **config):
    torch.manual_seed(123)
    with torch.device(device):  # a CPU would take minutes for the billions of weights of all cases
        layers = [[value.to(case.dtype) for value in values] for values in initial_values(case)]
        x, target = (torch.randn(case.batch, case.seq, case.hidden).to(case.dtype) for _ in range(2))
        mask = padded_mask(case.batch, case.seq).to(case.dtype)
    wider = torch.float64 if device == "cpu" or case.dtype == torch.float32 else torch.float32
    exact = plain_results(layers, x, mask, target, case, wider)
    plain = plain_results(layers, x, mask, target, case, case.dtype)
    ours = door_results(layers, x, mask, target, case, **config)
    assert ours.keys() == exact.keys()
    too_far = {}
    for name, value in exact.items():
        allowed = 2 * distance(plain[name], value) + torch.finfo(case.dtype).eps * scale_of(name, exact)
        error = distance(ours[name], value)
        assert allowed.isfinite(), f"{name}: the plain stack overflows"
        if not error <= allowed:
            too_far[name] = f"{error:.3g} > {allowed:.3g}"
    assert not too_far


@pytest.mark.parametrize("case", dict.fromkeys(case.scaled() for case in DEEPSPEEDS_CASES), ids=str)
def test_scaled_cases_of_deepspeeds_suite_are_as_exact_as_a_plain_stack(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", DEEPSPEEDS_CASES, ids=str)
def test_cases_of_deepspeeds_suite_are_as_exact_as_a_plain_stack(case):
    check(case, device="cuda")


@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("batch", [3, 7])
def test_batches_below_the_configured_one_are_as_exact(pre_layer_norm, batch):
    check(Case(pre_layer_norm, batch, 64, 40, 2, 3), batch_size=8, max_seq_length=40)


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_bf16_is_as_exact_as_a_plain_stack(pre_layer_norm):
    check(Case(pre_layer_norm, 2, 160, 37, 2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_memory_flags_are_as_exact(pre_layer_norm):
    flags = dict.fromkeys(("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint"), True)
    check(Case(pre_layer_norm, 2, 64, 51, 2, 3), **flags)
