"""Training steps of stock transformers models and of the same models after `swap`, side by side in one process.

Each model has random weights and its sdpa attention; the swapped one is a copy of it, with the same weights, batch, AdamW and
dropout of 0.1. Before anything is timed, their losses without dropout are compared; the exit status is 1 if they differ. The
two take turns, step by step on a CPU and ten steps by ten on a GPU, so that a busy or hot machine slows both alike; figures
are medians over the turns. A step is forward, loss, backward and optimizer step.

  step ms    median
  saved MiB  what forward keeps for backward at its end, which is its peak, without parameters
  peak MiB   what a step takes from a GPU's memory, gradients too, besides parameters and the optimizer's state
  ratios     stock over swapped for the time, swapped over stock for the memory
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_device import default_device, machine_line, synchronize
from saved_activations import count_saved_bytes
from torch import Tensor, nn

from xformer_train.recipes.policies import swap

WARMUP_TURNS = 2  # the first compiles the kernels and makes the optimizer's state


@dataclass(frozen=True)
class Case:
    """A model of transformers, by class and fields of its config, and its batch; padded: an eighth of every other sequence."""

    model: str
    fields: dict[str, Any]
    batch: int
    length: int
    padded: bool = False


LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
MEDIUM = {"n_embd": 1024, "n_head": 16, "n_layer": 24}
CASES = {
    "bert-base": Case("BertForMaskedLM", {"num_hidden_layers": 12}, 4, 128, padded=True),
    "gpt2": Case("GPT2LMHeadModel", {"n_layer": 12, "use_cache": False}, 2, 256),
    "bert-large": Case("BertForMaskedLM", LARGE | {"num_hidden_layers": 24}, 64, 128, padded=True),
    "gpt2-medium": Case("GPT2LMHeadModel", MEDIUM | {"use_cache": False}, 8, 1024),
}
CPU_CASES, GPU_CASES = ["bert-base", "gpt2"], ["bert-large", "gpt2-medium"]


def build(case: Case, layers: int | None) -> nn.Module:
    """The stock model in training mode."""
    import transformers  # seconds to import

    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, case.model)
    depth = {} if layers is None else {"num_hidden_layers": layers}
    torch.manual_seed(0)
    model: nn.Module = cls(cls.config_class(**case.fields | {"attn_implementation": "sdpa"} | depth))
    return model.train()


def draw_batch(case: Case, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, labels at a seventh of them for BERT and at all for GPT-2."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab_size, (case.batch, case.length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if case.padded:
        mask[::2, -(case.length // 8) :] = 0
        labels[torch.rand(ids.shape, generator=generator) > 1 / 7] = -100
        labels[mask == 0] = -100
    return {
        name: tensor.to(device) for name, tensor in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()
    }


def make_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def take() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=batch["labels"].is_cuda)  # fresh memory costs page faults on a CPU

    return take


def loss_without_dropout(model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        loss: float = model(**batch).loss.item()
    model.train()
    return loss


def peak_bytes(take: Callable[[], None]) -> int:
    """The most that one step adds to the allocated memory of the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    take()
    return torch.cuda.max_memory_allocated() - before


def measure(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The figures of both models. Raises ValueError if they do not have one loss."""
    case = CASES[name]
    stock = build(case, arguments.layers).to(device, getattr(torch, arguments.dtype))
    swapped = copy.deepcopy(stock)
    layers = swap(swapped)
    batch = draw_batch(case, stock.config.vocab_size, device)
    models = {"stock": stock, "swapped": swapped}
    losses = {row: loss_without_dropout(model, batch) for row, model in models.items()}
    allowed = 1e-5 if arguments.dtype == "float32" else 1e-2
    if not abs(losses["swapped"] / losses["stock"] - 1) <= allowed:
        raise ValueError(f"wrong: the losses of {name} are {losses}")
    saved = {row: saved_bytes(model, batch) for row, model in models.items()}
    steps = {row: make_step(model, batch) for row, model in models.items()}
    times = time_in_turns(steps, arguments.rounds, device)
    figures: dict[str, Any] = {"case": name, "batch": case.batch, "length": case.length, "layers": layers}
    figures |= {"step_s": times, "saved_bytes": saved, "speedup": times["stock"] / times["swapped"]}
    figures["saved_share"] = saved["swapped"] / saved["stock"]
    if device.type == "cuda":
        figures["peak_bytes"] = {row: peak_bytes(step) for row, step in steps.items()}
        figures["peak_share"] = figures["peak_bytes"]["swapped"] / figures["peak_bytes"]["stock"]
    return figures


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    return count_saved_bytes(lambda: model(**batch).loss, [*model.parameters(), *model.buffers(), *batch.values()])


def time_in_turns(steps: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a step."""
    times: dict[str, list[float]] = {row: [] for row in steps}
    count = 10 if device.type == "cuda" else 1
    for turn in range(WARMUP_TURNS + rounds):
        for row, take in steps.items():
            synchronize(device)
            started_s = time.perf_counter()
            for _ in range(count):
                take()
            synchronize(device)
            if turn >= WARMUP_TURNS:
                times[row].append((time.perf_counter() - started_s) / count)
    return {row: statistics.median(values) for row, values in times.items()}


def table(records: list[dict[str, Any]]) -> str:
    """The figures for a person."""
    lines = [f"{'':24}{'step ms':>10}{'saved MiB':>11}{'peak MiB':>10}"]
    for record in records:
        lines.append(f"{record['case']}, {record['layers']} layers, {record['batch']} x {record['length']}")
        for row in ("stock", "swapped"):
            peak = record.get("peak_bytes")
            cell = "-" if peak is None else f"{peak[row] / 2**20:.0f}"
            lines.append(
                f"  {row:22}{record['step_s'][row] * 1e3:10.1f}{record['saved_bytes'][row] / 2**20:11.1f}{cell:>10}"
            )
        share = f"{record['peak_share']:.2f}" if "peak_share" in record else "-"
        lines.append(f"  {'ratio':22}{record['speedup']:9.2f}x{record['saved_share']:11.2f}{share:>10}")
    return "\n".join(lines)


def main() -> None:
    device = default_device()
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=GPU_CASES if on_gpu else CPU_CASES)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--layers", type=int, help="fewer layers than the models have, to be done sooner")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    failed = False
    for name in arguments.cases:
        try:
            records.append(measure(name, arguments, device))
        except ValueError as error:
            print(error, file=sys.stderr)
            failed = True
        if arguments.out is not None:  # after each, so that a call cut short leaves what it measured
            arguments.out.write_text(json.dumps({"machine": machine_line(), "results": records}, indent=2) + "\n")
    import transformers

    print(
        f"{machine_line()}, transformers {transformers.__version__}; {arguments.dtype}, medians of {arguments.rounds}"
    )
    print(table(records))
    if failed:
        sys.exit("a swapped model is wrong")


if __name__ == "__main__":
    main()
