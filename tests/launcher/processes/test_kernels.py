"""The line of the start-up report that says what computes the layers."""

import pytest
import torch

from xformer_train.launcher.processes.kernels import kernels_text
from xformer_train.recipes.config import LayerFlags, ModelConfig
from xformer_train.recipes.recipe import PLAIN_RUNTIME

CUDA = torch.device("cuda")  # a name alone, which needs no GPU


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({}, "Triton for attention, LayerNorm, GELU, dropout and the loss; cuBLAS for matrix products"),
        (
            {"norm": "rms_norm", "norm_bias": False, "hidden_act": "silu"},
            "Triton for attention, RMSNorm, SiLU, dropout and the loss; cuBLAS for matrix products",
        ),
        (
            {"head_dim": 512, "hidden_act": "relu2"},
            "Triton for LayerNorm, squared ReLU, dropout and the loss; PyTorch for attention, whose heads are too wide; cuBLAS",
        ),
    ],
)
def test_it_names_what_the_layers_of_the_model_have(model, text):
    assert kernels_text(ModelConfig(**model), LayerFlags(), PLAIN_RUNTIME, CUDA).startswith(text)


def test_a_cpu_and_the_reference_path_are_pytorch():
    cpu = kernels_text(ModelConfig(), LayerFlags(unpad=True), PLAIN_RUNTIME, torch.device("cpu"))
    assert cpu.startswith("PyTorch (no GPU;") and cpu.endswith("no padding outside attention")
    reference = kernels_text(ModelConfig(), LayerFlags(kernels="reference"), PLAIN_RUNTIME, CUDA)
    assert reference == "PyTorch (layer.kernels: reference)"
