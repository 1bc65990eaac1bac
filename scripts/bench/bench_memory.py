"""What training keeps in memory, and which memory flags BERT-Large needs for it, in five tables:

  peaks   the peak of a step of DeepSpeed with LAMB, beside the estimate below, at the largest micro-batch that should fit
  layers  what one layer keeps for backward under every choice of flags, beside the formula of
  layers  what one layer keeps for backward under every choice of flags, beside the formula of
          saved_activations.py
          saved_activations.py
  steps   what the parts of a step hold, for a BERT-Large of two layers on a CPU
  steps   what the parts of a step hold, for a BERT-Large of two layers on a CPU
  limits  the largest micro-batch of each choice of flags on GPUs of several sizes, estimated
  cards   the flags that every micro-batch needs on them, estimated

Without --tables, all but `peaks` on a CPU and all but `steps` on a GPU. A line is printed as soon as it is there, and --out
gets it as JSON with the name of its table. A step that runs out of memory loses its line alone.
"""

import argparse
import bisect
import functools
import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler, which counts a CPU's allocations

import torch
from bench_device import machine_line
from saved_activations import count_saved_bytes, saved_activations
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack
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
TITLES = {
    "peaks": "A training step of BERT-Large, bytes at its peak",
    "layers": "One layer of BERT-Large, 512 tokens, bytes kept for backward",
    "steps": "A training step, bytes",
    "limits": "Largest micro-batch of BERT-Large, estimated",
    "cards": "Memory flags that a micro-batch of BERT-Large needs, estimated",
}


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
    states = {"weights": SIZE * numel, "fp32 weights and moments": 12 * numel, "gradients": 4 * numel}
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
        "optimizer step": 8 * numel,  # LAMB's denominators and updates
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


def layer_records(length: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """What one layer of BERT-Large keeps of 512 tokens under every choice of flags, and with activation checkpointing without
    flags and with all: counted here, and by the formula.

    On a GPU also by how much the peak of a forward and backward pass grows with every layer.
    """
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
        yield {
            "length": length,
            "placement": "pre-LN" if pre_layer_norm else "post-LN",
            "checkpointing": checkpointing,
            **flags,
            "counted": count_saved_bytes(functools.partial(layer, x, AttentionMask()), layer.parameters()),
            "formula_here": sum(formula(triton_attention=on_gpu).values()),
            "formula_triton": sum(formula(triton_attention=True).values()),
            "peak_growth": (peak_of_stack(stack_of(6), x) - peak_of_stack(stack_of(2), x)) // 4 if on_gpu else None,
        }


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


def peak_records(
    topology: Topology, lengths: list[int], num_layers: int, batch: int | None
) -> Iterator[dict[str, Any]]:
    """The peak of BERT-Large's step with no flag, both and full; batch: None for the largest that should fit this GPU."""
    on_gpu = topology.device.type == "cuda"
    card_gb = torch.cuda.get_device_properties(topology.device).total_memory / 1e9 if on_gpu else 0
    for length, name in itertools.product(lengths, ("none", "both", "full")):
        run = training(length, CHOICES[name], num_layers)
        size = batch or largest_batch(run, card_gb)
        record = {"length": length, "flags": name, "batch": size}
        record["estimated"] = step_bytes(run, size, triton_attention=on_gpu)["peak"]
        try:
            record |= peaks_of_step(run, size, topology)
        except torch.OutOfMemoryError:
            record |= {"allocated": "out of memory", "reserved": None}
        yield record
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def peaks_of_step(run: Training, batch: int, topology: Topology) -> dict[str, int | None]:
    """Most bytes allocated and reserved during the second of two steps; the first makes the moments and compiles kernels."""

    def step_once() -> None:
        for _ in range(2):
            step.micro_batch()

    if topology.device.type == "cpu":
        step, held, _ = allocations(lambda: Step(run, batch, topology))
        _, left, _ = allocations(step_once)
        return {"allocated": held + left + allocations(step_once)[2], "reserved": None}
    step = Step(run, batch, topology)
    step_once()
    torch.cuda.reset_peak_memory_stats()
    step_once()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def card_records(length: int) -> Iterator[dict[str, Any]]:
    """The tutorial's table at one sequence length: the flags that each micro-batch needs on each card."""
    for batch in MICRO_BATCHES[length]:
        needed = {f"{card} GB": cheapest_choice(length, batch, card) for card in CARDS_GB}
        yield {"length": length, "batch": batch, **needed}


def limit_records(length: int) -> Iterator[dict[str, Any]]:
    """The largest micro-batch of each of CHOICES on each card."""
    for name, flags in CHOICES.items():
        largest = {f"{card} GB": largest_batch(training(length, flags), card) for card in CARDS_GB}
        yield {"length": length, "flags": name, **largest}


def write_table(name: str, records: Iterator[dict[str, Any]], out: Path | None) -> None:
    """Prints each record as soon as it is there, and appends it to `out` as JSON."""
    print(f"\n{TITLES[name]}")
    widths: list[int] = []
    for record in records:
        if not widths:
            widths = [max(len(key), 20 if isinstance(value, str) else 15) for key, value in record.items()]
            print("  ".join(key.rjust(width) for key, width in zip(record, widths, strict=True)))
        cells = zip(map(_cell, record.values()), widths, strict=True)
        print("  ".join(cell.rjust(width) for cell, width in cells), flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps({"table": name, **record}) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TITLES, help="only these, in this order")
    parser.add_argument("--lengths", nargs="+", type=int, choices=CONFIGS, default=list(CONFIGS), help="of sequences")
    parser.add_argument("--layers", type=int, default=24, help="of the model of `peaks`")
    parser.add_argument("--micro-batch-size", type=int, help="of `peaks`; default: the largest that should fit")
    parser.add_argument("--out", type=Path, help="JSON lines go here; the file is written anew")
    arguments = parser.parse_args()
    quiet(debug=False)
    topology = start_processes(hang_timeout_s=60)
    device, lengths, chain = topology.device, arguments.lengths, itertools.chain.from_iterable
    tables = {
        "peaks": lambda: peak_records(topology, lengths, arguments.layers, arguments.micro_batch_size),
        "layers": lambda: chain(layer_records(length, device) for length in lengths),
        "steps": lambda: iter(step_records(topology)),
        "limits": lambda: chain(map(limit_records, lengths)),
        "cards": lambda: chain(map(card_records, lengths)),
    }
    print(f"{machine_line()}; {DTYPE}, dropout 0.1", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine_line()}) + "\n")
    other = "peaks" if device.type == "cpu" else "steps"
    for name in arguments.tables or [name for name in tables if name != other]:
        write_table(name, tables[name](), arguments.out)
    stop_processes()


if __name__ == "__main__":
    main()
