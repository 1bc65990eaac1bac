"""What training keeps in memory, and which memory flags BERT-Large needs for it.

Counts what one layer keeps for backward under every choice of flags, beside the formula
(kernels/layers/saved_activations.py), and
what a step of DeepSpeed with LAMB holds, beside the estimate below (on a CPU for a BERT-Large of two layers; on a GPU the
peaks of the whole model). Prints last the flags that every micro-batch needs on GPUs of several sizes; writes JSON.
"""

import argparse
import bisect
import functools
import gc
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler, which counts a CPU's allocations

import torch
from bench_device import machine_line
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack
from xformer_train.kernels.layers.saved_activations import count_saved_bytes, saved_activations
from xformer_train.launcher.config.batch import BatchPlan
from xformer_train.launcher.config.deepspeed import deepspeed_config
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.config.schema import RunConfig
from xformer_train.launcher.optim.optimizer import build_optimizer
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes
from xformer_train.recipes import RECIPES
from xformer_train.recipes.recipe import Runtime

CONFIGS = {128: "configs/bert_large_seq128.yaml", 512: "configs/bert_large_seq512.yaml"}
VOCAB_SIZE = 30528  # BERT's 30,522 symbols, rounded up as the launcher does
DTYPE, SIZE = torch.bfloat16, torch.bfloat16.itemsize
FLAGS = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint")
# What a cell of the table may name, the cheapest in time first: normalize_invertible reads and writes as much as the norm
# does without it, gelu_checkpoint writes GELU's output a second time, full activation checkpointing computes the layers a
# second time. attn_dropout_checkpoint and selective checkpointing drop nothing on a GPU.
CHOICES = {
    "none": (),
    "normalize_invertible": ("normalize_invertible",),
    "gelu_checkpoint": ("gelu_checkpoint",),
    "both": ("normalize_invertible", "gelu_checkpoint"),
    "full": ("full",),
}
CARDS_GB = (16, 32, 80, 141)
MICRO_BATCHES = {  # the tutorial's 12 to 128, and what larger cards ask for
    128: (12, 16, 80, 112, 128, 192, 256, 320, 512, 768, 1024, 1536, 1792),
    512: (12, 16, 24, 32, 48, 64, 80, 112, 128, 192, 256, 384, 448),
}
# Assumed, not measured: CUDA's context with the workspaces of its libraries, and the share of the rest that is lost because
# the allocator's free blocks have the wrong sizes.
CONTEXT_BYTES, FRAGMENTATION = 10**9, 0.05


@dataclass(frozen=True)
class Training:
    """A shipped BERT-Large run for full sequences, at its full depth or a smaller one."""

    config: RunConfig
    layer: LayerConfig
    num_parameters: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.config.data.max_seq_length

    def num_masked(self, batch: int) -> int:
        """Tokens that a batch predicts."""
        assert self.config.objective.max_predictions_per_seq is not None, "the shipped configs of BERT-Large give it"
        return batch * self.config.objective.max_predictions_per_seq


@functools.cache
def training(length: int, flags: tuple[str, ...] = (), num_layers: int = 24) -> Training:
    """The run for sequences of `length` tokens with these memory flags, `full` among them, and no other."""
    chosen = [f"layer.{flag}={str(flag in flags).lower()}" for flag in FLAGS]
    chosen.append(f"training.activation_checkpointing={'full' if 'full' in flags else 'none'}")
    config = load_config(CONFIGS[length], [*chosen, f"model.num_hidden_layers={num_layers}"]).config
    with torch.device("meta"):
        model = build_model(config)
    return Training(config, model.layers[0].config, sum(parameter.numel() for parameter in model.parameters()))


def build_model(config: RunConfig) -> Any:
    """A `BertForPretraining` on torch's default device."""
    runtime = Runtime(activation_checkpointing=config.training.activation_checkpointing)
    return RECIPES["bert"].build_model(config.model, config.layer, config.objective, VOCAB_SIZE, runtime)


def step_bytes(run: Training, batch: int, *, triton_attention: bool = True) -> dict[str, int]:
    """What a bf16 training step holds on one process, by purpose, and its `peak`.

    The peak stands in the backward of the head, or in that of the last layer's feed-forward half, with the activations of all
    layers and the gradients of earlier micro-batches there; or in the optimizer's step.
    """
    layer, numel, tokens, masked = run.layer, run.num_parameters, batch * run.length, run.num_masked(batch)
    H, F, V = layer.hidden_size, layer.intermediate_size, VOCAB_SIZE
    checkpointing = run.config.training.activation_checkpointing
    of_layer = functools.partial(saved_activations, layer, batch, run.length, DTYPE, triton_attention=triton_attention)
    kept = of_layer(activation_checkpointing=checkpointing)
    recomputed = sum(of_layer().values()) - sum(kept.values())  # of the layer whose backward runs
    hidden, inner, projection = tokens * H * SIZE, tokens * F * SIZE, H * F * SIZE
    states = {"weights": SIZE * numel, "fp32 weights and moments": 12 * numel, "gradients": SIZE * numel}
    activations = {
        "layers": run.config.model.num_hidden_layers * sum(kept.values()),
        "embedding norm": hidden + 8 * tokens,  # its input and statistics
        "final norm": 2 * hidden + 8 * tokens,  # and its output, of which the pooler keeps a view
        # Per masked token the inputs of the transform, its GELU and its norm, and the gradient that the loss has computed
        # with itself, as it has, in fp32, that of the vocabulary; per sequence the pooler's output.
        "head": masked * (4 * H * SIZE + 8) + 4 * V * (H + 1) + batch * H * SIZE,
    }
    working = {
        "backward of the head": V * H * (4 + SIZE),
        # The vocabulary's gradient waits for that of the embedding. In the layer there are the gradients of its output, of
        # the residual, of GELU (and GELU's output, if recomputed) and of one projection; later of both, and of the input.
        "backward of the last layer": recomputed
        + V * H * SIZE
        + 2 * hidden
        + max(inner * (2 if layer.gelu_checkpoint else 1) + projection, inner + 2 * projection + hidden),
        "optimizer step": 12 * numel,  # gradients in fp32, LAMB's denominators and updates
    }
    in_head = activations["final norm"] + activations["head"] + working["backward of the head"]
    in_backward = max(in_head, working["backward of the last layer"])
    in_micro_batch = activations["layers"] + activations["embedding norm"] + in_backward
    peak = sum(states.values()) + max(in_micro_batch, working["optimizer step"])
    return states | activations | working | {"peak": peak}


def needed_bytes(run: Training, batch: int) -> float:
    """What a GPU must have for a step."""
    return CONTEXT_BYTES + step_bytes(run, batch)["peak"] * (1 + FRAGMENTATION)


def cheapest_choice(length: int, batch: int, card_gb: float) -> str:
    """The first of CHOICES with which the micro-batch fits."""
    fitting = (name for name, flags in CHOICES.items() if needed_bytes(training(length, flags), batch) <= card_gb * 1e9)
    return next(fitting, "does not fit")


def largest_batch(run: Training, card_gb: float) -> int:
    """The largest micro-batch that fits, 0 if none does."""
    return bisect.bisect_right(range(1, 100_000), card_gb * 1e9, key=lambda batch: needed_bytes(run, batch))


def layer_records(length: int, device: torch.device) -> list[dict[str, Any]]:
    """What one layer of BERT-Large keeps of 512 tokens under every choice of flags, and with activation checkpointing without
    flags and with all: counted here, and by the formula.

    On a GPU also by how much the peak of a forward and backward pass grows with every layer.
    """
    records = []
    choices = [("none", values) for values in itertools.product([False, True], repeat=len(FLAGS))]
    choices += itertools.product(("selective", "full"), ([False] * len(FLAGS), [True] * len(FLAGS)))
    for pre_layer_norm, (checkpointing, values) in itertools.product([True, False], choices):
        flags = dict(zip(FLAGS, values, strict=True))
        config = replace(training(length).layer, pre_layer_norm=pre_layer_norm, **flags)  # type: ignore[arg-type]
        batch, on_gpu = 512 // length, device.type == "cuda"

        def stack_of(depth: int, config: LayerConfig = config, choice: Any = checkpointing) -> LayerStack:
            with device:
                return LayerStack(config, depth, activation_checkpointing=choice).to(DTYPE)

        x = torch.randn(batch, length, config.hidden_size, device=device, dtype=DTYPE, requires_grad=True)
        formula = functools.partial(
            saved_activations, config, batch, length, DTYPE, activation_checkpointing=checkpointing
        )
        layer = stack_of(1)
        records.append(
            {
                "length": length,
                "placement": "pre-LN" if pre_layer_norm else "post-LN",
                "checkpointing": checkpointing,
                **flags,
                "counted": count_saved_bytes(functools.partial(layer, x, AttentionMask()), layer.parameters()),
                "formula_here": sum(formula(triton_attention=on_gpu).values()),
                "formula_triton": sum(formula(triton_attention=True).values()),
                "peak_growth": (peak_of_stack(stack_of(6), x) - peak_of_stack(stack_of(2), x)) // 4 if on_gpu else None,
            }
        )
    return records


def peak_of_stack(stack: LayerStack, x: Tensor) -> int:
    """Most bytes that forward and backward add to what is allocated on the GPU, gradients of the parameters being there."""

    def run() -> None:
        stack(x, AttentionMask()).sum().backward()

    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


class Step:
    """A launcher's DeepSpeed engine on one batch of full sequences, two micro-batches to a step."""

    def __init__(self, run: Training, batch: int, topology: Topology) -> None:
        from xformer_train.launcher.optim.engine import build_engine  # imports DeepSpeed, which `quiet` must precede

        with topology.device:
            model = build_model(run.config)
        ds_config = deepspeed_config(run.config, BatchPlan(2 * batch, batch, 2, 1), "bf16")
        self.engine = build_engine(model, build_optimizer(model, run.config.optimizer), ds_config, topology)
        masked = run.num_masked(batch)
        tensors = {
            "input_ids": torch.randint(VOCAB_SIZE, (batch, run.length)),
            "token_type_ids": torch.randint(2, (batch, run.length)),
            "attention_mask": torch.ones(batch, run.length, dtype=torch.bool),
            "masked_positions": torch.randperm(batch * run.length)[:masked].sort().values,
            "masked_labels": torch.randint(VOCAB_SIZE, (masked,)),
            "sentence_labels": torch.randint(2, (batch,)),
        }
        self.batch = {name: tensor.to(topology.device) for name, tensor in tensors.items()}

    def forward(self) -> Tensor:
        """The loss of a micro-batch."""
        losses: dict[str, Tensor] = self.engine(**self.batch)
        return torch.stack(list(losses.values())).mean()

    def micro_batch(self) -> None:
        """Forward and backward, and after every second one the optimizer's step."""
        self.engine.backward(self.forward())
        self.engine.step()


def allocations(task: Callable[[], Any]) -> tuple[Any, int, int]:
    """(the task's result, bytes it leaves allocated, most bytes while it ran), on a CPU, counted from its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = task()
    assert profiler.profiler is not None, "it has run"
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    levels = list(itertools.accumulate(event.nbytes() for event in events))  # negative where memory is given back
    return result, levels[-1], max(levels)


def step_records(topology: Topology) -> list[dict[str, Any]]:
    """What the parts of a step of a two-layer BERT-Large hold, estimated and counted on a CPU."""
    run, full, batch = training(128, num_layers=2), training(128, ("full",), num_layers=2), 4
    expected, expected_full = (step_bytes(each, batch, triton_attention=False) for each in (run, full))
    kept = ("layers", "embedding norm", "final norm", "head")

    def start(run: Training) -> Step:
        step = Step(run, batch, topology)
        for _ in range(2):
            step.micro_batch()
        return step

    step, held, _ = allocations(functools.partial(start, run))
    loss, activations, _ = allocations(step.forward)
    _, freed, _ = allocations(lambda: step.engine.backward(loss))
    step.engine.step()
    step.engine.backward(step.forward())
    _, _, peak = allocations(step.engine.step)
    parts = {
        "between steps": (("weights", "fp32 weights and moments"), held),
        "activations": (kept, activations),
        "gradients": (("gradients",), activations + freed),
        "optimizer step": (("optimizer step",), peak),
    }
    _, activations_full, _ = allocations(start(full).forward)
    records = [
        {"part": part, "estimated": sum(expected[name] for name in names), "counted": counted}
        for part, (names, counted) in parts.items()
    ]
    estimated_full = sum(expected_full[name] for name in kept)
    return [*records, {"part": "activations, full", "estimated": estimated_full, "counted": activations_full}]


def peak_records(topology: Topology) -> list[dict[str, Any]]:
    """The peak of BERT-Large's step on this GPU at the largest micro-batch that should fit, with no flag, both and full."""
    records = []
    card_gb = torch.cuda.get_device_properties(topology.device).total_memory / 1e9
    for length, name in itertools.product(CONFIGS, ("none", "both", "full")):
        run = training(length, CHOICES[name])
        batch = largest_batch(run, card_gb)
        step = Step(run, batch, topology)
        for micro_batch in range(4):
            if micro_batch == 2:  # the first step makes the moments and compiles the kernels
                torch.cuda.reset_peak_memory_stats()
            step.micro_batch()
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        records.append(
            {"length": length, "flags": name, "batch": batch, "estimated": step_bytes(run, batch)["peak"], **peaks}
        )
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return records


def table_records(length: int) -> list[dict[str, Any]]:
    """The tutorial's table at one sequence length: the flags that each micro-batch needs on each card."""
    return [
        {"length": length, "batch": batch, **{f"{card} GB": cheapest_choice(length, batch, card) for card in CARDS_GB}}
        for batch in MICRO_BATCHES[length]
    ]


def limit_records(length: int) -> list[dict[str, Any]]:
    """The largest micro-batch of each of CHOICES on each card."""
    return [
        {"length": length, "flags": name}
        | {f"{card} GB": largest_batch(training(length, flags), card) for card in CARDS_GB}
        for name, flags in CHOICES.items()
    ]


def print_table(title: str, records: list[dict[str, Any]]) -> None:
    """The records as a table with their keys on top."""
    rows = [list(records[0]), *(list(record.values()) for record in records)]
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    quiet(debug=False)
    topology = start_processes(hang_timeout_s=60)
    device, lengths = topology.device, list(CONFIGS)
    tables = {
        "layers": [record for length in lengths for record in layer_records(length, device)],
        "steps": step_records(topology) if device.type == "cpu" else peak_records(topology),
        "limits": [record for length in lengths for record in limit_records(length)],
        "table": [record for length in lengths for record in table_records(length)],
    }
    stop_processes()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine_line(), **tables}, indent=2) + "\n")
    print(f"{machine_line()}; {DTYPE}, dropout 0.1")
    print_table("One layer of BERT-Large, 512 tokens, bytes kept for backward", tables["layers"])
    print_table("A training step, bytes", tables["steps"])
    print_table("Largest micro-batch of BERT-Large, estimated", tables["limits"])
    print_table("Memory flags that a micro-batch of BERT-Large needs, estimated", tables["table"])


if __name__ == "__main__":
    main()
