"""Say in words what the layers of a model are, and which kernels compute them."""

from collections.abc import Mapping

import torch

from ...kernels.fp8.linear import fp8_path
from ...kernels.ops.attention.attention import LARGEST_TRITON_HEAD
from ...kernels.ops.choices import Activation, Norm
from ...kernels.ops.linear import CpuLibraries, cpu_libraries
from ...recipes.config import LayerFlags, ModelConfig
from ...recipes.recipe import Runtime

_NORMS: Mapping[Norm, str] = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
_ACTIVATIONS: Mapping[Activation, str] = {"gelu": "GELU", "gelu_tanh": "GELU", "silu": "SiLU", "relu2": "squared ReLU"}


def layers_text(model: ModelConfig) -> str:
    """Return what the model has that BERT and GPT-2 have not, in words; empty if nothing."""
    activation, depth, biases = _ACTIVATIONS[model.hidden_act], model.num_hidden_layers, ("norm", "attention", "mlp")
    missing = [
        name for name in biases if not getattr(model, f"{name}_bias") and (name, model.norm) != ("norm", "rms_norm")
    ]
    local = sum(map(model.is_local, range(depth)))
    found = {
        "rotary positions": model.position_embedding == "rope",
        _NORMS[model.norm]: model.norm != "layer_norm",
        f"gated {activation}": model.gated_mlp,
        activation: not model.gated_mlp and activation != "GELU",
        f"{model.key_heads} key heads for {model.num_attention_heads} heads": model.key_heads
        != model.num_attention_heads,
        f"heads of {model.head_size} columns": model.head_dim is not None,
        "a norm of queries and keys": model.qk_norm,
        f"windows of {model.sliding_window} tokens in {local} of {depth} layers": local > 0,
        f"no biases in {', '.join(missing)}": missing,
        "a head apart from the embedding": not model.tie_word_embeddings,
    }
    return "; ".join(text for text, holds in found.items() if holds)


def libraries_text(libraries: CpuLibraries) -> str:
    """Return which library computes which fp32 products."""
    text = f"{libraries.product} for matrix products"
    if libraries.weight_gradient != libraries.product:
        text += f" and {libraries.weight_gradient} for gradients of weights"
    return text


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
        where = "layer.kernels: reference" if on_gpu else f"no GPU; {libraries_text(cpu_libraries())} in fp32"
        text, padding = f"PyTorch ({where})", "; no padding outside attention"
    if flags.cuda_graph:
        text += "; a CUDA graph of all layers" if on_gpu else "; no CUDA graph"
    if runtime.fp8:
        text += f"; {fp8_path(device)}"
    if runtime.activation_checkpointing != "none":
        text += f"; {runtime.activation_checkpointing} activation checkpointing"
    return text + padding if flags.unpad else text
