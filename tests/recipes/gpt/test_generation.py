"""GPT with a key-value cache: hidden states of a text in pieces are those of the whole."""

import pytest
import torch

from xformer_train.kernels import KeyValueCache
from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig

BATCH, LENGTH, VOCABULARY = 3, 11, 53
LLAMA = {
    "num_key_value_heads": 2,
    "position_embedding": "rope",
    "norm": "rms_norm",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "gated_mlp": True,
}
MODELS = {
    "gpt": {},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4, "rope_theta": 1e6},
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 10, "tie_word_embeddings": False},
    "local and global": {**LLAMA, "sliding_window": 3, "global_attn_every_n_layers": 2, "local_rope_theta": 50.0},
}
ALL = pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)


def build(keys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20}
    config = ModelConfig(type="gpt", max_position_embeddings=LENGTH, initializer_range=0.2, **sizes, **keys)
    model = RECIPES["gpt"].build_model(config, LayerFlags(), ObjectiveConfig(type="clm"), VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def text():
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[5, *[1] * 6], [1] * 11, [4, 2, 5]], ids=str)
@ALL
def test_logits_of_pieces_are_those_of_the_whole(keys, pieces):
    model, ids, cache = build(keys), text(), KeyValueCache(LENGTH)
    hidden = torch.cat([model.encode(piece, cache=cache) for piece in ids.split(pieces, 1)], 1)
    torch.testing.assert_close(model.logits(hidden), model.logits(model.encode(ids)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@ALL
def test_a_prompt_that_is_padded_in_front_gives_what_it_gives_alone(keys):
    model, ids, cache = build(keys), text(), KeyValueCache(LENGTH)
    padding = torch.tensor([0, 4, 2])
    tokens = torch.arange(LENGTH) >= padding[:, None]
    positions = (torch.arange(LENGTH) - padding[:, None]).clamp(min=0)
    hidden, end = [], 0
    for piece in ids.split([6, 1, 1, 3], 1):
        start, end = end, end + piece.shape[1]
        hidden.append(model.encode(piece, positions[:, start:end], attention_mask=tokens[:, :end], cache=cache))
    joined = torch.cat(hidden, 1)
    for row, first in enumerate(padding.tolist()):
        alone = model.encode(ids[row : row + 1, first:])[0]
        torch.testing.assert_close(joined[row, first:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_more_tokens_than_positions_are_refused():
    model, ids, cache = build({}), text(), KeyValueCache(LENGTH + 5)
    model.encode(ids[:, :9], cache=cache)
    with pytest.raises(ValueError, match="input_ids has 3 positions behind 9 in the cache, max_position_embeddings=11"):
        model.encode(ids[:, :3], cache=cache)
    with pytest.raises(ValueError, match="leave segment_ids out"):
        model.encode(ids[:, :1], segment_ids=torch.zeros(1, 1, dtype=torch.int32), cache=cache)
