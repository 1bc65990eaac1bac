"""Small models to swap, of odd sizes, and what their tests compare."""

import functools

import pytest
import torch
from helpers.hf_models import MODELS, VOCABULARY
from helpers.hf_similar_models import SIMILAR_MODELS

pytest.importorskip("transformers")

# Three heads of five columns, and an MLP whose width is no multiple of anything; with rotary positions an even number of
# columns, and heads that are together wider than the hidden size, or narrower.
BERT_SIZES = {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 37}
SHARED = {"num_attention_heads": 6, "head_dim": 4, "intermediate_size": 37, "attention_dropout": 0.1}
SIZES = {
    "bert": BERT_SIZES,
    "roberta": BERT_SIZES,
    "xlm_roberta": BERT_SIZES,
    "camembert": BERT_SIZES,
    "roberta_prelayernorm": BERT_SIZES,
    "electra": BERT_SIZES,
    "ernie": BERT_SIZES,
    "distilbert": {"dim": 15, "n_heads": 3, "hidden_dim": 37},
    "gpt2": {"n_embd": 15, "n_head": 3, "n_inner": 37},
    "llama": SHARED | {"hidden_size": 18, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": SHARED | {"hidden_size": 15, "num_key_value_heads": 2},
    "qwen3": SHARED | {"hidden_size": 45, "num_key_value_heads": 6},
    "modernbert": {"hidden_size": 18, "num_attention_heads": 3, "intermediate_size": 37},
}
NO_DROPOUT = {
    **{name: {"attention_dropout": 0.0} for name in ("llama", "mistral", "qwen3")},
    "modernbert": {},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
}
ALL = MODELS | SIMILAR_MODELS
BERT_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODERS = ("gpt2", "llama", "mistral", "qwen3")
models = pytest.mark.parametrize("name", SIZES)
decoders = pytest.mark.parametrize("name", DECODERS)
# fp32 sums in another order; values are of size 1.
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
close_gradients = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)


def build(name, **fields):
    return ALL[name].build(**SIZES[name] | fields)


def build_without_dropout(name, **fields):
    return build(name, **NO_DROPOUT.get(name, BERT_NO_DROPOUT) | fields)


def inputs(padding="right", rows=2, length=9):
    """Ids, mask and labels; labels stand where the prediction comes from a token, in a decoder too."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, -4:] = 0
    if padding == "left":
        mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(output):
    return output.logits if "logits" in output else output.prediction_logits


def with_gradients(model, **given):
    model.zero_grad()
    output = model(**given)
    loss = output.loss if output.loss is not None else logits_of(output).square().mean()
    loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def pretrain_inputs(name, given):
    """With the second label of BertForPreTraining, which has no loss without it."""
    labels = torch.arange(len(given["input_ids"])) % 2
    return given | ({"next_sentence_label": labels} if name == "bert" else {})


def bits(state):
    return {name: (tensor.shape, tensor.dtype, tensor.clone()) for name, tensor in state.items()}


def assert_same_bits(state, expected):
    assert list(state) == list(expected)
    for name, tensor in state.items():
        shape, dtype, values = expected[name]
        assert (tensor.shape, tensor.dtype) == (shape, dtype), name
        assert torch.equal(tensor, values), name
