"""Say in words which kernels compute the layers of a model."""

from collections.abc import Mapping

import torch

from ...kernels.fp8.linear import fp8_path
from ...kernels.ops.attention.attention import LARGEST_TRITON_HEAD
from ...kernels.ops.choices import Activation, Norm
from ...kernels.ops.linear import cpu_library
from ...recipes.config import LayerFlags, ModelConfig
from ...recipes.recipe import Runtime

_NORMS: Mapping[Norm, str] = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
_ACTIVATIONS: Mapping[Activation, str] = {"gelu": "GELU", "gelu_tanh": "GELU", "silu": "SiLU", "relu2": "squared ReLU"}


def kernels_text(model: ModelConfig, flags: LayerFlags, runtime: Runtime, device: torch.device) -> str:
    """Return which kernels compute the layers on this device, in words."""
    on_gpu = device.type == "cuda"
    if on_gpu and flags.kernels == "auto":
        elementwise = f"{_NORMS[model.norm]}, {_ACTIVATIONS[model.hidden_act]}"
        triton = f"attention, {elementwise}, dropout and the loss"
        if runtime.parallel.size > 1:
            triton = f"attention, {elementwise} and dropout"  # the loss over a divided vocabulary is PyTorch's
        if model.head_size > LARGEST_TRITON_HEAD:
            triton = triton.removeprefix("attention, ") + "; PyTorch for attention, whose heads are too wide"
        text, padding = f"Triton for {triton}; cuBLAS for matrix products", "; no padding"
    else:
        where = "layer.kernels: reference" if on_gpu else f"no GPU; {cpu_library()} for matrix products in fp32"
        text, padding = f"PyTorch ({where})", "; no padding outside attention"
    if flags.cuda_graph:
        text += "; a CUDA graph of all layers" if on_gpu else "; no CUDA graph"
    if runtime.fp8:
        text += f"; {fp8_path(device)}"
    if runtime.activation_checkpointing != "none":
        text += f"; {runtime.activation_checkpointing} activation checkpointing"
    return text + padding if flags.unpad else text
