"""GPT samples: windows of the stream of all documents, each document followed by the end-of-document token."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels.errors import UserError
from ...kernels.ops.choices import IGNORED
from ..config import DataConfig, ObjectiveConfig
from ..data.token_store import TokenStore
from ..recipe import Collate, DataTask, Rows


@dataclass(frozen=True)
class GptSamples:
    """Rows of one source; the last tokens, too few for a window, are left out.

    Raises ValueError if there are too few tokens for one window.
    """

    store: TokenStore
    seq_length: int
    packing = None  # a window is a sample

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise UserError(
                f"data source {self.store.name}: holds {len(self.store.tokens):,} tokens, fewer than one sample of "
                f"data.max_seq_length={self.seq_length}; add text or make it shorter"
            )

    def __len__(self) -> int:
        return len(self.store.tokens) // self.seq_length

    def rows(self, index: np.ndarray, keys: np.ndarray) -> Rows:
        """Windows and the token after each, (B, S + 1) int64; behind the last token of all comes that token again.

        index: (B,) int64 in [0, len). keys: nothing is random in a window.
        """
        source = index[:, None] * self.seq_length + np.arange(self.seq_length + 1)
        return (np.take(self.store.tokens, source, mode="clip").astype(np.int64),)


def open_samples(store: TokenStore, task: DataTask) -> GptSamples:
    """See `SampleRules`."""
    return GptSamples(store, task.data.max_seq_length)


def sample_settings(data: DataConfig, _: ObjectiveConfig) -> list[Any]:
    """See `SampleRules`."""
    return [data.max_seq_length]


def collate(task: DataTask) -> Collate:
    """Return what makes a batch of windows; see `SampleRules`, and `with_document_borders` for the batch."""
    eos_id = task.tokenizer.special_id("eos")
    return lambda rows, _: with_document_borders(rows[0], eos_id)


def with_document_borders(windows: np.ndarray, eos_id: int) -> dict[str, np.ndarray]:
    """The batch of these windows.

    windows: (B, S + 1) int64. input_ids: (B, S) int64; labels: (B, S) int64, the next token, IGNORED behind the end of a
    document; segment_ids: (B, S) int32, documents counted from 0 in each row; position_ids: (B, S) int64, from 0 in each
    document (a document that goes on from the window before starts at 0 too).
    """
    input_ids = np.ascontiguousarray(windows[:, :-1])
    ends = input_ids == eos_id
    labels = np.where(ends, IGNORED, windows[:, 1:])
    begins = np.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    columns = np.arange(input_ids.shape[1])
    starts = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    return {"input_ids": input_ids, "labels": labels, "segment_ids": segments, "position_ids": columns - starts}
