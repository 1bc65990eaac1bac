"""The lines of the start-up report that say what the layers are and what computes them."""

import pytest
import torch

from xformer_train.launcher.processes.kernels import kernels_text, layers_text
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


def test_of_the_layers_it_tells_what_bert_and_gpt_2_have_not():
    assert layers_text(ModelConfig()) == layers_text(ModelConfig(hidden_act="gelu_tanh", pre_layer_norm=False)) == ""
    todays = {"position_embedding": "rope", "gated_mlp": True, "norm_bias": False, "attention_bias": False}
    modernbert = ModelConfig(
        num_hidden_layers=22, sliding_window=128, global_attn_every_n_layers=3, mlp_bias=False, **todays
    )
    assert layers_text(modernbert) == (
        "rotary positions; gated GELU; windows of 128 tokens in 14 of 22 layers; no biases in norm, attention, mlp"
    )
    sizes = {"num_key_value_heads": 4, "head_dim": 128, "qk_norm": True, "tie_word_embeddings": False}
    qwen3 = ModelConfig(type="gpt", norm="rms_norm", hidden_act="silu", **todays, **sizes)
    assert layers_text(qwen3) == (
        "rotary positions; RMSNorm; gated SiLU; 4 key heads for 12 heads; heads of 128 columns; a norm of queries and keys; "
        "no biases in attention; a head apart from the embedding"
    )
    assert layers_text(ModelConfig(hidden_act="relu2", sliding_window=8)) == (
        "squared ReLU; windows of 8 tokens in 12 of 12 layers"
    )
