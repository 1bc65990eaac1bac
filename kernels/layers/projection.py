"""The parameters of one matrix product of a layer."""

from typing import Any

from torch import nn


class Projection(nn.Linear):
    """A linear layer whose state dict also holds what FP8 products keep from step to step, once there is such a thing.

    fp8: None until the first pass inside fp8_autocast, or until a state dict brings it; see fp8_products.py.
    """

    fp8: Any

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_module("fp8", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}fp8.scale" in state_dict:
            from .fp8_products import state_of

            state_of(self)  # torch loads it next, as it does all modules inside
        super()._load_from_state_dict(state_dict, prefix, *rest)
