"""What a model's folder must give: a `Recipe`, and the types that it is written in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from ..kernels.ops.choices import ActivationCheckpointing
from ..kernels.parallel.collectives import ONE_PROCESS, TensorParallel
from .config import DataConfig, ModelConfig, ObjectiveConfig, SpecialToken

if TYPE_CHECKING:
    from .data.run_tokenizer import RunTokenizer
    from .data.token_store import TokenStore
    from .shared.transformers_form import TransformersForm

Batch = Mapping[str, Tensor]
Rows = tuple[np.ndarray, ...]
Collate = Callable[[Rows, np.ndarray], dict[str, np.ndarray]]
Layout = Literal["sentences", "stream"]
Report = Callable[[str], None]
"""Called with a line for the person who waits while data is prepared."""


@dataclass(frozen=True)
class Runtime:
    """What of a run, beyond its `layer` section, changes how a model computes.

    fp8: FP8 products in the layers. activation_checkpointing: what of a layer is computed again in backward. parallel: the
    processes that share the layers and the vocabulary.
    """

    fp8: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"
    parallel: TensorParallel = ONE_PROCESS


PLAIN_RUNTIME = Runtime()


@dataclass(frozen=True)
class Packing:
    """What rows of several whole samples hold. tokens: special ones included; size: the tokens that a row has room for."""

    rows: int
    samples: int
    tokens: int
    size: int

    def __str__(self) -> str:
        share = self.tokens / (self.rows * self.size)
        return f"{self.samples:,} samples in {self.rows:,} rows, {self.samples / self.rows:.2f} in each, {share:.1%} filled"


class Samples(Protocol):
    """The samples of one source, numbered from 0; where whole samples are packed into rows, each row counts as one."""

    def __len__(self) -> int: ...

    @property
    def packing(self) -> Packing | None:
        """What the rows hold; None where samples are not packed."""

    def rows(self, index: np.ndarray, keys: np.ndarray) -> Rows:
        """Return the samples of these numbers, as arrays whose first dimension is B.

        index: (B,) int64 in [0, len); keys: (B,) uint64, which decide all that is random in a sample.
        """


@dataclass(frozen=True)
class DataTask:
    """What the samples of a run are made by. unpad: batches say where their tokens stand, as `layer.unpad` needs."""

    tokenizer: "RunTokenizer"
    data: DataConfig
    objective: ObjectiveConfig
    cache: Path
    report: Report
    unpad: bool = False


@dataclass(frozen=True)
class TokenizerRules:
    """What a model asks of its tokenizer.

    trained: the kind that tokenizer.type=auto trains. specials: the special tokens of a new one, as they are written.
    needed: those without which no sample can be made.
    """

    trained: Literal["wordpiece", "bpe"]
    specials: Mapping[SpecialToken, str]
    needed: tuple[SpecialToken, ...]


@dataclass(frozen=True)
class SampleRules:
    """How samples of a model are made of tokens, and batches of samples.

    layout: what a token store keeps: `sentences` where they start, `stream` an end-of-document token after each document.
    settings(data, objective): the JSON values that decide the samples; they are part of the fingerprint of the data.
    open(store, task): the samples of one source. Raises UserError if there are none.
    collate(task): what makes of rows and their keys the arrays that the model takes by these names.
    """

    layout: Layout
    settings: Callable[[DataConfig, ObjectiveConfig], list[Any]]
    open: Callable[["TokenStore", DataTask], Samples]
    collate: Callable[[DataTask], Collate]


@dataclass(frozen=True)
class Recipe:
    """One kind of model with its objective: all in which it differs from another kind.

    name: `model.type`.
    build_model(model, layer, objective, vocab_size, runtime=PLAIN_RUNTIME): the model; called with a batch's tensors as keyword
        arguments it returns the *sum* of each part of the loss as fp32 scalars, such as {"mlm": ..., "nsp": ...}. The training
        loss is the sum over parts of sum / count, with the counts of the whole step, so that it does not depend on how the
        step is cut into micro-batches and processes.
    loss_counts(batch, objective): how many terms each of those sums has. The first part is the one over the vocabulary.
    real_tokens(batch): tokens that are not padding.
    flops_per_sample(model, vocab_size, seq_length, predictions): matrix-product FLOPs of forward and backward of one
        sequence (backward counts twice, recomputation not at all), predictions being the positions that reach the head. At
        a mean length it is a lower bound: attention grows with the square.
    tokenizer, samples: what it asks of the tokenizer and how its data is made.
    transformers: its exports and what can be imported. command: the command that shows what a trained model says.
    """

    name: str
    build_model: Callable[..., nn.Module]
    loss_counts: Callable[[Batch, ObjectiveConfig], dict[str, int]]
    real_tokens: Callable[[Batch], int]
    flops_per_sample: Callable[[ModelConfig, int, float, float], float]
    tokenizer: TokenizerRules
    samples: SampleRules
    transformers: "TransformersForm"
    command: Literal["sample", "fill-mask"]
