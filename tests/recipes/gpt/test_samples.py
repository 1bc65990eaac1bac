"""What GPT's samples hold: windows of joined documents, and their borders."""

import numpy as np
import pytest
import torch
from helpers.prepared_data import CLM

from xformer_train.recipes.gpt.samples import with_document_borders


def test_gpt_windows_join_documents_and_keep_their_borders(prepare, tokenizers):
    eos = tokenizers["gpt"].special_id("eos")
    stream = prepare(CLM).train
    tokens = stream.parts[0].store.tokens.astype(np.int64)
    S, N = 32, stream.num_samples
    assert len(tokens) // S == N
    batch = stream.batch(np.arange(N))
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "input_ids": ((N, S), torch.int64),
        "labels": ((N, S), torch.int64),
        "segment_ids": ((N, S), torch.int32),
        "position_ids": ((N, S), torch.int64),
    }
    _, index = stream.locate(np.arange(N))
    for row, window in enumerate(index):
        segment = position = 0
        for column in range(S):
            at = int(window) * S + column
            assert batch["input_ids"][row, column] == tokens[at]
            assert batch["segment_ids"][row, column] == segment
            assert batch["position_ids"][row, column] == position
            if tokens[at] == eos:
                assert batch["labels"][row, column] == -100
                segment, position = segment + 1, 0
            else:
                assert batch["labels"][row, column] == tokens[at + 1]
                position += 1


@pytest.mark.parametrize("end", ["eos at the last column", "no eos"])
def test_gpt_borders_at_the_edges_of_a_row(end):
    windows = np.array([[5, 9, 9, 9, 6]]) if end == "eos at the last column" else np.array([[1, 2, 3, 4, 5]])
    batch = with_document_borders(windows, 9)
    if end == "no eos":
        assert batch["labels"].tolist() == [[2, 3, 4, 5]]
        assert batch["segment_ids"].tolist() == [[0, 0, 0, 0]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]
    else:
        assert batch["labels"].tolist() == [[9, -100, -100, -100]]
        assert batch["segment_ids"].tolist() == [[0, 0, 1, 2]]
        assert batch["position_ids"].tolist() == [[0, 1, 0, 0]]
