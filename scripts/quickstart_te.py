"""A GPT layer four times, from plain torch to `te.TransformerLayer`, and the last in FP8: the same weights, then the times.

All have the same function, so their outputs and input gradients without dropout have to agree; the exit status is 1 where they
do not. Each is then timed, forward and backward, with dropout and without a mask. FP8 has real products on GPUs of compute
capability 8.9 and more; elsewhere it is emulated and slower than without.

    python scripts/quickstart_te.py                  small on a CPU, the size of Transformer Engine's tutorial on a GPU
    python scripts/quickstart_te.py --hidden 512 --ffn 2048 --heads 8 --dtype bfloat16
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_train.kernels import te
from xformer_train.kernels.fp8.linear import fp8_path

DROPOUT = 0.1
# relative, of the whole tensor; the FP8 row against the same layer without FP8
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
FP8_TOLERANCE = 0.1


@dataclass(frozen=True)
class Shape:
    """H, F, N, S and B."""

    hidden: int
    ffn: int
    heads: int
    sequence: int
    batch: int


CPU_SHAPE, GPU_SHAPE = Shape(256, 1024, 8, 128, 2), Shape(4096, 16384, 32, 2048, 4)


def attention(qkv: Tensor, heads: int, p: float) -> Tensor:
    """(S, B, H) of a projection (S, B, 3 H) in which every head has its query, key and value side by side."""
    q, k, v = (part.permute(1, 2, 0, 3) for part in qkv.unflatten(-1, (heads, -1)).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).permute(2, 0, 1, 3).flatten(2)


class PlainLayer(nn.Module):
    """Step 1: torch's own modules, activations (S, B, H)."""

    norm: type[nn.Module] = nn.LayerNorm
    linear: type[nn.Module] = nn.Linear

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1 = self.norm(shape.hidden)
        self.qkv = self.linear(shape.hidden, 3 * shape.hidden)
        self.projection = self.linear(shape.hidden, shape.hidden)
        self.norm2 = self.norm(shape.hidden)
        self.fc1 = self.linear(shape.hidden, shape.ffn)
        self.fc2 = self.linear(shape.ffn, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        p = DROPOUT if self.training else 0.0
        x = x + F.dropout(self.projection(attention(self.qkv(self.norm1(x)), self.heads, p)), p)
        return x + F.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh")), p)


class SwappedLayer(PlainLayer):
    """Step 2: the same program, its modules replaced one by one."""

    norm = te.LayerNorm
    linear = te.Linear


class FusedLayer(nn.Module):
    """Step 3: modules that begin with their LayerNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_qkv = te.LayerNormLinear(shape.hidden, 3 * shape.hidden)
        self.projection = te.Linear(shape.hidden, shape.hidden)
        self.norm_mlp = te.LayerNormMLP(shape.hidden, shape.ffn)

    def forward(self, x: Tensor) -> Tensor:
        p = DROPOUT if self.training else 0.0
        x = x + F.dropout(self.projection(attention(self.norm_qkv(x), self.heads, p)), p)
        return x + F.dropout(self.norm_mlp(x), p)


def whole_layer(shape: Shape) -> te.TransformerLayer:
    """Step 4: the layer as one module. Its one QKV parameter has the layout that `attention` above reads."""
    return te.TransformerLayer(
        shape.hidden,
        shape.ffn,
        shape.heads,
        hidden_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        self_attn_mask_type="no_mask",
        fuse_qkv_params=True,
    )


# a module's name for each module of the plain layer; a trailing _ is a prefix within a name
FUSED_NAMES = {
    "norm1.": "norm_qkv.layer_norm_",
    "qkv.": "norm_qkv.",
    "projection.": "projection.",
    "norm2.": "norm_mlp.layer_norm_",
    "fc1.": "norm_mlp.fc1_",
    "fc2.": "norm_mlp.fc2_",
}
WHOLE_NAMES = {
    "norm1.": "self_attention.layernorm_qkv.layer_norm_",
    "qkv.": "self_attention.layernorm_qkv.",
    "projection.": "self_attention.proj.",
    "norm2.": "layernorm_mlp.layer_norm_",
    "fc1.": "layernorm_mlp.fc1_",
    "fc2.": "layernorm_mlp.fc2_",
}


def share_weights(layer: nn.Module, plain: PlainLayer, names: dict[str, str]) -> None:
    """Loads the plain layer's weights by the names they have in this layer."""
    renamed = {}
    for name, value in plain.state_dict().items():
        module, _, kind = name.partition(".")
        renamed[names.get(f"{module}.", f"{module}.") + kind] = value
    layer.load_state_dict(renamed)


@dataclass(frozen=True)
class Version:
    """One row of the table. region: what its forward pass runs in."""

    name: str
    layer: nn.Module
    region: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


def step(version: Version, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient; FP8 wraps the forward pass alone."""
    version.layer.zero_grad()
    x = x.detach().requires_grad_()
    with version.region():
        out = version.layer(x)
    out.backward(dy)
    assert x.grad is not None
    return out.detach(), x.grad


def relative_error(ours: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The larger of the relative distances of two outputs and two gradients."""
    pairs = zip(ours, expected, strict=True)
    return max(((mine - theirs).float().norm() / theirs.float().norm()).item() for mine, theirs in pairs)


def median_ms(version: Version, x: Tensor, dy: Tensor, steps: int) -> float:
    """Milliseconds of one step."""
    times = []
    for _ in range(steps + 2):  # two to warm up
        start = time.perf_counter()
        step(version, x, dy)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def versions(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Version]:
    """All five, with the same weights; the fifth is the fourth in FP8."""
    plain = PlainLayer(shape).to(device, dtype)
    layers = (SwappedLayer(shape), {}), (FusedLayer(shape), FUSED_NAMES), (whole_layer(shape), WHOLE_NAMES)
    for layer, names in layers:
        share_weights(layer.to(device, dtype), plain, names)
    swapped, fused, whole = (layer for layer, _ in layers)
    recipe = te.DelayedScaling(fp8_format=te.Format.HYBRID, amax_history_len=16, amax_compute_algo="max")
    return [
        Version("plain torch", plain),
        Version("te.Linear, te.LayerNorm", swapped),
        Version("te.LayerNormLinear, te.LayerNormMLP", fused),
        Version("te.TransformerLayer", whole),
        Version("te.TransformerLayer in FP8", whole, lambda: te.fp8_autocast(enabled=True, fp8_recipe=recipe)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 0 where all agree."""
    gpu = torch.cuda.is_available()
    default = GPU_SHAPE if gpu else CPU_SHAPE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=["float32", "bfloat16", "float16"])
    for name in ("hidden", "ffn", "heads", "sequence", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each version")
    args = parser.parse_args(arguments)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = Shape(args.hidden, args.ffn, args.heads, args.sequence, args.batch)
    torch.manual_seed(1234)
    rows = versions(shape, device, dtype)
    x, dy = (torch.randn(shape.sequence, shape.batch, shape.hidden, device=device, dtype=dtype) for _ in range(2))
    print(f"torch {torch.__version__}, {device}, {args.dtype}, {shape}; {fp8_path(device)}")
    print(f"{'':<38}{'error':>10}{'ms':>10}")
    reference, wrong = rows[0], []
    for row in rows:
        in_fp8 = row is rows[-1]
        row.layer.eval()
        if in_fp8:
            step(row, x, dy)  # delayed scaling knows no amax in its first step
        error = relative_error(step(row, x, dy), step(reference, x, dy))
        if not error <= (FP8_TOLERANCE if in_fp8 else TOLERANCES[dtype]):
            wrong.append(row.name)
        row.layer.train()
        print(f"{row.name:<38}{error:>10.1e}{median_ms(row, x, dy, args.steps):>10.2f}")
        reference.layer.eval()
    if wrong:
        print(f"not the same function as plain torch: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
