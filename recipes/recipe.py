"""What a recipe gives to the training loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from ..kernels.parallel.collectives import ONE_PROCESS, TensorParallel
from .config import LayerFlags, ModelConfig, ObjectiveConfig

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Runtime:
    """What of a run, beyond its `layer` section, changes how a model computes.

    fp8: FP8 products in the layers. activation_checkpointing: what of a layer is computed again in backward. parallel: the
    processes that share the layers and the vocabulary.
    """

    fp8: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    parallel: TensorParallel = ONE_PROCESS


PLAIN_RUNTIME = Runtime()


class BuildModel(Protocol):
    """See `Recipe`."""

    def __call__(
        self,
        model: ModelConfig,
        layer: LayerFlags,
        objective: ObjectiveConfig,
        vocab_size: int,
        runtime: Runtime = PLAIN_RUNTIME,
    ) -> nn.Module: ...


@dataclass(frozen=True)
class Recipe:
    """One kind of model with its objective.

    build_model(model, layer, objective, vocab_size, runtime): the model; called with a batch's tensors as keyword arguments it
        returns the *sum* of each part of the loss as fp32 scalars, such as {"mlm": ..., "nsp": ...}. The training loss is
        the sum over parts of sum / count, with the counts of the whole step, so that it does not depend on how the step is
        cut into micro-batches and processes.
    loss_counts(batch, objective): how many terms each of those sums has.
    real_tokens(batch): tokens that are not padding.
    flops_per_sample(model, vocab_size, seq_length, predictions): matrix-product FLOPs of forward and backward of one
        sequence (backward counts twice, recomputation not at all), predictions being the positions that reach the head. At
        a mean length it is a lower bound: attention grows with the square.
    """

    build_model: BuildModel
    loss_counts: Callable[[Batch, ObjectiveConfig], dict[str, int]]
    real_tokens: Callable[[Batch], int]
    flops_per_sample: Callable[[ModelConfig, int, float, float], float]
