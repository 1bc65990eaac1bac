"""What must be there before the first step: checkpoint, tokenizer, data, vocabulary, and where the run stands."""

import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...kernels.errors import UserError
from ...kernels.parallel.collectives import TensorParallel
from ...recipes import RECIPES
from ...recipes.data.stream import PreparedData, prepare_data
from ...recipes.data.tokenizer import RunTokenizer, build_tokenizer, check_suits, load_tokenizer
from ...recipes.recipe import Batch, Recipe, Runtime
from ..config.batch import BatchPlan
from ..config.schema import RunConfig
from ..processes.agreement import agreed, by_main
from ..processes.console import Say
from ..processes.signals import StopRequest
from ..processes.topology import Topology
from ..reporting.run_directory import RunDirectory
from ..trained_models import init_from
from ..trained_models.pretrained import Pretrained
from .start import Progress

_VOCAB_MULTIPLE = 64  # rows of the embedding are rounded up to it: odd sizes slow the head's GEMM down on GPUs


@dataclass(frozen=True)
class Setup:
    """Everything the loop works with; nothing in it changes but the weights and moments."""

    config: RunConfig
    topology: Topology
    runtime: Runtime
    recipe: Recipe
    batch: BatchPlan
    directory: RunDirectory
    data: PreparedData
    tokenizer: RunTokenizer
    vocab_size: int
    engine: Any
    optimizer: torch.optim.Optimizer
    precision: str
    total_steps: int
    """The step at which the run ends."""
    schedule_steps: int

    def loss_counts(self, batch: Batch) -> dict[str, int]:
        return self.recipe.loss_counts(batch, self.config.objective)


def check_is_shared(directory: RunDirectory, topology: Topology) -> None:
    """Raises ValueError, and SystemExit on the other processes, where one does not see what the main process has written."""

    def look() -> None:
        if not directory.lock.exists():  # the main process has made it
            raise UserError(
                f"output folder {directory.root} is not seen by {platform.node()}; choose an --output_dir on a disk that all "
                "machines share"
            )

    agreed(topology, look)


def open_tokenizer(
    config: RunConfig,
    topology: Topology,
    directory: RunDirectory,
    weights_of: Path | Pretrained | None,
    say: Say,
    stop: StopRequest,
) -> RunTokenizer:
    """The run's tokenizer, saved in the run directory: that of the weights, else the given one, else a new one.

    weights_of: the checkpoint or the Hugging Face model that the run starts from. Such a run never trains a tokenizer: its
    weights belong to the symbols they were trained with. Raises ValueError if tokenizer.path names another one.
    """

    def build() -> None:
        if isinstance(weights_of, Pretrained):
            tokenizer = init_from.initial_tokenizer(str(config.model.init_from), weights_of, config.tokenizer)
            check_suits(RECIPES[config.model.type], tokenizer, str(config.model.init_from))
        elif weights_of is not None:
            tokenizer = load_tokenizer(weights_of / "tokenizer")
            given = config.tokenizer.path
            lowercase = config.tokenizer.do_lower_case
            if given is not None and not tokenizer.equals(load_tokenizer(given, lowercase=lowercase)):
                raise UserError(
                    f"tokenizer.path={given} is another tokenizer than that of checkpoint {weights_of}; remove "
                    f"the key to use the checkpoint's"
                )
        else:
            with stop.raising():
                tokenizer = build_tokenizer(RECIPES[config.model.type], config.tokenizer, config.data, say)
        tokenizer.save(directory.tokenizer)

    by_main(topology, build)
    return load_tokenizer(directory.tokenizer)


def open_data(
    config: RunConfig, topology: Topology, batch: BatchPlan, tokenizer: RunTokenizer, say: Say, stop: StopRequest
) -> PreparedData:
    """Training and held-out samples; one process of each machine prepares them, the others find them in its cache.

    Raises ValueError if there are fewer training samples than one step takes, or machines prepared different data.
    """

    def prepare() -> PreparedData:
        with stop.raising():
            recipe, unpad = RECIPES[config.model.type], config.layer.unpad
            return prepare_data(recipe, tokenizer, config.data, config.objective, config.seed, say, unpad=unpad)

    found = agreed(topology, prepare if topology.local_rank == 0 else None)
    # Agreed on too: a signal that has come meanwhile, perhaps to one process alone, stops it.
    data = agreed(topology, lambda: found or prepare())
    assert data is not None, "each process had a task"
    fingerprints = topology.gather(data.fingerprint)

    def check() -> None:
        if data.train.num_samples < batch.train_batch_size:
            raise UserError(
                f"data.sources hold {data.train.num_samples:,} training samples, fewer than "
                f"training.train_batch_size={batch.train_batch_size:,}; add text or make the batch smaller"
            )
        if len(set(fingerprints)) > 1:
            raise UserError(
                "data.sources differ between machines, so their processes would train on different data; "
                "give all machines the same files"
            )

    by_main(topology, check)
    return data


def vocabulary_size(config: RunConfig, tokenizer: RunTokenizer) -> int:
    """Rows of the word embedding, over all processes that share it.

    Raises ValueError if model.vocab_size is too small for the tokenizer.
    """
    wanted, symbols = config.model.vocab_size, tokenizer.vocab_size
    if wanted == "auto":
        multiple = math.lcm(_VOCAB_MULTIPLE, config.parallel.tensor)
        return -(-symbols // multiple) * multiple
    if wanted < symbols:
        raise UserError(
            f"model.vocab_size={wanted:,} is smaller than the tokenizer's {symbols:,} symbols; raise it, or set it to auto"
        )
    return wanted


def runtime_of(config: RunConfig, topology: Topology) -> Runtime:
    """How the model of this run computes."""
    return Runtime(
        fp8=config.training.precision == "fp8",
        activation_checkpointing=config.training.activation_checkpointing,
        parallel=TensorParallel(topology.tensor_group, config.parallel.sequence),
    )


def model_facts(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """What a checkpoint says of the model it holds: equal facts mean the weights fit and compute the same function."""
    model = config.model.model_dump(mode="json", exclude={"init_from"})
    return {**model, "vocab_size": vocab_size, "sentence_task": config.objective.sentence_task}


def last_step(config: RunConfig, progress: Progress, data: PreparedData, batch: BatchPlan) -> int:
    """The step at which the run ends: max_steps or num_epochs after the start of its phase.

    Epochs are counted in samples, as steps before a resume may have taken more or fewer of them.
    """
    if config.training.max_steps is not None:
        return progress.phase_start + config.training.max_steps
    assert config.training.num_epochs is not None, "the run config has one of the two"
    taken = progress.samples - progress.phase_start_samples
    left = max(0, config.training.num_epochs * data.train.num_samples - taken)
    return progress.step - (-left // batch.train_batch_size)
