"""te modules over two and four processes beside the same module in one, on every process."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from helpers.spawn import PATIENCE_S
from torch import Tensor, nn

from xformer_train.kernels import te
from xformer_train.kernels.parallel.sharding import Partition, partitions_of, take_shard
from xformer_train.kernels.te.rng_tracker import RngStatesTracker, seed_tensor_parallel

S, B, HIDDEN, FFN, HEADS = 8, 2, 16, 24, 4
Triples = Iterator[tuple[str, Tensor, Tensor]]

LAYERS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "fused": {"fuse_qkv_params": True},
    "no bias": {"bias": False},
    "bert": {
        "output_layernorm": True,
        "apply_residual_connection_post_layernorm": True,
        "self_attn_mask_type": "padding",
    },
    "llama": {
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "num_gqa_groups": 4,
        "zero_centered_gamma": True,
        "fuse_qkv_params": True,
    },
    "decoder": {"layer_type": "decoder", "fuse_qkv_params": True},
    "main_grad": {"fuse_qkv_params": True, "fuse_wgrad_accumulation": True},
}


def randn(*shape: int, key: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def run(module: nn.Module, x: Tensor, dy: Tensor, *args: Any) -> dict[str, Tensor]:
    """Output, and gradients by name; those in main_grad too."""
    x = x.clone().requires_grad_()
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    out = module(x, *args)
    out.backward(dy)
    grads = {n: p.main_grad if p.grad is None else p.grad for n, p in module.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **grads}


def compare(
    name: str, ours: dict[str, Tensor], whole: dict[str, Tensor], cuts: dict[str, Partition], group: Any
) -> Triples:
    for key, expected in whole.items():
        cut = cuts.get(key)
        part = expected if cut is None else take_shard(expected, cut, group.rank(), group.size())
        yield f"{name}, {key}", ours[key], part


def layers(group: dist.ProcessGroup) -> Triples:
    for name, options in LAYERS.items():
        for sequence_parallel in (False, True):
            common = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": torch.float64, **options}
            torch.manual_seed(0)
            single = te.TransformerLayer(HIDDEN, FFN, HEADS, **common)
            torch.manual_seed(0)
            parallel = {"set_parallel_mode": True, "tp_group": group, "sequence_parallel": sequence_parallel}
            ours = te.TransformerLayer(HIDDEN, FFN, HEADS, **common, **parallel)
            title = f"{name}, sequence_parallel={sequence_parallel}"
            cuts = partitions_of(ours)
            values, started = ({n: p.detach().clone() for n, p in m.named_parameters()} for m in (single, ours))
            yield from compare(f"{title}, start", started, values, cuts, group)
            whole_input, dy, encoded = (
                randn(S, B, HIDDEN, key=1),
                randn(S, B, HIDDEN, key=2),
                randn(4, B, HIDDEN, key=3),
            )
            mask = torch.arange(S) >= torch.tensor([[S], [5]])
            args = (mask[:, None, None], *([encoded] if options.get("layer_type") else []))
            expected = run(single, whole_input, dy, *args)
            if sequence_parallel:
                sequence = Partition(0)
                cuts |= {"output": sequence, "input": sequence}
                whole_input, dy = (take_shard(t, sequence, group.rank(), group.size()) for t in (whole_input, dy))
                args = (args[0], *(take_shard(t, sequence, group.rank(), group.size()) for t in args[1:]))
            yield from compare(title, run(ours, whole_input, dy, *args), expected, cuts, group)


@torch.no_grad()
def generation(group: dist.ProcessGroup) -> Triples:
    """With a key-value cache, of which each rank has its heads: five tokens, then one by one, beside all in one process."""
    options = {"num_gqa_groups": 4, "params_dtype": torch.float64, "layer_number": 1}
    angles, x = te.RotaryPositionEmbedding(HIDDEN // HEADS)(S), randn(S, B, HIDDEN, key=7)
    torch.manual_seed(0)
    single = te.TransformerLayer(HIDDEN, FFN, HEADS, **options).eval()
    torch.manual_seed(0)
    ours = te.TransformerLayer(HIDDEN, FFN, HEADS, **options, set_parallel_mode=True, tp_group=group).eval()
    params, outputs = te.InferenceParams(B, S), []
    for piece in x.split([5, 1, 1, 1]):
        outputs.append(ours(piece, inference_params=params, rotary_pos_emb=angles))
        params.sequence_len_offset += len(piece)
    yield "generation", torch.cat(outputs), single(x, rotary_pos_emb=angles)
    keys, _ = params.key_value_memory_dict[1]
    yield "generation, heads in the cache", torch.tensor(keys.shape[2]), torch.tensor(4 // group.size())


def single_modules(group: dist.ProcessGroup) -> Triples:
    """Linear in both modes, built with tp_size and given the group later."""
    for mode, build in (
        ("column", te.Linear),
        ("row", te.Linear),
        ("column", te.LayerNormLinear),
    ):
        torch.manual_seed(0)
        single = build(HIDDEN, FFN, params_dtype=torch.float64)
        ours = build(HIDDEN, FFN, params_dtype=torch.float64, parallel_mode=mode, tp_size=group.size())
        torch.manual_seed(0)
        ours.set_tensor_parallel_group(group)
        cuts = partitions_of(ours)
        x, dy = randn(S, B, HIDDEN, key=4), randn(S, B, FFN, key=5)
        expected = run(single, x, dy)
        if mode == "column":
            dy = take_shard(dy, Partition(2), group.rank(), group.size())
            cuts["output"] = Partition(2)
        else:
            x = take_shard(x, Partition(2), group.rank(), group.size())
            cuts["input"] = Partition(2)
        yield from compare(f"{build.__name__} {mode}", run(ours, x, dy), expected, cuts, group)


def group_given_later(group: dist.ProcessGroup) -> Triples:
    """A layer built with tp_size has the start values of one built with the group, but for what was changed meanwhile."""
    options = {"set_parallel_mode": True, "fuse_qkv_params": True}
    torch.manual_seed(0)
    ours = te.TransformerLayer(HIDDEN, FFN, HEADS, **options, tp_group=group)
    later = te.TransformerLayer(HIDDEN, FFN, HEADS, **options, tp_size=group.size())
    with torch.no_grad():
        later.self_attention.proj.bias.fill_(3)
        ours.self_attention.proj.bias.fill_(3)
    torch.manual_seed(0)
    later.set_tensor_parallel_group(group)
    for (name, mine), theirs in zip(later.named_parameters(), ours.parameters(), strict=True):
        yield f"start, group given later, {name}", mine, theirs
    x = randn(S, B, HIDDEN, key=1).float()
    yield "group given later", later.eval()(x), ours.eval()(x)


def returned_bias_under_sequence_parallelism(group: dist.ProcessGroup) -> Triples:
    """The caller adds the bias to its part of the sequence; the gradient is that of the whole."""
    ours = te.Linear(
        HIDDEN,
        FFN,
        return_bias=True,
        params_dtype=torch.float64,
        parallel_mode="Row",
        tp_group=group,
        sequence_parallel=True,
    )
    x, dy = randn(S, B, HIDDEN // group.size(), key=6 + group.rank()), randn(S, B, FFN, key=5)
    out, bias = ours(x)
    (out + bias).backward(take_shard(dy, Partition(0), group.rank(), group.size()))
    yield "returned bias", ours.bias.grad, dy.sum((0, 1))


def dropout_masks(group: dist.ProcessGroup) -> Triples:
    """Hidden masks are the same on all ranks without sequence parallelism; otherwise, and of attention, they differ.

    Only the norm of what is left of a known sum tells: with proj and fc2 silenced but for their bias, an output is
    x + mask * bias.
    """
    for tracked in (False, True):
        tracker = RngStatesTracker("cpu")
        seed_tensor_parallel(7, group, tracker)
        for sequence_parallel in (False, True):
            layer = te.TransformerLayer(
                HIDDEN,
                FFN,
                HEADS,
                hidden_dropout=0.5,
                attention_dropout=0.5,
                set_parallel_mode=True,
                tp_group=group,
                sequence_parallel=sequence_parallel,
                get_rng_state_tracker=(lambda tracker=tracker: tracker) if tracked else None,
                params_dtype=torch.float64,
            )
            for parameter in (
                layer.self_attention.proj.weight,
                layer.layernorm_mlp.fc2_weight,
                layer.layernorm_mlp.fc2_bias,
            ):
                nn.init.zeros_(parameter)
            nn.init.ones_(layer.self_attention.proj.bias)
            dropped = layer(torch.zeros(S, B, HIDDEN, dtype=torch.float64)) == 0
            gathered = [torch.empty_like(dropped) for _ in range(group.size())]
            dist.all_gather(gathered, dropped, group)
            alike = all(torch.equal(gathered[0], other) for other in gathered[1:])
            name = f"hidden masks, tracked={tracked}, sequence_parallel={sequence_parallel}"
            yield f"{name} drop", (dropped.double().mean() - 0.5).abs() < 0.2, torch.tensor(True)
            yield name, torch.tensor(alike), torch.tensor(not sequence_parallel)
            contexts = []
            layer.self_attention.proj.register_forward_pre_hook(lambda _, args, out=contexts: out.append(args[0]))
            for part in ("query", "key"):
                nn.init.zeros_(getattr(layer.self_attention, part))
            nn.init.ones_(layer.self_attention.value_bias)
            nn.init.zeros_(layer.self_attention.value)
            layer(torch.zeros(S, B, HIDDEN, dtype=torch.float64))  # sums of kept equal probabilities, by head
            gathered = [torch.empty_like(contexts[0]) for _ in range(group.size())]
            dist.all_gather(gathered, contexts[0].detach().contiguous(), group)
            differ = all(not torch.equal(gathered[0], other) for other in gathered[1:])
            yield name.replace("hidden", "attention"), torch.tensor(differ), torch.tensor(True)


def fp8(group: dist.ProcessGroup) -> Triples:
    """Near what one process computes in fp32: a rank's scales are those of its shards, so that bits differ."""
    for sequence_parallel in (False, True):
        torch.manual_seed(0)
        dropouts = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        single = te.TransformerLayer(64, 128, 4, **dropouts)
        torch.manual_seed(0)
        ours = te.TransformerLayer(
            64, 128, 4, **dropouts, set_parallel_mode=True, tp_group=group, sequence_parallel=sequence_parallel
        )
        x, dy = (randn(S, B, 64, key=key).float() for key in (1, 2))
        expected = run(single, x, dy)
        cuts = partitions_of(ours)
        if sequence_parallel:
            cuts |= {"output": Partition(0), "input": Partition(0)}
            x, dy = (take_shard(t, Partition(0), group.rank(), group.size()) for t in (x, dy))
        x.requires_grad_()
        with te.fp8_autocast(fp8_group=group):
            out = ours(x)
        out.backward(dy)
        got = {"output": out, "input": x.grad, **{n: p.grad for n, p in ours.named_parameters()}}
        for what, mine, theirs in compare(f"fp8, sequence_parallel={sequence_parallel}", got, expected, cuts, group):
            if "key_bias" not in what:  # no gradient but rounding
                yield f"{what}, near", (mine - theirs).norm() < 0.2 * theirs.norm(), torch.tensor(True)


CHECKS = (
    layers,
    generation,
    single_modules,
    group_given_later,
    returned_bias_under_sequence_parallelism,
    dropout_masks,
    fp8,
)


def worker(sizes: tuple[int, ...]) -> dict[int, dict[str, tuple[Tensor, Tensor]]]:
    """All triples by group size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
    results: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for size in sizes:
        groups = [dist.new_group(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
        group = groups[dist.get_rank() // size]
        results[size] = {
            name: (ours.detach(), expected.detach()) for check in CHECKS for name, ours, expected in check(group)
        }
    dist.destroy_process_group()
    return results
