"""Tensor-parallel training of a transformers model: slices it in place, with the collectives that its gradients need.

The model keeps its classes, call signatures and names of parameters. Between the projections into attention or MLP and those
out of it a process computes its own heads and columns; everything else is replicated, or with sequence parallelism divided by
token.
"""

import dataclasses
import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.errors import UserError
from ....kernels.parallel.collectives import TensorParallel
from ....kernels.parallel.sharding import is_sharded, keep_marks, mark_sharded, take_shard
from ..catalog.lookup import Policies
from ..catalog.paths import ABSENT, find, owner_of
from .agreement import check_first_forward
from .modules import (
    AllReduceConv1D,
    AllReduceLinear,
    AllReduceQuantLinear,
    ColumnParallelConv1D,
    ColumnParallelLinear,
    ColumnParallelQuantLinear,
    Sharded,
    VocabParallelEmbedding,
    VocabParallelLinear,
    become,
    give_group,
    projection_class,
)
from .partial_gradients import PartialGradients
from .plan import Place, Plan, Projection, make_plan
from .rank_random import RankRandom
from .sequence import check_sequence_parallel, divide_sequence

_CLASSES: dict[tuple[str, str | None], Any] = {
    ("column", "Linear"): ColumnParallelLinear,
    ("column", "Conv1D"): ColumnParallelConv1D,
    ("column", "QuantLinear"): ColumnParallelQuantLinear,
    ("row", "Linear"): AllReduceLinear,
    ("row", "Conv1D"): AllReduceConv1D,
    ("row", "QuantLinear"): AllReduceQuantLinear,
    ("embedding", None): VocabParallelEmbedding,
    ("head", "Linear"): VocabParallelLinear,
}


def shard(
    model: nn.Module, tp_group: dist.ProcessGroup, policy: Policies = None, sequence_parallel: bool = False
) -> None:
    """Turns a whole model into this process's part of it, in place; call it on every process of the group.

    model: on the device that the group communicates from; the values of the group's first process are taken.
    policy: one, or one for each class of layers; None: those of `policies_for`.
    sequence_parallel: divides the tokens between the products too, over the same processes.

    Afterwards every process must be given the same batch, and have torch's (and numpy's) default generators seeded alike:
    dropout of whole activations is then equal on all, that of attention probabilities and of intermediate activations differs.
    A parameter that is cut carries the marks of `kernels.sharding.mark_sharded`, and so do those of copies. Whole parameters
    between two products, as norms of queries, get the sum of their gradients. Attention weights that a model returns are
    those of this process's heads. The first forward asks whether batches and generators are equal, and raises a ValueError
    if not. `save_pretrained` must be given the `full_state_dict`. Call it before optimizers or DeepSpeed engines are made.
    Afterwards `resize_token_embeddings` is an error, of models inside too, and so is a pass through adapters or other modules
    around what is cut.

    Raises ValueError without a group, for a model without a policy, for a model that is sharded already, under
    sequence_parallel for a model that does not support it, and one for all rules that do not fit.
    """
    if tp_group is None:
        raise UserError(
            "tp_group is None; give the process group that shares the model, torch.distributed.group.WORLD for all processes"
        )
    plan = make_plan(model, policy, tp_group.size())
    if tp_group.rank() == 0:
        plan.warn()
    if sequence_parallel:
        check_sequence_parallel(plan)
    _broadcast(model, tp_group)
    apply_plan(model, plan, TensorParallel(tp_group, sequence_parallel))
    check_first_forward(model, tp_group)
    for inner in model.modules():  # the model that a head stands on has these methods too
        for name, instead in {"save_pretrained": _save_whole, "resize_token_embeddings": _refuse_to_resize}.items():
            if hasattr(inner, name):
                setattr(inner, name, functools.partial(instead, inner))  # survives copies


def apply_plan(model: nn.Module, plan: Plan, parallel: TensorParallel) -> None:
    """Carries out the plan on a model whose weights are equal on all processes."""
    random = RankRandom(parallel)
    for module, replacement in plan.replaced_modules:
        become(module, replacement)
        give_group(module, parallel.group)
    _cut(model, plan, parallel)
    places = {id(inner): (owner, name) for owner in model.modules() for name, inner in owner.named_children()}
    for projection in plan.projections:
        _replace(projection, parallel, random)
        if isinstance(projection.module, Sharded):
            projection.module.place = places[id(projection.module)]
    for place in plan.places:
        for path, value in place.arguments.items():
            owner, name = owner_of(place.module, path)
            setattr(owner, name, value)
        _sum_partial_gradients(place, parallel)
        for path in place.policy.replicated():
            _draw_alike(place.module, path, random)
        place.module.register_forward_hook(lambda *_: random.leave(), always_call=True)  # when an error kept it from it
    if parallel.divides_tokens:
        divide_sequence(model, plan, parallel, random)


def _save_whole(model: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
    """`save_pretrained`, which would by itself write one process's shards as if they were the model."""
    if state_dict is None:
        raise UserError(
            f"this {type(model).__name__} is sharded; on every process, call "
            "save_pretrained(folder, state_dict=full_state_dict(model, group))"
        )
    type(model).save_pretrained(model, *args, state_dict=state_dict, **kwargs)


def _refuse_to_resize(model: nn.Module, *_: Any, **__: Any) -> None:
    raise UserError(
        f"this {type(model).__name__} is sharded, and its processes would each change a vocabulary of their own; call "
        f"resize_token_embeddings before shard(model, group)"
    )


@torch.no_grad()
def _broadcast(model: nn.Module, group: dist.ProcessGroup) -> None:
    first = dist.get_global_rank(group, 0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # the others follow from the config
            dist.broadcast(tensor, first, group)


@torch.no_grad()
def _cut(model: nn.Module, plan: Plan, parallel: TensorParallel) -> None:
    """Puts this process's shards in the place of the parameters, wherever the model holds them."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    for projection in plan.projections:
        for name, partition in projection.cuts.items():
            parameter = model.get_parameter(name)
            if is_sharded(parameter):
                continue  # tied to one that is cut already
            whole: Tensor = parameter
            if projection.block == "vocabulary":  # zeros behind its rows, up to a multiple of the number of processes
                whole = F.pad(parameter, (0, 0) * (parameter.dim() - 1) + (0, -len(parameter) % parallel.size))
            own = take_shard(whole, partition, parallel.rank, parallel.size, name)
            shard = nn.Parameter(own, parameter.requires_grad)
            rows = len(parameter) if projection.block == "vocabulary" else None
            mark_sharded(shard, dataclasses.replace(partition, rows=rows))
            for owner, own_name in owners[id(parameter)]:
                setattr(owner, own_name, shard)
    keep_marks(model)


def _sum_partial_gradients(place: Place, parallel: TensorParallel) -> None:
    """Lets the layer sum gradients of whole parameters between two products, under sequence parallelism of all whole ones."""
    known = {find(place.module, path)[0] for path in place.policy.shared_by_heads()}
    if parallel.divides_tokens:
        known |= {name for name, parameter in place.module.named_parameters() if not is_sharded(parameter)}
    partial = PartialGradients(place.module, known, parallel)
    partial.sum_known()
    place.module.register_forward_pre_hook(partial.sum_known)
    foreign = any(one.replace and not isinstance(one.module, Sharded) for one in place.projections)
    if parallel.divides_tokens or parallel.size == 1 or foreign:
        return  # all are known, or a product of the policy's own is not told from others
    for module in (one.module for one in place.projections if one.kind == "row"):
        if isinstance(module, Sharded) and module.place is not None:
            module.look_behind = functools.partial(partial.look_behind, module.place[1])


def _replace(projection: Projection, parallel: TensorParallel, random: RankRandom) -> None:
    module = projection.module
    if projection.kind != "tensors" or isinstance(module, nn.Embedding):
        _set_sizes(module)
    if projection.kind == "tensors" and projection.replace is None:
        return
    cls = projection.replace or _CLASSES[projection.kind, projection_class(module)]
    become(module, cls, keep_overrides=projection.kind == "embedding")
    if not isinstance(module, Sharded):
        give_group(module, parallel.group)
        return
    module.parallel = parallel if projection.block != "vocabulary" else TensorParallel(parallel.group)
    module.in_attention = projection.block == "attention"
    if projection.block != "vocabulary" and not parallel.divides_tokens:
        module.random = random
    if isinstance(module, VocabParallelLinear):
        module.vocabulary_size = module.weight.partition_rows  # type: ignore[attr-defined]


def _set_sizes(module: nn.Module) -> None:
    """Makes the sizes that a module says it has those of its tensors."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    names = {"out_features": rows, "in_features": columns, "num_embeddings": rows, "embedding_dim": columns}
    if projection_class(module) == "Conv1D":
        names = {"nx": rows, "nf": columns}
    for name, size in names.items():
        if hasattr(module, name):
            setattr(module, name, size)


def _draw_alike(layer: nn.Module, path: str, random: RankRandom) -> None:
    """Lets the modules at a path draw what all processes draw, though they stand between two products."""
    _, module = find(layer, path)
    if module is None or module is ABSENT:
        return  # left out by the config
    paused: list[Tensor | None] = []
    module.register_forward_pre_hook(lambda *_: paused.append(random.pause()))
    module.register_forward_hook(lambda *_: random.resume(paused.pop()))
