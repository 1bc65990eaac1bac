"""The modules that a sharded model has in the place of its projections, embeddings and heads. They keep names and isinstance.

`AllReduceLinear`, `AllReduceConv1D` and `AllReduceQuantLinear` have parallelformers' names, for policies that say
`replace=AllReduceLinear`; unlike its, they have a backward pass. None is made by a constructor: `become` turns a module that
exists into one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.errors import UserError
from ....kernels.ops.autocast import autocast_dtype
from ....kernels.ops.linear import linear
from ....kernels.ops.loss.vocab_parallel import vocab_parallel_embedding
from ....kernels.ops.parallel_linear import column_parallel_linear, row_parallel_linear
from ....kernels.parallel.collectives import ONE_PROCESS, Group, TensorParallel, gather_from_group
from .rank_random import RankRandom


class Sharded(nn.Module):
    """What the modules below have in common.

    parallel: the processes that hold the other shards. random: of the dropout between a column- and a row-parallel product,
    None: of one's own choice. in_attention: whether the module stands in attention, where tokens are not independent.
    place: the module that has this one, and under which name. look_behind: of a row-parallel product, see `PartialGradients`.
    """

    parallel: TensorParallel = ONE_PROCESS
    random: RankRandom | None = None
    in_attention: bool = False
    place: tuple[nn.Module, str] | None = None
    look_behind: Callable[[Tensor], None] | None = None

    def check_place(self) -> None:
        """Raise ValueError where another module has taken the place of this one, which it then calls."""
        if self.place is None:
            return
        owner, name = self.place
        found = owner._modules.get(name)
        if found is not self:
            raise UserError(
                f"{name} of a {type(owner).__name__} is a {type(found).__name__} now, around a shard that it knows nothing of; "
                f"remove it: a sharded model takes no adapters, but merge them before shard(model, group)"
            )

    @property
    def mp_group(self) -> Group:
        """The group, by parallelformers' name."""
        return self.parallel.group

    def column_parallel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """This process's columns of x @ weight.T + bias, (B, S, N/t); weight: (N/t, K)."""
        self.check_place()
        if self.random is not None and self.training:
            self.random.enter(x.device)
        x, weight, bias = _autocast(x, weight, bias)
        if self.parallel.divides_tokens and self.in_attention:
            return linear(x, weight, bias)  # the attention module gathered x, for all its projections
        return column_parallel_linear(
            x, weight, bias, self.parallel.group, sequence_parallel=self.parallel.divides_tokens
        )

    def row_parallel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias of all processes, (B, S, N), with sequence parallelism this process's (B, S/t, N)."""
        self.check_place()
        if self.look_behind is not None:
            self.look_behind(x)
        if self.random is not None:
            self.random.leave()
        x, weight, bias = _autocast(x, weight, bias)
        if not self.parallel.divides_tokens:
            return row_parallel_linear(x, weight, bias, self.parallel.group)
        # Tokens of attention are parts of a sequence, dim 1; those of an MLP are any rows, and stay where the gather put them.
        if self.in_attention:
            x = x.transpose(0, 1)
        y = row_parallel_linear(x, weight, bias, self.parallel.group, sequence_parallel=True)
        return y.transpose(0, 1) if self.in_attention else y


class ColumnParallelLinear(Sharded, nn.Linear):
    """An nn.Linear that holds N/t of its rows: (..., N/t) of a replicated (..., K)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.column_parallel(x, self.weight, self.bias)


class ColumnParallelConv1D(Sharded):
    """A Conv1D of transformers, weight (K, N/t): (..., N/t) of a replicated (..., K)."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.column_parallel(x, self.weight.t(), self.bias)


class AllReduceLinear(Sharded, nn.Linear):
    """An nn.Linear that holds K/t of its columns: the replicated (..., N) of everyone's (..., K/t). The bias is added once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.row_parallel(x, self.weight, self.bias)


class AllReduceConv1D(Sharded):
    """A Conv1D of transformers, weight (K/t, N): the replicated (..., N) of everyone's (..., K/t)."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.row_parallel(x, self.weight.t(), self.bias)


class ColumnParallelQuantLinear(Sharded):
    """I-BERT's QuantLinear with N/t of its rows, of a model that is not quantized."""

    weight: Tensor
    bias: Tensor
    quant_mode: bool

    def forward(self, x: Tensor, prev_act_scaling_factor: Tensor | None = None) -> tuple[Tensor, None]:
        return self.product(self.column_parallel, x)

    def product(self, linear: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, None]:
        """Return the product, without a scale. Raises UserError in a quantized model, whose scales come of whole weights."""
        if self.quant_mode:
            raise UserError(
                "quant_mode is True; a sharded I-BERT computes in floating point, so leave it out of the config"
            )
        return linear(x, self.weight, self.bias), None


class AllReduceQuantLinear(ColumnParallelQuantLinear):
    """I-BERT's QuantLinear with K/t of its columns, of a model that is not quantized."""

    def forward(self, x: Tensor, prev_act_scaling_factor: Tensor | None = None) -> tuple[Tensor, None]:
        return self.product(self.row_parallel, x)


class VocabParallelEmbedding(Sharded, nn.Embedding):
    """An nn.Embedding that holds V/t of its rows, after padding V to a multiple of t; its result is replicated."""

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Embedding
        self.check_place()
        y = vocab_parallel_embedding(input, self.weight, self.parallel.group)
        if self.padding_idx is None:
            return y
        return torch.where((input == self.padding_idx)[..., None], y.detach(), y)  # that row gets no gradient


class VocabParallelLinear(Sharded, nn.Linear):
    """A head that holds V/t of its rows: the replicated logits (..., V), those of padding cut off.

    vocabulary_size: V without padding.
    """

    vocabulary_size: int

    def forward(self, x: Tensor) -> Tensor:
        self.check_place()
        x, weight, bias = _autocast(x, self.weight, self.bias)
        y = column_parallel_linear(x, weight, bias, self.parallel.group)
        return gather_from_group(y, self.parallel.group)[..., : self.vocabulary_size]


def become(module: nn.Module, cls: Any, *, keep_overrides: bool = False) -> None:
    """Makes the module an instance of `cls` besides its own class.

    keep_overrides: methods of its own class come before those of `cls`, and reach them by super().
    """
    own = type(module)
    if issubclass(cls, own):
        module.__class__ = cls
    elif not issubclass(own, cls):
        module.__class__ = type(cls.__name__, (own, cls) if keep_overrides else (cls, own), {})


def give_group(module: nn.Module, group: Group) -> None:
    """Sets `mp_group` as parallelformers' modules have it, on a class of its own: a copy of the module can copy no group."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"mp_group": group, "__module__": cls.__module__})


def projection_class(module: nn.Module) -> str | None:
    """What kind of projection the module is, as "Linear", Conv1D and QuantLinear being transformers'; None: none."""
    if isinstance(module, nn.Linear):
        return "Linear" if type(module).forward is nn.Linear.forward else None
    known = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))
    return next((name for name in known if name in ("Conv1D", "QuantLinear")), None)


def class_before(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one that it had before `become` made it one of the above."""
    return type(module).__bases__[-1] if isinstance(module, Sharded) else type(module)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as torch.autocast would cast them for a linear layer; it does not look into autograd Functions."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
