"""One training step of one BERT layer: ours against the stock layers, side by side in one process.

Rows take turns, round by round, so that a busy machine slows all of them alike; figures are medians over the rounds. Every
row has the same shape, padding mask and dropout. Prints a table last, and writes JSON.
"""

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer

SHAPES = {  # hidden, heads, feed-forward, batch, sequence
    "bert-tiny": (128, 2, 512, 16, 128),
    "bert-base": (768, 12, 3072, 8, 128),
    "bert-large-128": (1024, 16, 4096, 64, 128),
    "bert-large-512": (1024, 16, 4096, 16, 512),
}


@dataclass(frozen=True)
class Row:
    """A way to compute the layer: forward takes (B, S, H) and gives the same."""

    name: str
    forward: Callable[[Tensor], Tensor]


class PlainLayer(nn.Module):
    """The post-LN layer as one would write it with torch's own functions."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        size, self.heads, self.p = config.hidden_size, config.num_attention_heads, config.hidden_dropout_prob
        self.qkv, self.project = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, config.intermediate_size), nn.Linear(config.intermediate_size, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, S, H) from (B, S, H) and an additive mask (B, 1, 1, S)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=self.p).transpose(1, 2).flatten(2)
        x = self.norm1(x + F.dropout(self.project(context), self.p))
        return self.norm2(x + F.dropout(self.down(F.gelu(self.up(x))), self.p))


def rows_of(config: LayerConfig, key_mask: Tensor, dtype: torch.dtype) -> list[Row]:
    """Every row that this machine can run."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    device, mask = key_mask.device, AttentionMask(key_mask=key_mask)
    bias = mask.additive(key_mask.shape[1], torch.empty((), dtype=dtype, device=device))
    assert bias is not None, "there is a mask"
    flags = {"normalize_invertible": True, "gelu_checkpoint": True, "attn_dropout_checkpoint": True}

    def on_device(module: nn.Module) -> nn.Module:
        return module.to(device, dtype).train()

    ours, saving = (on_device(TransformerLayer(c)) for c in (config, replace(config, **flags)))  # type: ignore[arg-type]
    plain = on_device(PlainLayer(config))
    compiled = torch.compile(plain)
    stock = on_device(
        BertLayer(
            BertConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_dropout_prob=config.hidden_dropout_prob,
                attention_probs_dropout_prob=config.attention_probs_dropout_prob,
                attn_implementation="sdpa",
            )
        )
    )
    encoder = on_device(
        nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            "gelu",
            batch_first=True,
        )
    )
    return [
        Row("ours", lambda x: ours(x, mask)),
        Row("ours, all memory flags", lambda x: saving(x, mask)),
        Row("torch, written out", lambda x: plain(x, bias)),
        # on a CPU, torch.compile needs a compiler
        *(
            [Row("torch.compile of it", lambda x: compiled(x, bias))]
            if device.type == "cuda" or shutil.which("c++")
            else []
        ),
        Row("transformers BertLayer", lambda x: _first(stock(x, bias))),
        Row("nn.TransformerEncoderLayer", lambda x: encoder(x, src_key_padding_mask=~key_mask)),
    ]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def saved_bytes(row: Row, x: Tensor) -> int:
    """Bytes kept for backward by one forward pass: distinct storages, parameters included alike in every row."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        row.forward(x)
    return sum(seen.values())


def time_once(row: Row, x: Tensor, dy: Tensor) -> tuple[float, float]:
    """Seconds of (forward, backward)."""

    def now() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    started_s = now()
    y = row.forward(x)
    middle_s = now()
    y.backward(dy)
    return middle_s - started_s, now() - middle_s


def measure(shape: str, dtype: torch.dtype, rounds: int, p: float) -> list[dict[str, Any]]:
    """One record per row."""
    size, heads, width, batch, length = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LayerConfig(
        size, heads, width, hidden_dropout_prob=p, attention_probs_dropout_prob=p, pre_layer_norm=False
    )
    key_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    key_mask[:: max(2, batch // 4), length - length // 8 :] = False
    x = torch.randn(batch, length, size, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    rows = rows_of(config, key_mask, dtype)
    times: dict[str, list[tuple[float, float]]] = {row.name: [] for row in rows}
    for turn in range(rounds + 2):
        for row in rows:
            pair = time_once(row, x, dy)
            if turn >= 2:  # the first two warm up, and torch.compile compiles
                times[row.name].append(pair)
    records = []
    for row in rows:
        forward, backward = (statistics.median(pair[i] for pair in times[row.name]) for i in (0, 1))
        both = statistics.median(sum(pair) for pair in times[row.name])
        saved = saved_bytes(row, x)
        records.append({"shape": shape, "row": row.name, "forward_s": forward, "backward_s": backward, "both_s": both})
        records[-1] |= {"saved_bytes": saved}
    for record in records:
        record["speedup_of_ours"] = record["both_s"] / records[0]["both_s"]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["bert-tiny", "bert-base"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    records = []
    for shape in arguments.shapes:
        records += measure(shape, getattr(torch, arguments.dtype), arguments.rounds, arguments.dropout)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = f"{device}, {platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    if arguments.out is not None:
        arguments.out.write_text(
            json.dumps({"machine": machine, **vars(arguments), "out": None, "rows": records}, indent=2)
        )
    print(f"{machine}; {arguments.dtype}, dropout {arguments.dropout}, medians of {arguments.rounds} rounds")
    print(f"{'shape':15} {'row':28}{'fwd ms':>9}{'bwd ms':>9}{'both ms':>9}{'ours is':>9}{'saved MiB':>11}")
    for r in records:
        times = "".join(f"{1e3 * r[key]:9.2f}" for key in ("forward_s", "backward_s", "both_s"))
        print(f"{r['shape']:15} {r['row']:28}{times}{r['speedup_of_ours']:8.2f}x{r['saved_bytes'] / 2**20:11.1f}")


if __name__ == "__main__":
    main()
