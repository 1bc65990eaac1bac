"""Models and layer stacks over two and four processes beside the same in one, on every process."""

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from helpers.spawn import PATIENCE_S
from saved_activations import count_saved_bytes, saved_activations
from torch import Tensor, nn

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack
from xformer_train.kernels.ops import linear
from xformer_train.kernels.ops.mlp import mlp
from xformer_train.kernels.parallel.collectives import TensorParallel
from xformer_train.kernels.parallel.sharding import Partition, partitions_of, shard_state_dict
from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig
from xformer_train.recipes.recipe import Runtime

B, S, VOCABULARY = 2, 8, 40
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
    "layer_norm_eps": 1e-5,
}
MEMORY_FLAGS = {"normalize_invertible": True, "gelu_checkpoint": True, "attn_dropout_checkpoint": True}
CONFIG = LayerConfig(16, 4, 24, initializer_range=0.2, layer_norm_eps=1e-5)
MODERN_CONFIG = dataclasses.replace(
    CONFIG,
    hidden_act="silu",
    gated_mlp=True,
    norm="rms_norm",
    norm_bias=False,
    attention_bias=False,
    mlp_bias=False,
    num_key_value_heads=2,  # which four processes share, two by two
    qk_norm=True,
    rope_theta=1e4,
)
Triples = Iterator[tuple[str, Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    model: ModelConfig
    objective: ObjectiveConfig
    flags: LayerFlags = dataclasses.field(default_factory=LayerFlags)


CASES = {
    "bert post-LN": Case(ModelConfig(type="bert", pre_layer_norm=False, **SIZES), ObjectiveConfig()),
    "bert pre-LN": Case(ModelConfig(type="bert", **SIZES), ObjectiveConfig(sentence_task="none")),
    "bert unpad": Case(
        ModelConfig(type="bert", pre_layer_norm=False, **SIZES), ObjectiveConfig(), LayerFlags(unpad=True)
    ),
    "gpt": Case(ModelConfig(type="gpt", hidden_act="gelu_tanh", **SIZES), ObjectiveConfig(type="clm")),
    "gpt, memory flags": Case(
        ModelConfig(type="gpt", **SIZES), ObjectiveConfig(type="clm"), LayerFlags(**MEMORY_FLAGS)
    ),
}

# Two processes divide the key heads of `llama`, four share them.
_TODAYS = {"position_embedding": "rope", "gated_mlp": True, "norm_bias": False, "mlp_bias": False}
_LLAMA = SIZES | _TODAYS | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "attention_bias": False}
CASES |= {
    "modernbert": Case(
        ModelConfig(type="bert", sliding_window=4, global_attn_every_n_layers=2, **SIZES, **_TODAYS),
        ObjectiveConfig(sentence_task="none"),
        LayerFlags(unpad=True),
    ),
    "llama": Case(
        ModelConfig(type="gpt", norm="rms_norm", hidden_act="silu", qk_norm=True, tie_word_embeddings=False, **_LLAMA),
        ObjectiveConfig(type="clm"),
        LayerFlags(**MEMORY_FLAGS),
    ),
}


def batch_of(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (B, S))
    if case.model.type == "gpt":
        segments = (torch.arange(S) >= torch.tensor([[3], [S]])).int()
        return {"input_ids": ids, "labels": ids.roll(-1, 1), "segment_ids": segments}
    real = torch.arange(S) < torch.tensor([[S], [4]])  # 12 tokens, which two and four processes can share
    batch = {
        "input_ids": ids,
        "token_type_ids": (torch.arange(S) > 2).long().expand(B, S),
        "attention_mask": real,
        "masked_positions": torch.tensor([1, 6, 9, 3, 0]),
        "masked_labels": torch.tensor([5, VOCABULARY - 1, 17, -100, 0]),
    }
    if case.objective.sentence_task != "none":
        batch["sentence_labels"] = torch.tensor([1, 0])
    if case.flags.unpad:
        batch["token_positions"] = real.flatten().nonzero().flatten()
    return batch


def build(case: Case, parallel: TensorParallel, p: float) -> nn.Module:
    torch.manual_seed(0)
    model = case.model.model_copy(update={"hidden_dropout_prob": p})
    runtime = Runtime(parallel=parallel)
    return RECIPES[model.type].build_model(model, case.flags, case.objective, VOCABULARY, runtime)


def trained(model: nn.Module) -> nn.Module:
    """Biases and LayerNorms start at 0 and 1, where a swapped or doubled one of them would go unseen."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def models(group: dist.ProcessGroup) -> Triples:
    """Losses, logits, gradients. With dropout of hidden states alone and no SP all processes drop what one would."""
    for name, case in CASES.items():
        batch = batch_of(case)
        for dtype, sequence in ((torch.float64, False), (torch.float64, True), (torch.float32, True)):
            p = 0.0 if sequence else 0.2
            single, ours = build(case, TensorParallel(), p), build(case, TensorParallel(group, sequence), p)
            cuts = partitions_of(ours)

            def mine(full: dict[str, Tensor], cuts: Any = cuts) -> dict[str, Tensor]:
                return shard_state_dict(full, cuts, group.rank(), group.size())

            title = f"{name}, {dtype}, sequence={sequence}"
            for key, value in mine(single.state_dict()).items():
                yield f"start, {title}, {key}", ours.state_dict()[key].clone(), value.clone()
            trained(single)
            ours.load_state_dict(mine(single.state_dict()))
            results = []
            for model in (single.to(dtype), ours.to(dtype)):
                torch.manual_seed(3)
                losses = model(**batch)
                sum(losses.values()).backward()
                results.append(losses)
            for key, value in results[0].items():
                yield f"{title}, {key}", results[1][key], value
            for key, value in mine({n: parameter.grad for n, parameter in single.named_parameters()}).items():
                yield f"{title}, gradient of {key}", ours.get_parameter(key).grad, value
            logits = []
            for model in (single.eval(), ours.eval()):
                score = model.logits if case.model.type == "gpt" else model.mlm_logits
                logits.append(score(model.encode(batch["input_ids"])))
            yield f"{title}, logits", logits[1], logits[0]


def one_layer(parallel: TensorParallel, **options: Any) -> LayerStack:
    torch.manual_seed(0)
    return LayerStack(dataclasses.replace(CONFIG, **options), 1, parallel=parallel).double()


def hidden_dropout(group: dist.ProcessGroup) -> Triples:
    """With both projections silenced but for a bias of one, an output is 0 where the first of two dropouts dropped it."""
    x = torch.zeros(B, S, 16, dtype=torch.float64)
    for sequence in (False, True):
        drops = []
        for parallel in (TensorParallel(), TensorParallel(group, sequence)):
            stack = one_layer(parallel, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
            with torch.no_grad():
                for parameter in (stack[0].attention_output.weight, stack[0].output.weight):
                    parameter.zero_()
                stack[0].attention_output.bias.fill_(1)
            torch.manual_seed(4)
            drops.append((stack(x, AttentionMask()) == 0).view(B * S, 16))
        parts = drops[1].chunk(group.size())
        alike = [torch.equal(parts[0], other) for other in parts[1:]]
        name = f"hidden masks, sequence={sequence}"
        yield f"{name}, of process 0", parts[0], drops[0].chunk(group.size())[0]
        yield f"{name}, of one process", torch.tensor(torch.equal(*drops)), torch.tensor(not sequence)
        yield f"{name}, parts of the rows differ", torch.tensor(any(alike)), torch.tensor(False)


def attention_dropout(group: dist.ProcessGroup) -> Triples:
    """With equal scores, values of one and an output projection that passes the context on, each head's output is how much of
    its probabilities was kept."""
    x = torch.zeros(B, S, 16, dtype=torch.float64)
    for sequence in (False, True):
        stack = one_layer(TensorParallel(group, sequence), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
        layer, width = stack[0], 16 // group.size()
        with torch.no_grad():
            for parameter in (layer.qkv.weight, layer.output.weight):
                parameter.zero_()
            layer.qkv.bias[2 * width :] = 1
            layer.attention_output.weight.copy_(torch.eye(16)[:, group.rank() * width :][:, :width])
        kept = stack(x, AttentionMask())[..., ::4]  # one column of each head
        heads_of = kept.chunk(group.size(), -1)
        alike = [torch.equal(heads_of[0], other) for other in heads_of[1:]]
        name = f"attention masks, sequence={sequence}"
        yield f"{name}, drop", (kept.mean() - 1).abs() < 0.2, torch.tensor(True)
        yield f"{name}, equal heads", torch.tensor(any(alike)), torch.tensor(False)


def kept_for_backward(group: dist.ProcessGroup) -> Triples:
    """A process keeps its part of what one would: of features alone, or of rows too, and then six vectors of its own."""
    x = torch.zeros(B, S, 16).requires_grad_()
    for sequence in (False, True):
        for name, flags in (("no flags", {}), ("flags", MEMORY_FLAGS)):
            config = dataclasses.replace(CONFIG, **flags)
            stack = LayerStack(config, 1, parallel=TensorParallel(group, sequence))
            whole = saved_activations(config, B, S, torch.float32, triton_attention=False)
            seed = whole.pop("dropout_seed")
            features = {"qkv", "context", "probabilities", "dropped_probabilities", "gelu_input", "gelu_output"}
            parts = sum(n if not sequence and key not in features else n // group.size() for key, n in whole.items())
            expected = parts + seed + (6 * 16 * 4 if sequence else 0)
            counted = count_saved_bytes(lambda stack=stack: stack(x, AttentionMask()), stack.parameters())
            yield f"kept, {name}, sequence={sequence}", torch.tensor(counted), torch.tensor(expected)


def mlp_overlap(group: dist.ProcessGroup) -> Triples:
    """In the backward pass of the MLP a product follows each start of a collective but the first, which nothing can hide."""
    calls: list[str] = []
    names = {  # by the file that calls them
        mlp: ("start_all_gather", "product", "weight_gradient"),
        linear: ("start_all_reduce_", "start_reduce_scatter"),
    }

    def recorded(file: Any, name: str) -> Any:
        original = getattr(file, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        return call

    for sequence, expected in (
        (False, "product weight_gradient start_all_reduce_ weight_gradient"),
        (True, "start_all_gather start_all_gather product weight_gradient start_reduce_scatter weight_gradient"),
    ):
        x, w1, b1, w2 = (torch.randn(size, requires_grad=True) for size in ((2, 3), (5, 3), (5,), (3, 5)))
        y = mlp.mlp(x, w1, b1, w2, "gelu", gelu_checkpoint=False, parallel=TensorParallel(group, sequence))
        with contextlib.ExitStack() as patches:
            for file, of_file in names.items():
                patches.enter_context(mock.patch.multiple(file, **{name: recorded(file, name) for name in of_file}))
            y.sum().backward()
        yield f"overlap, sequence={sequence}", torch.tensor(" ".join(calls) == expected), torch.tensor(True)
        calls.clear()


def fp8(group: dist.ProcessGroup) -> Triples:
    """A process's scales are those of its shards, so that bits differ; the error against fp32 is that of one process in FP8."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    kinds = {"of 2018": CONFIG, "of today": MODERN_CONFIG}
    for name, kind in kinds.items():
        for what, near in _fp8_errors(dataclasses.replace(kind, **sizes), group):
            yield f"fp8, {name}, {what}", near, torch.tensor(True)


def _fp8_errors(config: LayerConfig, group: dist.ProcessGroup) -> Iterator[tuple[str, Tensor]]:
    """Which tensor, and whether its error is near that of one process."""
    torch.manual_seed(5)
    x, dy = torch.randn(2, B, S, 64).unbind()

    def step(parallel: TensorParallel, fp8: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        stack = LayerStack(config, 1, fp8=fp8, parallel=parallel)
        given = x.clone().requires_grad_()
        out = stack(given, AttentionMask())
        out.backward(dy)
        cuts.update(partitions_of(stack))
        return {"output": out, "input": given.grad, **{name: p.grad for name, p in stack.named_parameters()}}

    cuts: dict[str, Partition] = {}
    exact, one = (
        shard_state_dict(step(TensorParallel(), on), cuts, group.rank(), group.size()) for on in (False, True)
    )
    for sequence in (False, True):
        for key, value in step(TensorParallel(group, sequence), True).items():
            error, usual = ((result - exact[key]).norm() / exact[key].norm() for result in (value, one[key]))
            near = (error < 3 * usual) & (error > usual / 3) if usual > 1e-6 else error < 1e-6
            yield f"sequence={sequence}, {key}, near", near


CHECKS = (models, hidden_dropout, attention_dropout, kept_for_backward, mlp_overlap, fp8)


def worker(sizes: tuple[int, ...]) -> dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """All triples by group size, as arrays: a tensor would be sent as an open file, and these are thousands."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
    results: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for size in sizes:
        groups = [dist.new_group(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
        group = groups[dist.get_rank() // size]
        results[size] = {
            name: (ours.detach().numpy(), expected.detach().numpy())
            for check in CHECKS
            for name, ours, expected in check(group)
        }
    dist.destroy_process_group()
    return results
