"""A layer of transformers beside the fused layer that it becomes: whether both compute the same, by computing it."""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....kernels.layers.config import LayerConfig
from ....kernels.ops.attention.attention import AttentionMask
from ....kernels.parallel.collectives import TensorParallel
from ..catalog.layer import Description
from .fused_layer import FusedTransformerLayer, GivenMask, Origin, build_fused
from .masks import LayerMasks

# Of outputs in fp64, relative, without rotary positions and with: RMSNorms and rotations of transformers compute in fp32.
# Another eps or the other GELU makes one of 1e-6 or more.
_LARGEST_DIFFERENCE = (1e-9, 5e-7)


@dataclass(frozen=True)
class SwapPlace:
    """A layer of the model and the fused layer that it becomes. parallel: the processes that share it."""

    name: str
    module: nn.Module
    config: LayerConfig
    description: Description
    origins: dict[str, Origin]
    parallel: TensorParallel
    masks: LayerMasks
    layer_idx: int | None
    window: int | None

    def build(self, stock: nn.Module) -> FusedTransformerLayer:
        """The fused layer with the parameters of a layer like `module`."""
        parameters = dict(stock.named_parameters())
        drops = self.description.drops_attention_output
        return build_fused(self.config, drops, self.origins, self.parallel, parameters)


@torch.no_grad()
def differences(place: SwapPlace) -> list[str]:
    """Return what is wrong with a copy of the layer and its fused form, computed in fp64; nothing if both compute the same.

    A policy may be wrong, and transformers itself may have changed under one.
    """
    # Processes that share a layer may have no way to communicate but from their GPUs.
    device = torch.device("cpu") if place.parallel.size == 1 else next(place.module.parameters()).device
    place = dataclasses.replace(place, config=dataclasses.replace(place.config, kernels="reference"))
    stock = copy.deepcopy(place.module).to(device, torch.float64).eval()
    for module in stock.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    size, rotary, mask = place.config.hidden_size, place.description.rotary, AttentionMask(place.description.causal)
    x = torch.randn(2, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    given, plain = {}, mask
    if rotary:
        given["position_embeddings"] = positions = _positions(place.config.head_size, device)
        mask = GivenMask(positions=positions, convert=lambda _: (plain, None))
    try:
        expected = type(stock).forward(stock, x, **given)
    except Exception as error:  # of whatever kind: layers that need more are not what the fused layer computes
        needs = "hidden states and positions" if rotary else "hidden states"
        return [f"it does not compute on {needs} alone ({type(error).__name__}: {error})"]
    if not isinstance(expected, Tensor):
        return [f"it returns a {type(expected).__name__}, not a tensor as layers of transformers 5"]
    found = place.build(stock).eval()(x, mask)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if difference <= _LARGEST_DIFFERENCE[rotary]:
        return []
    return [f"it computes something else than its policy describes: outputs differ by {difference:.1e} of the largest"]


def _positions(head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines that turn queries and keys of five tokens, (1, 5, D) fp64, which fp32 can hold."""
    angles = torch.arange(5)[:, None] * torch.linspace(1, 0.1, head_size // 2)
    angles = angles.repeat(1, 2)[None]
    return angles.cos().to(device, torch.float64), angles.sin().to(device, torch.float64)
