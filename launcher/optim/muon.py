"""Muon: momentum whose steps of the layers' matrices are made orthogonal; AdamW steps all else.

Sources: Jordan et al., https://kellerjordan.github.io/posts/muon/; Liu et al., Muon is Scalable for LLM Training,
arXiv 2502.16982, for decay and the scale by shape. docs/optimizers.md says what it costs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.adamw import adamw

from ...kernels.errors import UserError
from ...kernels.layers.projection import matrices_of
from ..config.optimizers import OptimizerConfig
from ..config.schema import Precision
from ..processes.topology import Topology
from .kind import OptimizerKind, parameter_groups
from .newton_schulz import orthogonalize
from .slices import Segment, Slice
from .whole_matrices import Exchange, Matrix, matrices_in, parts_held

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Muon(torch.optim.Optimizer):
    """Muon on whole matrices, whatever parts of them this process holds, and AdamW, each in groups of its own.

    In a group with `orthogonal`, for a matrix w (m, n) with gradient g and mean b, λ weight_decay and μ momentum:
      b <- μb + (1 - μ)g;  u = μb + (1 - μ)g with nesterov, else b
      w <- (1 - lr·λ)w - lr·s·orthogonalize(u), with s = 0.2 sqrt(max(m, n)) for match_rms_adamw, sqrt(max(1, m/n)) for original
    as torch.optim.Muon has it. Other groups are stepped by torch's fused AdamW. Every option can differ by group.

    State, in dtype and shape of the parameter: `momentum_buffer` where it holds matrices, else `step`, `exp_avg`, `exp_avg_sq`.
    matrices: by position of a parameter among all groups, the matrices that it holds; every one of an orthogonal group.
    Under ZeRO the optimizer sees flat shards in place of parameters, and needs `divide` before its first step; so it does where
    processes divide parameters.
    """

    def __init__(
        self,
        params: Any,
        *,
        matrices: Mapping[int, Sequence[Matrix]],
        **options: Any,
    ) -> None:
        """Options: lr, betas, eps, weight_decay, momentum, nesterov, newton_schulz_steps, newton_schulz_dtype, adjust_lr."""
        self._matrices = matrices
        self._slices: dict[int, Slice] = {}
        self._topology: Topology | None = None
        self._replicated = False
        self._exchanges: dict[tuple[int, ...], Exchange] = {}
        # fused: torch then keeps `step` on the device when it loads a state
        super().__init__(params, {**options, "orthogonal": False, "lr_factor": 1.0, "fused": True})

    def divide(self, slices: Sequence[Slice], topology: Topology, *, replicated: bool) -> None:
        """Step `slices` from now on: see `SteppedInSlices`. All processes must step the same ones in the same order."""
        self._slices, self._topology = {id(each.tensor): each for each in slices}, topology
        self._replicated, self._exchanges = replicated, {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter with a gradient in place. Return what the closure returns, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._slices:
            everything = [param for group in self.param_groups for param in group["params"]]
            whole = [Slice(p, [Segment(place, 0, 0, p.numel())], [place]) for place, p in enumerate(everything)]
            self._slices = {id(each.tensor): each for each in whole}
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                (self._step_matrices if group["orthogonal"] else self._step_others)(group, params)
        return loss

    def _step_matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        means = [self.state[param]["momentum_buffer"] for param in params]
        grads = _gradients(params)
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, means, group["momentum"]) if group["nesterov"] else means
        flat = [update.to(_DTYPES[group["newton_schulz_dtype"]]).reshape(-1) for update in updates]
        exchange = self._exchange(params)
        orthogonal = orthogonalize(exchange.collect(flat), group["newton_schulz_steps"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for part, values in exchange.hand_back(orthogonal, flat):
            own = params[part.tensor].view(-1).narrow(0, part.start, part.numel)
            own.add_(values, alpha=-group["lr"] * _scale(exchange.matrices[part.matrix], group["adjust_lr"]))

    def _exchange(self, params: list[Tensor]) -> Exchange:
        """Return the exchange of the matrices in these tensors of the optimizer, made at their first step."""
        key = tuple(map(id, params))
        if key not in self._exchanges:
            slices = [self._slices[number] for number in key]
            places = sorted({place for each in slices for place in each.places})
            found = [(place, matrix) for place in places for matrix in self._matrices[place]]
            by_place: dict[int, list[tuple[int, Matrix]]] = {place: [] for place in places}
            for number, (place, matrix) in enumerate(found):
                by_place[place].append((number, matrix))
            held = parts_held(slices, by_place)
            everyones = [held] if self._topology is None else self._topology.gather(held)
            whole = [matrix for _, matrix in found]
            self._exchanges[key] = Exchange(whole, everyones, self._topology, replicated=self._replicated)
        return self._exchanges[key]

    def _step_others(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        states = [self.state[param] for param in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            _gradients(params),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]  # all have one


def _scale(matrix: Matrix, adjust_lr: str) -> float:
    """Return the factor on the learning rate of a matrix."""
    if adjust_lr == "original":
        return math.sqrt(max(1, matrix.rows / matrix.columns))
    return 0.2 * math.sqrt(max(matrix.rows, matrix.columns))


def _build(
    model: torch.nn.Module, config: OptimizerConfig, tensor_group: ProcessGroup | None, precision: Precision
) -> Muon:
    sharers = 1 if tensor_group is None else tensor_group.size()
    partitions = {id(weight): partition for weight, partition in matrices_of(model)}
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": config.weight_decay, "orthogonal": True}]
    adamw_lr = config.lr if config.adamw_lr is None else config.adamw_lr
    for group in parameter_groups(model, config.weight_decay):
        others = [param for param in group["params"] if id(param) not in partitions]
        groups[0]["params"] += [param for param in group["params"] if id(param) in partitions]
        if others:
            groups.append({**group, "params": others, "lr": adamw_lr, "lr_factor": adamw_lr / config.lr})
    weights = groups[0]["params"]
    if not weights:
        what = "optimizer.type=muon steps the matrices of the layers, and the model has none that trains"
        raise UserError(f"{what}; let some train, or use adamw")
    matrices = {place: matrices_in(w.shape, partitions[id(w)], sharers) for place, w in enumerate(weights)}
    names = {"lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "newton_schulz_steps", "adjust_lr"}
    dtype = newton_schulz_dtype(config, precision)
    return Muon(groups, matrices=matrices, newton_schulz_dtype=dtype, **config.model_dump(include=names))


def newton_schulz_dtype(config: OptimizerConfig, precision: Precision) -> str:
    """Return what the iterations multiply in, in a run of this precision."""
    return config.newton_schulz_dtype or ("bf16" if precision in ("bf16", "fp8") else "fp32")


def _text(config: OptimizerConfig, precision: Precision) -> str:
    nesterov = " with Nesterov" if config.nesterov else ""
    steps = f"{config.newton_schulz_steps} Newton-Schulz steps in {newton_schulz_dtype(config, precision)}"
    others = "" if config.adamw_lr is None else f", AdamW with lr {config.adamw_lr:g} outside the layers' matrices"
    return f", momentum {config.momentum:g}{nesterov}, {steps}, {config.adjust_lr}{others}"


MUON = OptimizerKind(_build, _text)
