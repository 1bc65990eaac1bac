"""Fixtures that prepare data."""

import numpy as np
import pytest
from helpers.prepared_data import document, write_text

from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import DataConfig, ObjectiveConfig, TokenizerConfig
from xformer_train.recipes.data.stream import prepare_data
from xformer_train.recipes.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    rng = np.random.default_rng(0)
    texts = [document(number, rng) for number in range(200)]
    config = TokenizerConfig(vocab_size=300)
    return {
        name: train_tokenizer(
            recipe.tokenizer.trained, config, texts, lambda _: None, specials=recipe.tokenizer.specials
        )
        for name, recipe in RECIPES.items()
    }


@pytest.fixture
def prepare(tmp_path, tokenizers):
    def run(objective=None, source=None, *, model_type=None, seed=1, report=lambda _: None, unpad=False, **keys):
        objective = objective or ObjectiveConfig()
        model_type = model_type or ("bert" if objective.type == "mlm" else "gpt")
        sources = [source or write_text(tmp_path / "text.txt")] if not isinstance(source, list) else source
        settings = {"max_seq_length": 32, "cache_dir": str(tmp_path / "cache"), **keys}
        config = DataConfig(sources=sources, **settings)
        return prepare_data(RECIPES[model_type], tokenizers[model_type], config, objective, seed, report, unpad=unpad)

    return run
