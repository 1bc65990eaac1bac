"""The parameters of one matrix product of a layer."""

from typing import Any

from torch import Tensor, nn

from ..parallel.collectives import ONE_PROCESS
from ..parallel.sharding import Partition, is_sharded, partition_on


class Projection(nn.Linear):
    """A linear layer whose state dict also holds what FP8 products keep from step to step, once there is such a thing.

    fp8: None until the first pass inside fp8_autocast, or until a state dict brings it; see fp8_products.py.
    std: of the normal distribution that the weight starts from. parallel: the processes that hold shards of it.
    """

    fp8: Any
    std: float | None = None
    parallel = ONE_PROCESS

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_module("fp8", None)

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std) and set the bias to 0; without a std as torch does.

        Raises ValueError where processes share the weight: they hold shards, and weights are drawn whole.
        """
        if self.std is None:
            super().reset_parameters()
            return
        if self.parallel.size > 1:
            raise ValueError(
                f"{self.parallel.size} processes share the layer, whose weights cannot be drawn again; build a new layer"
            )
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}fp8.scale" in state_dict:
            from .fp8_products import state_of

            state_of(self)  # torch loads it next, as it does all modules inside
        super()._load_from_state_dict(state_dict, prefix, *rest)


def matrices_of(module: nn.Module) -> list[tuple[Tensor, Partition]]:
    """Return the weights of all projections inside `module`, and of each the matrices that it holds one below another.

    The matrices are `Partition.parts`, rows of each over all processes, one matrix where that is None; `Partition.dim` is what
    processes divide, if any do. A weight that two modules share stands there once.
    """
    weights = {id(inner.weight): inner.weight for inner in module.modules() if isinstance(inner, Projection)}
    return [(weight, partition_on(weight) if is_sharded(weight) else Partition(0)) for weight in weights.values()]
