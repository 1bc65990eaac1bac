"""The layer of te.TransformerLayer written out in plain torch, and pairs of ours and of that with the same weights."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from xformer_train.kernels import te

HIDDEN, FFN, HEADS = 24, 40, 4
PADDING = torch.arange(7) >= torch.tensor([7, 4, 6])[:, None]  # (B, S), True is hidden
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
