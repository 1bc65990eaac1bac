"""Made-up documents, objectives and rows of batches for the tests of prepared data."""

import numpy as np
import pytest
import torch

from xformer_train.recipes.config import ObjectiveConfig, SourceConfig

WORDS = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "lagoon"]
CLM = ObjectiveConfig(type="clm")
OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig(sentence_task="sop", masking="whole_word"),
    ObjectiveConfig(sentence_task="none", masking="span"),
    CLM,
]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: f"{one.type}-{one.sentence_task}")


def document(number, rng):
    sentences = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(rng.integers(1, 9))]
    return f"Number {number}. " + " ".join(f"{sentence.capitalize()}." for sentence in sentences)


def write_text(path, count=60, seed=0):
    rng = np.random.default_rng(seed)
    path.write_text("\n\n".join(document(number, rng) for number in range(count)))
    return SourceConfig(kind="text", path=str(path))


def rows(batch, B):
    """The tensors of each row; those that have no row dimension are cut up by the row they point into."""
    S = batch["input_ids"].shape[1]
    found = []
    for row in range(B):
        mine = {name: value[row] for name, value in batch.items() if not name.startswith("masked")}
        if "masked_positions" in batch:
            here = batch["masked_positions"] // S == row
            mine["masked_positions"] = batch["masked_positions"][here] % S
            mine["masked_labels"] = batch["masked_labels"][here]
        found.append(mine)
    return found


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def store_documents(stream):
    store = stream.parts[0].store
    return [store.tokens[a:b].tolist() for a, b in zip(store.documents[:-1], store.documents[1:], strict=True)]
