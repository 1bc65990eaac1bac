"""LAMB: Adam whose update of each tensor is rescaled to the norm of that tensor.

Source: You et al., Large Batch Optimization for Deep Learning, arXiv 1904.00962, algorithm 2. docs/optimizers.md
compares the three conventions in use.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

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
    Under ZeRO the optimizer would see flat shards in place of tensors: the norms, hence the update, would be wrong.
    Raises ValueError for options out of range and for sparse gradients.
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
    ) -> None:
        self._trust_ratios: dict[int, Tensor] = {}
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "convention": convention,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._trust_ratios = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Nothing; the group is checked and joins the others."""
        super().add_param_group(param_group)
        _check_options(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """What the closure returns, or None; every parameter with a gradient is updated in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._trust_ratios = {}
        num_params_before = 0
        for group in self.param_groups:
            indices = [i for i, param in enumerate(group["params"]) if param.grad is not None]
            if indices:
                ratios = self._step_group(group, [group["params"][i] for i in indices])
                keys = (num_params_before + i for i in indices)
                self._trust_ratios.update(zip(keys, ratios.unbind(), strict=True))
            num_params_before += len(group["params"])
        return loss

    def trust_ratios(self) -> dict[int, Tensor]:
        """Trust ratios of the last step: 0-dim tensors on the device, by the parameter's index in state_dict().

        Empty before the first step and after loading; parameters without gradient are absent.
        """
        return self._trust_ratios

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing; the state becomes that of state_dict, bit by bit."""
        super().load_state_dict(state_dict)
        # The base class casts moments to the dtype of their parameter, which rounds those of bf16 and fp16 parameters.
        saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(saved_id)
            if saved is not None and param.dtype != _state_dtype(param):
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[param][name] = saved[name].to(param.device, _state_dtype(param), copy=True)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """State of one parameter, made of zeros at its first step."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it there waits for no device
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format)
        return state

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> Tensor:
        """Trust ratios (len(params),) of one step over params, which all belong to group and have gradients."""
        if any(param.grad.is_sparse for param in params):  # type: ignore[union-attr]
            raise ValueError("Lamb got a sparse gradient, and needs dense ones; build the embedding with sparse=False")
        states = [self._state_of(param) for param in params]
        torch._foreach_add_([state["step"] for state in states], 1)
        weights = [param.to(_state_dtype(param)) for param in params]  # the parameter itself unless it is bf16 or fp16
        updates, lr_factors = _updates(group, weights, params, states)
        ratios = _trust_ratios_of(group, weights, updates)
        # One ratio per tensor, broadcast: it stays on the device.
        torch._foreach_addcmul_(weights, updates, ratios.unbind(), [-group["lr"] * factor for factor in lr_factors])
        for param, weight in zip(params, weights, strict=True):
            if weight is not param:
                param.copy_(weight)
        return ratios


def weight_and_update_norms(weights: list[Tensor], updates: list[Tensor]) -> tuple[Tensor, Tensor]:
    """L2 norm of every weight and of every update: two tensors (len(weights),)."""
    return _norms(weights), _norms(updates)


def _norms(tensors: list[Tensor]) -> Tensor:
    """L2 norms (len(tensors),), taken over pieces and then over the norms of the pieces.

    PyTorch's fp32 norm on a CPU adds up in a few running sums, which stall as they grow: 0.2 % off at 31 million
    elements, the word embedding of BERT-large, against 2e-6 for one piece.
    """
    pieces_of = [tensor.reshape(-1).split(_PIECE_NUMEL) for tensor in tensors]
    piece_norms = torch.stack(torch._foreach_norm([piece for pieces in pieces_of for piece in pieces]))
    return torch.stack(torch._foreach_norm(piece_norms.split([len(pieces) for pieces in pieces_of])))


def _updates(
    group: dict[str, Any], weights: list[Tensor], params: list[Tensor], states: list[dict[str, Any]]
) -> tuple[list[Tensor], list[float]]:
    """Updates u before the trust ratio, and the factors that bias correction puts on lr; moves the moments on."""
    beta1, beta2 = group["betas"]
    exp_avgs = [state["exp_avg"] for state in states]
    exp_avg_sqs = [state["exp_avg_sq"] for state in states]
    grads = [param.grad.to(_state_dtype(param)) for param in params]  # type: ignore[union-attr]
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)

    steps = [int(state["step"]) for state in states] if group["bias_correction"] else []
    corrections1 = [1 - beta1**step for step in steps]
    sqrt_corrections2 = [(1 - beta2**step) ** 0.5 for step in steps]
    in_update = bool(steps) and group["convention"] != "deepspeed"
    lr_factors = [1.0] * len(weights)
    if steps and not in_update:
        lr_factors = [root / c for root, c in zip(sqrt_corrections2, corrections1, strict=True)]

    denominators = torch._foreach_sqrt(exp_avg_sqs)
    if in_update:
        torch._foreach_div_(denominators, sqrt_corrections2)
    torch._foreach_add_(denominators, group["eps"])
    if in_update:
        torch._foreach_mul_(denominators, corrections1)
    updates = torch._foreach_div(exp_avgs, denominators)
    if group["weight_decay"] != 0:
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    return list(updates), lr_factors


def _trust_ratios_of(group: dict[str, Any], weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    """Trust ratios (len(weights),) under the group's convention and bounds."""
    if group["convention"] == "nvidia" and group["weight_decay"] == 0:
        return weights[0].new_ones(len(weights))
    weight_norms, update_norms = weight_and_update_norms(weights, updates)
    ratios = weight_norms / update_norms
    if group["min_coeff"] is not None or group["max_coeff"] is not None:
        ratios.clamp_(group["min_coeff"], group["max_coeff"])
    return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)


def _state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of moments and arithmetic: fp32, or fp64 for an fp64 parameter."""
    return torch.promote_types(param.dtype, torch.float32)


def _check_options(group: dict[str, Any]) -> None:
    """Nothing. Raises ValueError for an option out of its range."""
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
            raise ValueError(f"Lamb option {name}={group[name]!r} {rule}")
