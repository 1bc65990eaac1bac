"""Swapped models on a GPU: converted masks reach the Triton kernels, which give what the stock models give."""

import copy

import pytest
import torch
from helpers.hf_swap import build, inputs, logits_of, pretrain_inputs, with_gradients

from xformer_train.recipes.policies import revert, swap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_outputs_and_gradients_are_the_stock_models(name, attention, padding):
    stock = build(name, attn_implementation=attention).cuda()
    swapped = copy.deepcopy(stock)
    swap(swapped)
    given = {key: value.cuda() for key, value in pretrain_inputs(name, inputs(padding)).items()}
    expected, gradients = with_gradients(stock, **given)
    found, _ = with_gradients(swapped, **given)
    real = given["attention_mask"].bool()
    # Logits are of size 1; products in fp32 may be of tf32, with 11 bits.
    torch.testing.assert_close(logits_of(found)[real], logits_of(expected)[real], rtol=0, atol=5e-3)
    revert(swapped)
    for key, parameter in swapped.named_parameters():
        atol = 1e-4 + 5e-3 * gradients[key].abs().max().item()  # that of the keys' bias is rounding alone
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=0, atol=atol)
