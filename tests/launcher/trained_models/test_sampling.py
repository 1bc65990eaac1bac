"""The sampler and the mask filler against plain arithmetic on the model's logits."""

import pytest
import torch

from xformer_train.launcher.trained_models.sampling import Sampling, choose, continued, fill_mask, sample
from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig, TokenizerConfig
from xformer_train.recipes.data.tokenizer import train_tokenizer

ROWS = 320


LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "position_embedding": "rope",
    "norm": "rms_norm",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "gated_mlp": True,
    "layer_norm_eps": 1e-5,
}
KINDS = {
    "gpt": {"num_hidden_layers": 2},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 3},
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 6, "tie_word_embeddings": False},
}


def build(kind, **keys):
    """A model whose logits differ widely, with its tokenizer of bytes."""
    torch.manual_seed(2)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
        "initializer_range": 1.0,
    }
    config = ModelConfig(type=kind, **sizes | keys)
    model = RECIPES[kind].build_model(config, LayerFlags(), ObjectiveConfig(sentence_task="none"), ROWS).eval()
    return model, train_tokenizer("bytes", TokenizerConfig(), (), print, specials=RECIPES[kind].tokenizer.specials)


@pytest.fixture(scope="module")
def gpt():
    return build("gpt")


@pytest.fixture(scope="module")
def bert():
    return build("bert")


@torch.inference_mode()
def greedy_ids(model, ids, count, symbols):
    for _ in range(count):
        logits = model.logits(model.encode(torch.tensor([ids[-12:]])))[0, -1, :symbols]
        ids = [*ids, int(logits.argmax())]
    return ids


def test_greedy_takes_the_best_symbol_and_goes_on_past_the_longest_sequence(gpt):
    model, tokenizer = gpt
    expected = greedy_ids(model, list(b"abc"), 20, tokenizer.vocab_size)
    assert tokenizer.special_id("eos") not in expected
    assert sample(model, tokenizer, "abc", Sampling(20, greedy=True)) == tokenizer.decode(expected)


@torch.inference_mode()
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_a_seed_chooses_the_text_that_passes_over_the_whole_choose(keys, top_k):
    model, tokenizer = build("gpt", **keys)
    for seed in range(3):
        options = Sampling(16, temperature=2.0, top_k=top_k, seed=seed)
        ids, generator = list(b"abc"), torch.Generator().manual_seed(seed)
        for _ in range(16):  # to 7 tokens more than the model sees
            logits = model.logits(model.encode(torch.tensor([ids[-12:]])))[0, -1, : tokenizer.vocab_size]
            ids.append(choose(logits, options, generator))
        assert continued(model, list(b"abc"), options, tokenizer.vocab_size) == ids


def test_a_step_computes_its_new_token_alone_as_long_as_the_model_sees_all(gpt, monkeypatch):
    model, _ = gpt
    lengths, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda ids, **rest: lengths.append(ids.shape[1]) or encode(ids, **rest))
    continued(model, list(b"abc"), Sampling(13), ROWS)
    assert lengths == [3, *[1] * 9, *[12] * 3]
    lengths.clear()
    continued(model, list(range(14)), Sampling(2), ROWS)
    assert lengths == [12, 12]


def test_one_symbol_to_choose_from_and_a_low_temperature_are_greedy(gpt):
    greedy = sample(*gpt, "abc", Sampling(9, greedy=True))
    assert sample(*gpt, "abc", Sampling(9, top_k=1)) == greedy
    assert sample(*gpt, "abc", Sampling(9, temperature=1e-4)) == greedy


def test_a_seed_decides_the_text_whatever_torch_was_seeded_with(gpt):
    texts = []
    for torch_seed in (0, 1):
        torch.manual_seed(torch_seed)
        texts.append([sample(*gpt, "abc", Sampling(9, seed=seed, temperature=3.0)) for seed in range(4)])
    assert texts[0] == texts[1] and len(set(texts[0])) == 4


def test_the_end_of_the_document_ends_the_text(gpt):
    model, tokenizer = gpt
    end = tokenizer.special_id("eos")
    best = greedy_ids(model, list(b"abc"), 1, tokenizer.vocab_size)[-1]
    rows = model.word_embeddings.weight.data
    before = rows[end].clone()
    rows[end] = 2 * rows[best]  # a logit above that of the best symbol, which is positive
    try:
        assert sample(model, tokenizer, "abc", Sampling(9, greedy=True)) == "abc"
    finally:
        rows[end] = before


def test_no_symbol_comes_from_the_rows_that_fill_the_vocabulary_up(gpt, bert):
    for (model, tokenizer), use in (
        (gpt, lambda: sample(*gpt, "abc", Sampling(9, greedy=True))),
        (bert, lambda: fill_mask(*bert, "a[MASK]", 3)),
    ):
        before = use()
        rows = model.word_embeddings.weight.data
        kept = rows.clone()
        rows[tokenizer.vocab_size :] *= 100
        try:
            assert use() == before
        finally:
            rows.copy_(kept)


@torch.inference_mode()
def test_masks_are_filled_by_probability(bert):
    model, tokenizer = bert
    ids = [tokenizer.special_id(name) for name in ("cls", "mask")]
    ids += [ord("a"), tokenizer.special_id("mask"), tokenizer.special_id("sep")]
    logits = model.mlm_logits(model.encode(torch.tensor([ids])))[0, [1, 3], : tokenizer.vocab_size]
    expected = torch.softmax(logits, dim=-1).topk(4)
    found = fill_mask(model, tokenizer, "[MASK]a[MASK]", 4)
    assert [[candidate.id for candidate in mask] for mask in found] == expected.indices.tolist()
    probabilities = [[candidate.probability for candidate in mask] for mask in found]
    torch.testing.assert_close(torch.tensor(probabilities), expected.values)
    best = [mask[0] for mask in found]
    texts = [tokenizer.decode([candidate.id]).strip() for candidate in best]
    assert [candidate.text for candidate in best if candidate.text] == [text for text in texts if text]
    assert len(fill_mask(model, tokenizer, "[MASK]", 10**6)[0]) == tokenizer.vocab_size


def test_texts_that_cannot_be_used_are_refused(gpt, bert):
    with pytest.raises(ValueError, match="prompt is empty"):
        sample(*gpt, "", Sampling())
    with pytest.raises(ValueError, match=r"has no \[MASK\]"):
        fill_mask(*bert, "no word is missing", 5)
    with pytest.raises(ValueError, match="the text has 15 tokens, the model takes 12"):
        fill_mask(*bert, "[MASK]" + "a" * 12, 5)
