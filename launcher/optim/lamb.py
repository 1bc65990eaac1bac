"""LAMB: Adam whose update of each tensor is rescaled to the norm of that tensor.

Source: You et al., Large Batch Optimization for Deep Learning, arXiv 1904.00962, algorithm 2. docs/optimizers.md
compares the three conventions in use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...kernels.errors import UserError
from ...kernels.parallel.sharding import is_sharded
from ..config.optimizers import OPTIMIZER_TERMS, OptimizerConfig
from ..config.schema import Precision
from ..processes.topology import Topology
from .kind import OptimizerKind, parameter_groups
from .slices import Slice

Convention = Literal["paper", "nvidia", "deepspeed"]
_PIECE_NUMEL = 1 << 18


class Lamb(torch.optim.Optimizer):
    """LAMB on whole tensors, one trust ratio each, in a few multi-tensor operations and without a device sync.

    With m and v the running means of g and g², λ weight_decay and t the steps of that tensor:
      paper      u = m̂ / (√v̂ + eps) + λw,  w <- w - lr · r · u, with m̂ = m / (1 - β1ᵗ), v̂ = v / (1 - β2ᵗ)
      nvidia     as paper, but r = 1 in groups without weight decay
      deepspeed  u = m / (√v + eps) + λw,  w <- w - lr · √(1 - β2ᵗ) / (1 - β1ᵗ) · r · u
    and r = ‖w‖ / ‖u‖ between min_coeff and max_coeff (None: no bound), exactly 1 where either norm is 0. Without
    bias_correction both corrections are 1, and paper equals deepspeed.

    Every option can differ by parameter group. State: exp_avg and exp_avg_sq in fp32 (fp64 for fp64 parameters),
    whatever the parameter's dtype; step, a CPU tensor, counted for each parameter. A parameter without gradient is
    left alone.
    sharded: for each parameter, in the order of params, whether it is this process's part of a tensor that the processes of
        `group` hold together, under tensor parallelism: its norms are then those of the whole tensor, by one all-reduce of
        two numbers per sharded parameter and group. None: none is.
    Under ZeRO the optimizer sees flat shards in place of tensors, and needs `divide` before its first step.
    Raises UserError for options out of range and for sparse gradients.
    """

    def __init__(  # noqa: PLR0913 - the keyword arguments of an optimizer are its published form
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        convention: Convention = "paper",
        max_coeff: float | None = 10.0,
        min_coeff: float | None = 0.01,
        sharded: Sequence[bool] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self._trust_ratios: dict[int, Tensor] = {}
        # by position, because wrappers put copies in the place of the parameters
        self._sharded, self._group = sharded, group
        self._slices: dict[int, Slice] = {}
        self._data_group: ProcessGroup | None = None
        self._device: torch.device | None = None
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"bias_correction": bias_correction, "convention": convention}
        options |= {"max_coeff": max_coeff, "min_coeff": min_coeff}
        super().__init__(params, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._trust_ratios = {}
        missing: dict[str, Any] = {
            "_sharded": None,
            "_group": None,
            "_slices": {},
            "_data_group": None,
            "_device": None,
        }
        self.__dict__ = missing | self.__dict__

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Raises UserError for an option out of its range."""
        super().add_param_group(param_group)
        _check_options(self.param_groups[-1])

    def divide(self, slices: Sequence[Slice], topology: Topology, *, replicated: bool) -> None:
        """Step `slices` from now on, unless they are whole: see `SteppedInSlices`.

        Trust ratios stay those of whole tensors: their norms are summed over the replicas by one all-reduce for each slice.
        What is in no segment is neither read nor written. All processes must step the same slices in the same order.
        """
        if not replicated:
            self._slices = {id(each.tensor): each for each in slices}
            self._data_group, self._device = topology.data_group, topology.device

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter with a gradient in place. Return what the closure returns, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._slices:
            for group in self.param_groups:
                for flat in group["params"]:
                    if flat.grad is not None:
                        self._step_slice(group, self._slices[id(flat)])
            return loss
        self._trust_ratios = {}
        num_params_before = 0
        for group in self.param_groups:
            indices = [i for i, param in enumerate(group["params"]) if param.grad is not None]
            if indices:
                params = [group["params"][i] for i in indices]
                self._step_group(group, params, [num_params_before + i for i in indices])
            num_params_before += len(group["params"])
        return loss

    def trust_ratios(self) -> dict[int, Tensor]:
        """Return the trust ratios of the last step: 0-dim tensors on the device, by the parameter's index in state_dict().

        Empty before the first step and after loading; parameters without gradient are absent.
        """
        return self._trust_ratios

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of state_dict, bit by bit; options that it does not have, as Adam's, stay those of this optimizer.

        Raises UserError, and changes nothing, if a Lamb cannot step with it.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        options = [{name: group[name] for name in group.keys() & self.defaults} for group in self.param_groups]
        groups = [{**own, **saved} for own, saved in zip(options, state_dict["param_groups"], strict=False)]
        _check_state(groups, state_dict["state"], params)
        if len(groups) == len(state_dict["param_groups"]):  # else the base class refuses it
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)
        # The base class casts moments to the dtype of their parameter, which rounds those of bf16 and fp16 parameters.
        saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(saved_id)
            if saved and param.dtype != _state_dtype(param):
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[param][name] = saved[name].to(param.device, _state_dtype(param), copy=True)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """Return the state of one parameter, made of zeros at its first step."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it there waits for no device
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format)
        return state

    def _step_group(self, group: dict[str, Any], params: list[Tensor], places: list[int]) -> None:
        """Step whole params of one group, which all have gradients. places: of each among all parameters."""
        if any(param.grad.is_sparse for param in params):  # type: ignore[union-attr]
            raise UserError("Lamb got a sparse gradient, and needs dense ones; build the embedding with sparse=False")
        states = [self._state_of(param) for param in params]
        torch._foreach_add_([state["step"] for state in states], 1)
        weights = [param.to(_state_dtype(param)) for param in params]  # the parameter itself unless it is bf16 or fp16
        pieces = _Pieces(
            weights,
            [param.grad.to(_state_dtype(param)) for param in params],  # type: ignore[union-attr]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [int(state["step"]) for state in states] if group["bias_correction"] else [],
        )
        self._step_pieces(group, pieces, places, places)
        for param, weight in zip(params, weights, strict=True):
            if weight is not param:
                param.copy_(weight)

    def _step_slice(self, group: dict[str, Any], own: Slice) -> None:
        state = self._state_of(own.tensor)
        state["step"] += 1
        weights = own.tensor.to(_state_dtype(own.tensor))
        assert own.tensor.grad is not None, "asked by the caller"

        def cut(flat: Tensor) -> list[Tensor]:
            return [flat[segment.start : segment.start + segment.numel] for segment in own.segments]

        pieces = _Pieces(
            cut(weights),
            cut(own.tensor.grad.to(weights.dtype)),
            cut(state["exp_avg"]),
            cut(state["exp_avg_sq"]),
            [int(state["step"])] * len(own.segments) if group["bias_correction"] else [],
        )
        self._step_pieces(group, pieces, [segment.place for segment in own.segments], own.places)
        if weights is not own.tensor:
            own.tensor.copy_(weights)

    def _step_pieces(self, group: dict[str, Any], pieces: "_Pieces", own: Sequence[int], places: Sequence[int]) -> None:
        """Update the weights of the pieces. own: the parameter of each; places: the parameters that any process steps here."""
        updates, lr_factors = _updates(group, pieces)
        ratios = self._ratios(group, pieces.weights, updates, own, places)
        by_place = dict(zip(places, ratios.unbind(), strict=True))
        self._trust_ratios.update(by_place)
        if not pieces.weights:  # of a shard that is all padding: this process has only taken part in the sums
            return
        # One ratio per tensor, broadcast: it stays on the device.
        factors = [-group["lr"] * factor for factor in lr_factors]
        torch._foreach_addcmul_(pieces.weights, updates, [by_place[place] for place in own], factors)

    def _ratios(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        updates: list[Tensor],
        own: Sequence[int],
        places: Sequence[int],
    ) -> Tensor:
        """Return trust ratios (len(places),) under the group's convention and bounds."""
        if group["convention"] == "nvidia" and group["weight_decay"] == 0:
            return torch.ones(len(places), device=self._device or weights[0].device)
        if self._slices:
            weight_norms, update_norms = self._summed_norms(weights, updates, own, places)
        else:
            weight_norms, update_norms = norms(weights), norms(updates)
        shared = [i for i, place in enumerate(places) if self._sharded is not None and self._sharded[place]]
        if shared and self._group is not None:
            squares = torch.stack([weight_norms[shared], update_norms[shared]]).square()
            dist.all_reduce(squares, group=self._group)
            weight_norms[shared], update_norms[shared] = squares.sqrt()
        ratios = weight_norms / update_norms
        if group["min_coeff"] is not None or group["max_coeff"] is not None:
            ratios.clamp_(group["min_coeff"], group["max_coeff"])
        ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
        return ratios.to(weights[0].device) if weights else ratios

    def _summed_norms(
        self, weights: list[Tensor], updates: list[Tensor], own: Sequence[int], places: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return norms (len(places),), on `self._device`, of tensors that the processes of the data group hold in pieces."""
        squares = torch.zeros(2, len(places), device=self._device)
        if weights:
            columns = {place: column for column, place in enumerate(places)}
            own_norms = torch.stack([norms(weights), norms(updates)]).to(squares)
            squares[:, [columns[place] for place in own]] = own_norms.square()
        dist.all_reduce(squares, group=self._data_group)
        weight_norms, update_norms = squares.sqrt()
        return weight_norms, update_norms


@dataclass
class _Pieces:
    """What one step changes: tensors of equal shapes and wide dtype, and the steps of each (empty without bias correction)."""

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[int]


def norms(tensors: list[Tensor]) -> Tensor:
    """Return L2 norms (len(tensors),), taken over pieces and then over the norms of the pieces.

    PyTorch's fp32 norm on a CPU adds up in a few running sums, which stall as they grow: 0.2 % off at 31 million
    elements, the word embedding of BERT-large, against 2e-6 for one piece.
    """
    pieces_of = [tensor.reshape(-1).split(_PIECE_NUMEL) for tensor in tensors]
    piece_norms = torch.stack(torch._foreach_norm([piece for pieces in pieces_of for piece in pieces]))
    return torch.stack(torch._foreach_norm(piece_norms.split([len(pieces) for pieces in pieces_of])))


def _updates(group: dict[str, Any], pieces: _Pieces) -> tuple[list[Tensor], list[float]]:
    """Move the moments on. Return the updates u before the trust ratio, and the factors of bias correction on lr."""
    if not pieces.weights:
        return [], []
    beta1, beta2 = group["betas"]
    torch._foreach_lerp_(pieces.exp_avgs, pieces.grads, 1 - beta1)
    torch._foreach_mul_(pieces.exp_avg_sqs, beta2)
    torch._foreach_addcmul_(pieces.exp_avg_sqs, pieces.grads, pieces.grads, 1 - beta2)

    steps = pieces.steps
    corrections1 = [1 - beta1**step for step in steps]
    sqrt_corrections2 = [(1 - beta2**step) ** 0.5 for step in steps]
    in_update = bool(steps) and group["convention"] != "deepspeed"
    lr_factors = [1.0] * len(pieces.weights)
    if steps and not in_update:
        lr_factors = [root / c for root, c in zip(sqrt_corrections2, corrections1, strict=True)]

    denominators = torch._foreach_sqrt(pieces.exp_avg_sqs)
    if in_update:
        torch._foreach_div_(denominators, sqrt_corrections2)
    torch._foreach_add_(denominators, group["eps"])
    if in_update:
        torch._foreach_mul_(denominators, corrections1)
    updates = torch._foreach_div(pieces.exp_avgs, denominators)
    if group["weight_decay"] != 0:
        torch._foreach_add_(updates, pieces.weights, alpha=group["weight_decay"])
    return list(updates), lr_factors


def _state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of moments and arithmetic: fp32, or fp64 for an fp64 parameter."""
    return torch.promote_types(param.dtype, torch.float32)


def _check_state(groups: list[dict[str, Any]], states: dict[int, dict[str, Any]], params: list[Tensor]) -> None:
    """Raise UserError for options out of range, and for moments that are missing or of another shape than their parameter."""
    for group in groups:
        _check_options(group)
    saved_ids = [saved_id for group in groups for saved_id in group["params"]]
    for number, param in zip(saved_ids, params, strict=False):  # the base class tells of another number of them
        state = states.get(number)
        found = {name: tuple(value.shape) for name, value in (state or {}).items() if isinstance(value, Tensor)}
        wanted = {"step": (), "exp_avg": tuple(param.shape), "exp_avg_sq": tuple(param.shape)}
        if state and wanted.items() - found.items():
            remedy = "load the state of a Lamb of the same parameters, or start with a new one"
            what = f"the state to load holds the tensors {found} of parameter {number}, must hold {wanted}"
            raise UserError(f"{what}; {remedy}")


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not isinstance(group[name], Real):
            raise UserError(f"Lamb option {name} is a {type(group[name]).__name__}, must be a number; give a float")
    beta1, beta2 = group["betas"]
    lower, upper = group["min_coeff"], group["max_coeff"]
    rules = {
        "lr": (group["lr"] >= 0, "must not be negative"),
        "betas": (0 <= beta1 < 1 and 0 <= beta2 < 1, "must both lie in [0, 1)"),
        "eps": (group["eps"] > 0, "must be positive"),
        "weight_decay": (group["weight_decay"] >= 0, "must not be negative"),
        "convention": (group["convention"] in ("paper", "nvidia", "deepspeed"), "must be paper, nvidia or deepspeed"),
        "min_coeff": (lower is None or lower >= 0, "must not be negative; use None for no lower bound"),
        "max_coeff": (
            upper is None or (upper > 0 and upper >= (lower or 0)),
            f"must be positive and at least min_coeff={lower}; use None for no upper bound",
        ),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise UserError(f"Lamb option {name}={group[name]!r} {rule}")


def _build(model: torch.nn.Module, config: OptimizerConfig, tensor_group: ProcessGroup | None, _: Precision) -> Lamb:
    groups = parameter_groups(model, config.weight_decay)
    sharded = [is_sharded(param) for group in groups for param in group["params"]]
    options = config.model_dump(include={*OPTIMIZER_TERMS["lamb"].params, "convention"})
    return Lamb(groups, **options, sharded=sharded, group=tensor_group)


def _text(config: OptimizerConfig, _: Precision) -> str:
    bounds = {"from": config.min_coeff, "to": config.max_coeff}
    limits = " ".join(f"{word} {value:g}" for word, value in bounds.items() if value is not None)
    return f", {config.convention} convention, trust ratio {limits or 'unbounded'}"


def _histograms(optimizer: Lamb) -> dict[str, list[float]]:
    ratios = list(optimizer.trust_ratios().values())
    return {"lamb_coeffs": torch.stack(ratios).tolist()} if ratios else {}


LAMB = OptimizerKind(_build, _text, _histograms)
