"""What the modules of `te` have in common: parameters, the dtype rule, one method for every matrix product."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..fp8.linear import Fp8State
from ..fp8.project import project, runs_fp8
from ..layers.inner_modules import has_hooks
from ..ops.autocast import autocast_dtype
from ..ops.main_grad import into_main_grad, main_grad_of
from ..ops.parallel_linear import ParallelMode
from ..parallel.collectives import ONE_PROCESS, TensorParallel, copy_to_group
from ..parallel.sharding import initialize_sharded, keep_marks

Initializer = Callable[[Tensor], Any]
DEFAULT_INIT: Initializer = functools.partial(nn.init.normal_, mean=0.0, std=0.023)


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """Hold the parameters that every module with matrix products takes.

    sequence_parallel: between a row-parallel product and the next column-parallel one, activations are this rank's part of
        the sequence, which is dim 0. Needs tensor parallelism.
    tp_group: the ranks that share the module. tp_size: how many they are; above 1 without tp_group, the group follows with
        `set_tensor_parallel_group` before the first forward, and weights are 0 until then.
    get_rng_state_tracker: gives the tracker whose state `model-parallel-rng` draws what has to differ between the ranks.
    fuse_wgrad_accumulation: backward adds the gradient of a weight that has the attribute `main_grad`, a buffer that the
        trainer allocates, to that, and `.grad` of the weight stays None. Other weights get `.grad`, which DeepSpeed reads.
    params_dtype: of the parameters. device: where they are; None: torch's default device; "meta": see `reset_parameters`.
    """

    sequence_parallel: bool = False
    tp_group: ProcessGroup | None = None
    tp_size: int = 1
    get_rng_state_tracker: Callable[[], Any] | None = None
    fuse_wgrad_accumulation: bool = False
    params_dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.tp_group is not None and self.tp_size not in (1, self.tp_group.size()):
            raise ValueError(
                f"tp_size={self.tp_size} but tp_group has {self.tp_group.size()} ranks; leave tp_size out beside a group"
            )
        if self.tp_size < 1:
            raise ValueError(f"tp_size={self.tp_size} is not positive; give the number of ranks that share the module")
        if self.sequence_parallel and self.tp_group is None and self.tp_size == 1:
            raise ValueError(
                "sequence_parallel=True divides the sequence over the ranks of tensor parallelism, of which there is one; "
                "give tp_group or tp_size, or leave it out"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedOptions":
        return self  # a process group cannot be copied, and copies of a module share it

    @property
    def ranks(self) -> int:
        """Return how many ranks share the module."""
        return self.tp_size if self.tp_group is None else self.tp_group.size()

    def part(self, name: str, size: int) -> int:
        """Return one rank's part of `size`; raises ValueError where it is not whole."""
        if size % self.ranks:
            legal = [str(n) for n in range(1, size + 1) if size % n == 0]
            shown = ", ".join(legal[:8]) + (", ..." if len(legal) > 8 else "")
            raise ValueError(f"{name}={size} is not divisible by tp_size={self.ranks}; legal sizes: {shown}")
        return size // self.ranks


@dataclass(frozen=True)
class Shard:
    """How the ranks divide a parameter: along dim, and where it is `parts` equal parameters along dim, each of those."""

    dim: int
    parts: int = 1


@dataclass
class _Start:
    """How a parameter starts, and its version then: a later version was loaded, trained or set."""

    init: Initializer
    shard: Shard | None
    version: int = -1


class ProjectionModule(nn.Module):
    """A module with matrix products.

    dtype rule: under torch.autocast activations and the weights of products are cast to its dtype at each forward;
    elsewhere the input has the dtype of the parameters.
    """

    def __init__(self, options: SharedOptions) -> None:
        super().__init__()
        self.options = options
        self._start: dict[str, _Start] = {}

    def set_tensor_parallel_group(self, tp_group: ProcessGroup) -> None:
        """Set the ranks that share this module and those inside it, for a module built with tp_size alone.

        Weights that were not loaded or changed since are drawn now. Raises ValueError where the group has another size.
        """
        for module in self.modules():
            if isinstance(module, ProjectionModule):
                module._take_group(tp_group)

    def _take_group(self, tp_group: ProcessGroup) -> None:
        waiting = self.options.tp_group is None and self.options.tp_size > 1
        if self.options.ranks != tp_group.size():
            raise ValueError(
                f"the module was built for tp_size={self.options.ranks}, the group has {tp_group.size()} ranks; they must be "
                f"equal"
            )
        self.options = dataclasses.replace(self.options, tp_group=tp_group)
        for name, start in self._start.items() if waiting else ():
            if getattr(self, name)._version == start.version:
                self._draw(name)

    def reset_parameters(self) -> None:
        """Draw this module's own parameters again, those on `meta` on torch's default device."""
        for name in self._start:
            self.register_parameter(name, with_memory(getattr(self, name)))
            self._draw(name)

    def _allocate(
        self,
        name: str,
        shape: tuple[int, ...] | None,
        init: Initializer = nn.init.zeros_,
        *,
        shard: Shard | None = None,
    ) -> None:
        """Register parameter `name` with its start values, or None where shape is None: absent from the state dict.

        shape: on this rank. shard: how the ranks divide the whole; None: each has it all.
        """
        if shape is None:
            self.register_parameter(name, None)
            return
        parameter = nn.Parameter(torch.empty(shape, dtype=self.options.params_dtype, device=self.options.device))
        self.register_parameter(name, parameter)
        self._start[name] = _Start(init, shard)
        if not parameter.is_meta:
            self._draw(name)

    @torch.no_grad()
    def _draw(self, name: str) -> None:
        """Start values, drawn in fp32; of a divided parameter this rank's part of the whole, whatever the number of ranks."""
        parameter, start, options = getattr(self, name), self._start[name], self.options
        if start.shard is None:
            whole = torch.empty_like(parameter, dtype=torch.float32)
            start.init(whole)
            parameter.copy_(whole)
        elif options.tp_group is None and options.tp_size > 1:
            parameter.zero_()
        else:
            dim, parts = start.shard.dim, start.shard.parts
            shape = list(parameter.shape)
            shape[dim] *= options.ranks
            sizes = [shape[dim] // parts] * parts
            initialize_sharded(parameter, start.init, shape, dim, options.tp_group, sizes if parts > 1 else None)
            keep_marks(self)
        start.version = parameter._version

    def _enter(self, inp: Tensor, size: int, size_name: str) -> Tensor:
        """Return the input as the module computes with it; raises ValueError where its last dim is not `size`."""
        if inp.shape[-1] != size:
            raise ValueError(f"the input is {tuple(inp.shape)}; its last dim must be {size_name}={size}")
        return autocast(inp)

    def _group(self) -> ProcessGroup | None:
        """Return the ranks that share this module; raises ValueError where they are still to be given."""
        if self.options.tp_group is None and self.options.tp_size > 1:
            raise ValueError(
                f"tp_size={self.options.tp_size} but the module has no group; call set_tensor_parallel_group(tp_group) before "
                f"the first forward"
            )
        return self.options.tp_group

    def _replicated(self, parameter: Tensor | None) -> Tensor | None:
        """Return a parameter that all ranks hold whole, as it acts on this rank's part of the sequence.

        Under sequence parallelism a rank's gradient of it is a part of a sum; backward adds up the ranks' parts.
        """
        if parameter is None or not self.options.sequence_parallel:
            return parameter
        return copy_to_group(parameter, self._group())

    def _project(
        self,
        inp: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fp8: Fp8State,
        mode: ParallelMode | None,
        is_first_microbatch: bool | None,
        amax: Tensor | None = None,
    ) -> Tensor:
        """Return inp @ weight.T + bias: the one way in which a module multiplies. fp8: of this product. amax: of inp."""
        main_grad = None
        if runs_fp8(fp8, inp.device):
            check_dtype(inp, weight)
            main_grad = self._main_grad(weight)
        else:
            weight = cast_like(inp, self._trained(weight, is_first_microbatch))
            bias = None if bias is None else cast_like(inp, bias)
        bias = self._replicated(bias) if mode == "row" else bias
        parallel, first = self._shared_by(mode is not None), is_first_microbatch
        return project(
            inp, weight, bias, fp8, mode, parallel, is_first_microbatch=first, main_grad=main_grad, amax=amax
        )

    def _shared_by(self, shards: bool) -> TensorParallel:
        """Return the ranks that share a product. shards: whether each has a part of its weight."""
        return TensorParallel(self._group(), self.options.sequence_parallel) if shards else ONE_PROCESS

    def _trained(self, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
        """Return the weight, its gradient sent where fuse_wgrad_accumulation wants it."""
        main_grad = self._main_grad(weight)
        if main_grad is None:
            return weight
        return into_main_grad(weight, main_grad, overwrite=is_first_microbatch is True)

    def _main_grad(self, weight: Tensor) -> Tensor | None:
        """Return the buffer that takes the gradient of `weight`, None where `.grad` does."""
        if not (self.options.fuse_wgrad_accumulation and weight.requires_grad and torch.is_grad_enabled()):
            return None
        return main_grad_of(weight)

    def _handed_out(self, bias: Tensor | None) -> Tensor | None:
        """Return a bias for a caller that adds it later: a copy where FSDP may have freed the parameter's memory by then."""
        managed = has_hooks(self) or not isinstance(
            bias, nn.Parameter
        )  # by FSDP 2, or by FSDP 1, which puts views there
        return bias.clone() if bias is not None and managed else bias

    def _check_parallelism(self, parallel: bool, remedy: str) -> None:
        """Raise ValueError where ranks share the module but divide nothing of it."""
        if self.options.ranks > 1 and not parallel:
            raise ValueError(
                f"tp_size={self.options.ranks} ranks share the module, but it has no parallel mode; set {remedy}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Transformer Engine's checkpoints have a pickled FP8 state of each module, which is not read: a fresh one follows
        state_dict.pop(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def with_memory(parameter: nn.Parameter) -> nn.Parameter:
    """Return the parameter, in place of one on `meta` a new one on torch's default device, without values."""
    if not parameter.is_meta:
        return parameter
    new = nn.Parameter(torch.empty_like(parameter, device=torch.get_default_device()), parameter.requires_grad)
    vars(new).update(vars(parameter))
    return new


def autocast(inp: Tensor) -> Tensor:
    """Return the input in the dtype of torch.autocast, or as it is."""
    dtype = autocast_dtype(inp.device)
    return inp if dtype is None else inp.to(dtype)


def cast_like(inp: Tensor, parameter: Tensor) -> Tensor:
    """Return a parameter in the dtype of the input it works on; raises ValueError where they differ outside torch.autocast."""
    check_dtype(inp, parameter)
    return parameter.to(inp.dtype)


def check_dtype(inp: Tensor, parameter: Tensor) -> None:
    """Raise ValueError where the dtypes differ outside torch.autocast, or the parameter has no values."""
    if parameter.is_meta and not inp.is_meta:
        raise ValueError(
            "the parameters are on meta and have no values; call reset_parameters(), or to_empty() and load_state_dict()"
        )
    if parameter.dtype != inp.dtype and autocast_dtype(inp.device) is None:
        raise ValueError(
            f"the input is {inp.dtype}, the parameters are {parameter.dtype}; convert one of them, or use torch.autocast"
        )


def check_positive(**sizes: int) -> None:
    """Raise ValueError for the first size that is not positive."""
    for name, size in sizes.items():
        if size <= 0:
            raise ValueError(f"{name}={size} is not positive; give the module's real size")


def parallel_mode_of(name: str | None) -> ParallelMode | None:
    """Return 'column' or 'row' for Transformer Engine's two spellings; raises ValueError for anything else but None."""
    if name in ("column", "Column"):
        return "column"
    if name in ("row", "Row"):
        return "row"
    if name is not None:
        raise ValueError(f"parallel_mode={name!r} is unknown; use 'column', 'row' or None")
    return None
