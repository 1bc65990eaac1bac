"""The section `optimizer` of the run config, and what each optimizer takes of it. No torch import.

The algorithms stand in `launcher/optim`, one file each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ...recipes.config import Fault, Section
from .deepspeed_keys import show

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    type: Literal["lamb", "adamw", "muon"] = "adamw"
    """AdamW, LAMB for large batches, which scales the step of each parameter, or Muon, which makes the steps of the layers'
    matrices orthogonal and steps all else by AdamW: docs/optimizers.md."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate at the peak of the schedule, without lr_offset."""
    adamw_lr: Annotated[float, Field(gt=0)] | None = None
    """Muon: learning rate of what AdamW steps; null is lr. The schedule acts on both alike."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Decay per step of the mean of the gradient, and of the mean of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean square, by which the step is divided."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of matrices and embeddings; biases and the weights of norms are never decayed."""
    max_coeff: Annotated[float, Field(gt=0)] | None = 10.0
    """LAMB: upper bound of the trust ratio; null for none."""
    min_coeff: Annotated[float, Field(ge=0)] | None = 0.01
    """LAMB: lower bound of the trust ratio; null for none."""
    bias_correction: bool = True
    """Correct the moments for their start at zero."""
    convention: Literal["paper", "nvidia", "deepspeed"] = "paper"
    """LAMB: where the bias correction acts and which parameters get a trust ratio; docs/optimizers.md has the table."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Muon: decay per step of the mean of the gradient of a matrix."""
    nesterov: bool = True
    """Muon: step along the mean as it will be after one more step with this gradient."""
    newton_schulz_steps: Annotated[int, Field(ge=1, le=99)] = 5
    """Muon: iterations that bring the singular values of a step near 1."""
    newton_schulz_dtype: Literal["bf16", "fp32"] | None = None
    """Muon: what these iterations multiply in; null is bf16 where training.precision comes to bf16 or fp8, else fp32."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Muon: factor on lr of an m x n matrix. `match_rms_adamw` 0.2 sqrt(max(m, n)), for learning rates and decay that suit
    AdamW; `original` sqrt(max(1, m/n))."""


@dataclass(frozen=True)
class OptimizerTerms:
    """How one optimizer and DeepSpeed's JSON fit together."""

    deepspeed_types: tuple[str, ...]
    """Values of `optimizer.type` in DeepSpeed's JSON that mean this optimizer, in lower case."""
    params: tuple[str, ...] = ("lr", "betas", "eps", "weight_decay", "bias_correction")
    """Keys above that it takes, and that `optimizer.params` in DeepSpeed's JSON may repeat."""
    needs_places: bool = False
    """Whether it must know which parameters a shard of ZeRO holds."""


OPTIMIZER_TERMS = {
    "lamb": OptimizerTerms(("lamb",), (*OptimizerTerms.params, "max_coeff", "min_coeff"), needs_places=True),
    # DeepSpeed's Adam is AdamW unless adam_w_mode is false.
    "adamw": OptimizerTerms(("adam", "adamw")),
    "muon": OptimizerTerms(("muon",), ("lr", "betas", "eps", "weight_decay", "momentum"), needs_places=True),
}
_OF_MUON = ("adamw_lr", "momentum", "nesterov", "newton_schulz_steps", "newton_schulz_dtype", "adjust_lr")
_NOT_OF_MUON = ("max_coeff", "min_coeff", "convention", "bias_correction")


def optimizer_faults(optimizer: OptimizerConfig) -> Iterator[Fault]:
    """Yield each broken rule between keys of the section."""
    foreign = _NOT_OF_MUON if optimizer.type == "muon" else _OF_MUON
    for name in foreign:
        value = getattr(optimizer, name)
        if value != OptimizerConfig.model_fields[name].default:
            text = f"got {show(value)}, but optimizer.type {optimizer.type} has no such key; remove it"
            yield Fault((f"optimizer.{name}",), text)
    lower, upper = optimizer.min_coeff, optimizer.max_coeff
    if lower is not None and upper is not None and lower > upper:
        keys = ("optimizer.min_coeff", "optimizer.max_coeff")
        yield Fault(keys, f"got {lower}, must be at most optimizer.max_coeff {upper}")
