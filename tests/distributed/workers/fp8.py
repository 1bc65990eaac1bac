"""Layers of an FP8 run in several processes; imported by name in each of them."""

import math

import torch
from torch import nn

from xformer_train.kernels.fp8.linear import DelayedScaling, Fp8State, fp8_autocast, fp8_linear

SIZE = 16


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIZE, SIZE))
        self.fp8 = Fp8State()

    def forward(self, x):
        return fp8_linear(x, self.weight, None, self.fp8)


def reduction_worker():
    """Scales of two layers after a step with other amaxes in each process, with and without reduction."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    alone = torch.distributed.new_group([0]), torch.distributed.new_group([1])
    seen = []
    for reduce_amax, group in ((True, None), (False, None), (True, alone[rank])):
        model = [Layer(), Layer()]
        for layer in model:
            nn.init.constant_(layer.weight, 0.5 + rank)
        with fp8_autocast(fp8_recipe=DelayedScaling(reduce_amax=reduce_amax), fp8_group=group):
            x = torch.full((1, SIZE), (4.0, math.nan)[rank])
            y = model[1](torch.full((1, SIZE), 2.0 + 6 * rank)) + model[0](x)
        y.backward(torch.full((1, SIZE), 4.0 - 3 * rank))
        seen.append([layer.state_dict()["fp8.scale"].tolist() for layer in model])
    torch.distributed.destroy_process_group()
    return seen
