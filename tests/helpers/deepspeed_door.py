"""Small layers behind DeepSpeed's names, for their tests."""

import torch

from xformer_train.kernels.deepspeed.config import DeepSpeedTransformerConfig
from xformer_train.kernels.deepspeed.layer import DeepSpeedTransformerLayer

SMALL = {
    "hidden_size": 24,
    "heads": 3,
    "attn_dropout_ratio": 0.1,
    "hidden_dropout_ratio": 0.1,
    "num_hidden_layers": 2,
    "initializer_range": 0.02,
}


def config(**changes):
    return DeepSpeedTransformerConfig(**{**SMALL, **changes})


def layer(weights_from=3, **changes):
    torch.manual_seed(weights_from)
    return DeepSpeedTransformerLayer(config(**changes))


def perturbed(module):
    """The module with every parameter moved off its start, so that mixing two of them up shows."""
    torch.manual_seed(17)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module
