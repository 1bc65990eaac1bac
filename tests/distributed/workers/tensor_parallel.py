"""Tensor-parallel functions beside the same computation in one process, on every process of groups of two and of four.

Each check gives (what, ours, expected) triples; all processes draw the same full tensors and take their own parts.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import product as cases
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed.workers.tensors import DTYPES, SEED, Triples, leaf, part, randn, strided
from distributed.workers.vocab_parallel import cross_entropies, embeddings, half_precision_cross_entropies
from helpers.spawn import PATIENCE_S
from torch import Tensor, nn

from xformer_train.kernels import AttentionMask, KeyValueCache, LayerConfig, LayerStack
from xformer_train.kernels.ops import linear
from xformer_train.kernels.ops.dropout import keep_mask
from xformer_train.kernels.ops.parallel_linear import column_parallel_linear, row_parallel_linear
from xformer_train.kernels.parallel import collectives as tensor_parallel
from xformer_train.kernels.parallel.sharding import initialize_sharded, join_shards, partitions_of, shard_state_dict
from xformer_train.kernels.te.rng_tracker import RngStatesTracker, draw_dropout_seeds, seed_tensor_parallel

HEADS_PARTS = (16, 8, 8)  # queries, keys and values of grouped-query attention


def collective_pairs(group: dist.ProcessGroup) -> Triples:
    size, rank = group.size(), group.rank()
    for dtype, layout in cases(DTYPES, (torch.clone, strided)):
        small = [randn(3, 5, 2, key=r, dtype=dtype) for r in range(size)]  # by rank
        large = [randn(3 * size, 5, 2 * size, key=10 + r, dtype=dtype) for r in range(size)]
        total_small, total_large = sum(small), sum(large)
        whole = {dim: torch.cat(small, dim) for dim in (0, -1)}
        mine, big = small[rank], large[rank]
        # name, function, x, dy, y, dx
        table: list[tuple[str, Callable[..., Tensor], Tensor, Tensor, Tensor, Tensor]] = [
            ("copy", tensor_parallel.copy_to_group, small[0], mine, small[0], total_small),
            ("reduce", tensor_parallel.reduce_from_group, mine, small[0], total_small, small[0]),
            (
                "gather sequence",
                tensor_parallel.gather_from_sequence,
                mine,
                big[..., :2],
                whole[0],
                part(total_large[..., :2], group, 0),
            ),
            (
                "reduce-scatter sequence",
                tensor_parallel.reduce_scatter_to_sequence,
                big[..., :2],
                mine,
                part(total_large[..., :2], group, 0),
                whole[0],
            ),
        ]
        for dim in (0, -1):
            full = large[0][..., :2] if dim == 0 else large[0][:3]

            def scatter(x: Tensor, group: Any, dim: int = dim) -> Tensor:
                return tensor_parallel.scatter_to_group(x, group, dim)

            def gather(x: Tensor, group: Any, dim: int = dim) -> Tensor:
                return tensor_parallel.gather_from_group(x, group, dim)

            table.append((f"scatter {dim}", scatter, full, mine, part(full, group, dim), whole[dim]))
            table.append((f"gather {dim}", gather, mine, full, whole[dim], part(full, group, dim)))
        reduced = tensor_parallel.start_all_reduce_(layout(mine), group).wait()
        yield f"all-reduce in place, {dtype}, {layout.__name__}", reduced, total_small
        for name, function, given, gradient, y, dx in table:
            x, dy = leaf(layout(given)), layout(gradient)
            ours = function(x, group)
            if name != "copy":  # which is x
                ours.mul_(2).div_(2)
            (ours_dx,) = torch.autograd.grad(ours, x, dy)
            what = f"{name}, {dtype}, {layout.__name__}"
            yield f"y of {what}", ours, y
            yield f"dx of {what}", ours_dx, dx
            yield f"x after {what}", x, given
            yield f"dy after {what}", dy, gradient


def linear_layers(group: dist.ProcessGroup) -> Triples:
    size = group.size()
    column, row = column_parallel_linear, row_parallel_linear
    for dtype, function, parallel, biased in cases(DTYPES, (column, row), (False, True), (False, True)):
        cut_out, cut_in = (
            (0, -1) if function is column else (-1, 0)
        )  # dims of the weight, and of y or x, that are shared
        n, k = (3 * size, 5) if function is column else (5, 3 * size)
        full_x = leaf(randn(3 * size if parallel else 7, 3, k, key=1, dtype=dtype))
        full_weight = leaf(randn(n, k, key=2, dtype=dtype))
        full_bias = leaf(randn(n, key=3, dtype=dtype)) if biased else None
        full_y = F.linear(full_x, full_weight, full_bias)
        full_dy = randn(*full_y.shape, key=4, dtype=dtype)
        full_y.backward(full_dy)

        def mine(tensor: Tensor, sharded: bool, parallel: bool = parallel) -> Tensor:
            """Of x, y or one of their gradients: the features' part, the sequence's, or all."""
            return part(tensor, group, -1) if sharded else part(tensor, group, 0) if parallel else tensor

        x_sharded, y_sharded = cut_in == 0, cut_out == 0
        weight = nn.Parameter(part(full_weight, group, cut_out if function is column else -1).detach().clone())
        bias = None if full_bias is None else full_bias.detach().clone()
        bias = bias if bias is None else nn.Parameter(part(bias, group, 0) if function is column else bias)
        if bias is not None and function is row and parallel:
            tensor_parallel.sum_gradient_over(bias, group)
        for needs in ("all", "x", "weight", *(("bias",) if biased else ())):
            x = strided(mine(full_x, x_sharded).detach()).requires_grad_(needs in ("all", "x"))
            weight.requires_grad_(needs in ("all", "weight"))
            weight.grad = None
            if bias is not None:
                bias.requires_grad_(needs in ("all", "bias"))
                bias.grad = None
            y = function(x, weight, bias, group, sequence_parallel=parallel)
            y.mul_(2).div_(2)  # a result may be changed in place
            y.backward(strided(mine(full_dy, y_sharded)))
            what = f"{function.__name__}, {dtype}, SP {parallel}, bias {biased}, gradient of {needs}"
            yield f"y of {what}", y, mine(full_y, y_sharded)
            if x.requires_grad:
                yield f"dx of {what}", x.grad, mine(full_x.grad, x_sharded)
            if weight.requires_grad:
                yield f"dweight of {what}", weight.grad, part(full_weight.grad, group, 0 if function is column else 1)
            if bias is not None and bias.requires_grad:
                yield (
                    f"dbias of {what}",
                    bias.grad,
                    part(full_bias.grad, group, 0) if function is column else full_bias.grad,
                )


def blocks(group: dist.ProcessGroup) -> Triples:
    """x + row(gelu(column(norm(x)))) with two micro-batches between gradients."""
    size, hidden, width = group.size(), 6, 5 * group.size()
    for dtype, parallel in cases(DTYPES, (False, True)):
        shapes = [(hidden,), (hidden,), (width, hidden), (width,), (hidden, width), (hidden,)]
        full = [leaf(randn(*shape, key=20 + i, dtype=dtype)) for i, shape in enumerate(shapes)]
        dims = [None, None, 0, 0, 1, None]
        ours = [
            nn.Parameter((p if dim is None else part(p, group, dim)).detach().clone())
            for p, dim in zip(full, dims, strict=True)
        ]
        for index in (0, 1, 5):
            if parallel:
                tensor_parallel.sum_gradient_over(ours[index], group)
        for micro_batch in range(2):
            full_x = leaf(randn(2 * size, 3, hidden, key=30 + micro_batch, dtype=dtype))
            full_dy = randn(*full_x.shape, key=40 + micro_batch, dtype=dtype)
            normed = F.layer_norm(full_x, (hidden,), full[0], full[1])
            full_y = full_x + F.linear(F.gelu(F.linear(normed, full[2], full[3])), full[4], full[5])
            full_y.backward(full_dy)
            x = leaf(part(full_x, group, 0) if parallel else full_x)
            normed = F.layer_norm(x, (hidden,), ours[0], ours[1])
            inner = column_parallel_linear(normed, ours[2], ours[3], group, sequence_parallel=parallel)
            outer = row_parallel_linear(F.gelu(inner), ours[4], ours[5], group, sequence_parallel=parallel)
            y = x + outer
            y.backward(part(full_dy, group, 0) if parallel else full_dy)
            what = f"{dtype}, SP {parallel}, micro-batch {micro_batch}"
            yield f"y, {what}", y, part(full_y, group, 0) if parallel else full_y
            yield f"dx, {what}", x.grad, part(full_x.grad, group, 0) if parallel else full_x.grad
        for index, (p, expected, dim) in enumerate(zip(ours, full, dims, strict=True)):
            gradient = expected.grad if dim is None else part(expected.grad, group, dim)
            yield f"gradient of parameter {index}, {dtype}, SP {parallel}", p.grad, gradient


def overlap(group: dist.ProcessGroup) -> Triples:
    """That the column backward computes while its collectives run, and that SP keeps this process's part of x alone."""
    events: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "wait" or args[0]._work is not None:
                events.append(name)
            return function(*args, **kwargs)

        return call

    kept: list[int] = []

    def count(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    places: list[tuple[Any, str]] = [(linear, name) for name in ("product", "weight_gradient")]
    places += [(tensor_parallel, name) for name in ("_all_gather", "_reduce_scatter")]
    places += [(dist, "all_reduce"), (tensor_parallel.Pending, "wait")]
    expected = {
        False: ["product", "all_reduce", "weight_gradient", "wait"],
        True: ["_all_gather", "product", "_reduce_scatter", "wait", "weight_gradient", "wait"],
    }
    for parallel in (False, True):
        x, weight = leaf(randn(4, 3, key=1)), leaf(randn(2, 3, key=2))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            y = column_parallel_linear(x, weight, None, group, sequence_parallel=parallel)
        yield f"kept elements, SP {parallel}", torch.tensor(sum(kept)), torch.tensor(x.numel() + weight.numel())
        real = [getattr(place, name) for place, name in places]
        for (place, name), function in zip(places, real, strict=True):
            setattr(place, name, recorded(name, function))
        y.sum().backward()
        for (place, name), function in zip(places, real, strict=True):
            setattr(place, name, function)
        yield f"SP {parallel}: {events}", torch.tensor(events == expected[parallel]), torch.tensor(True)
        kept.clear()
        events.clear()


def initialization(group: dist.ProcessGroup) -> Triples:
    methods = {"normal": nn.init.normal_, "xavier": nn.init.xavier_uniform_}
    table = [((12, 5), 0, None), ((5, 12), 1, None), ((32, 3), 0, HEADS_PARTS)]
    for (name, method), (shape, dim, parts), dtype in cases(methods.items(), table, (*DTYPES, torch.bfloat16)):
        torch.manual_seed(SEED)
        full = nn.Parameter(torch.empty(shape, dtype=dtype))
        initialize_sharded(full, method, shape, dim, None, parts)
        state = torch.get_rng_state()
        local = list(shape)
        local[dim] //= group.size()
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(local, dtype=dtype))
        torch.manual_seed(SEED)
        initialize_sharded(module.weight, method, shape, dim, group, parts)
        what = f"{name}, {shape}, {dtype}"
        yield f"generator after {what}", torch.get_rng_state(), state
        starts = torch.tensor([0, 16, 24]) if parts else torch.tensor([0])
        lengths = [p // group.size() for p in parts or (shape[dim],)]
        rows = torch.cat(
            [
                torch.arange(length) + start + length * group.rank()
                for start, length in zip(starts, lengths, strict=True)
            ]
        )
        yield f"shard of {what}", module.weight, full.index_select(dim, rows)
        shards = [torch.empty_like(module.weight.detach()) for _ in range(group.size())]
        dist.all_gather(shards, module.weight.detach(), group)
        yield f"shards joined of {what}", join_shards(shards, partitions_of(module)["weight"]), full


MODERN = LayerConfig(
    24,
    8,
    20,
    hidden_act="silu",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    norm="rms_norm",
    norm_bias=False,
    attention_bias=False,
    mlp_bias=False,
    gated_mlp=True,
    num_key_value_heads=4,
    head_dim=6,
    qk_norm=True,
    rope_theta=1e4,
    initializer_range=0.3,
)
MODERN_KINDS = {
    "qwen3 and mistral": (MODERN, replace(MODERN, qk_norm=False, attention_window=2)),
    "modernbert": (
        replace(MODERN, norm="layer_norm", hidden_act="gelu", num_key_value_heads=None, norm_before_attention=False),
        replace(MODERN, norm="layer_norm", attention_window=2, mlp_bias=True, attention_bias=True, norm_bias=True),
    ),
    "shared key heads": (
        replace(MODERN, num_key_value_heads=2, attention_bias=True),
        replace(MODERN, num_key_value_heads=1, head_dim=4, norm_before_attention=False, attention_window=3),
    ),
    "post-LN": (replace(MODERN, pre_layer_norm=False, normalize_invertible=True, gelu_checkpoint=True),),
}


def modern_layers(group: dist.ProcessGroup) -> Triples:
    """Start values, outputs and gradients of stacks of today's layers, packed batches too; dropout where all drop alike."""
    batch, length = 2, 8
    lengths = torch.tensor([8, 4])
    real = torch.arange(length) < lengths[:, None]
    borders = torch.tensor([0, 8, 12], dtype=torch.int32)
    for (name, configs), sequence, packed in cases(MODERN_KINDS.items(), (False, True), (False, True)):
        p = 0.0 if sequence else 0.2
        dropping = [replace(config, hidden_dropout_prob=p) for config in configs]
        stacks = []
        for parallel in (tensor_parallel.ONE_PROCESS, tensor_parallel.TensorParallel(group, sequence)):
            torch.manual_seed(SEED)
            again: Any = "full" if packed else "none"  # what backward computes again, collectives too
            stacks.append(LayerStack(dropping, activation_checkpointing=again, parallel=parallel).double())
        single, ours = stacks
        cuts, title = partitions_of(ours), f"{name}, SP {sequence}, packed {packed}"

        def mine(full: dict[str, Tensor], cuts: Any = cuts) -> dict[str, Tensor]:
            return shard_state_dict(full, cuts, group.rank(), group.size())

        for key, value in mine(single.state_dict()).items():
            yield f"start of {key}, {title}", ours.state_dict()[key].clone(), value.clone()
        with torch.no_grad():
            for index, parameter in enumerate(single.parameters()):
                parameter.add_(0.1 * randn(*parameter.shape, key=60 + index))
        ours.load_state_dict(mine(single.state_dict()))
        results = []
        for stack in stacks:
            x, dy = leaf(randn(batch, length, 24, key=80)), randn(batch, length, 24, key=81)
            mask = AttentionMask(causal=True, key_mask=real)
            given = x
            if packed:
                mask = AttentionMask(causal=True, cu_seqlens=borders, max_length=length)
                given, dy = x[real], dy[real]
            torch.manual_seed(SEED)
            y = stack(given, mask)
            y.backward(dy)
            results.append((y, x.grad))
        for what, one, other in zip(("y", "dx"), *results, strict=True):
            yield f"{what}, {title}", other, one
        for key, value in mine({key: parameter.grad for key, parameter in single.named_parameters()}).items():
            yield f"gradient of {key}, {title}", ours.get_parameter(key).grad, value


def generation(group: dist.ProcessGroup) -> Triples:
    """A text in pieces, over a cache of which each process has its key heads, against one pass of one process."""
    for name, configs in MODERN_KINDS.items():
        stacks = []
        for parallel in (tensor_parallel.ONE_PROCESS, tensor_parallel.TensorParallel(group)):
            torch.manual_seed(SEED)
            stacks.append(LayerStack(configs, parallel=parallel).double().eval())
        single, ours = stacks
        x, cache, mask = randn(2, 8, 24, key=82), KeyValueCache(8), AttentionMask(causal=True)
        with torch.no_grad():
            pieces = [ours(piece, AttentionMask(causal=True), cache) for piece in x.split([5, 1, 2], 1)]
            yield f"y, {name}", torch.cat(pieces, 1), single(x, mask)


def dropout_masks(group: dist.ProcessGroup) -> dict[str, Any]:
    """This process's place in the group and its masks, (hidden, attention) by sequence_parallel, after its seeds."""
    tracker = RngStatesTracker("cpu")
    seed_tensor_parallel(SEED, group, tracker)
    result: dict[str, Any] = {"rank": group.rank()}
    for parallel in (False, True):
        seeds = draw_dropout_seeds(torch.device("cpu"), tracker, sequence_parallel=parallel)
        masks = [keep_mask(torch.Size([64]), 0.5, seed, site) for site, seed in enumerate(seeds)]
        result[f"SP {parallel}"] = {"seeds": [int(seed) for seed in seeds], "masks": masks}
    return result


CHECKS: dict[str, Callable[[dist.ProcessGroup], Triples]] = {
    check.__name__: check
    for check in (
        collective_pairs,
        linear_layers,
        blocks,
        overlap,
        initialization,
        modern_layers,
        generation,
        embeddings,
        cross_entropies,
        half_precision_cross_entropies,
    )
}


def worker() -> dict[int, dict[str, Any]]:
    """By group size: the triples of every check, detached, and this process's dropout masks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]  # ranks within the group are not those of the world
    results: dict[int, dict[str, Any]] = {}
    for group in (halves[dist.get_rank() % 2], dist.group.WORLD):
        results[group.size()] = {
            name: [(what, ours.detach(), expected.detach()) for what, ours, expected in check(group)]
            for name, check in CHECKS.items()
        }
        results[group.size()]["dropout_masks"] = dropout_masks(group)
    dist.destroy_process_group()
    return results
