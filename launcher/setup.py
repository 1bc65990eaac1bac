"""What must be there before the first step: checkpoint, tokenizer, data, vocabulary, and where the run stands."""

import logging
import math
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.parallel.collectives import TensorParallel
from ..recipes.data import PreparedData, prepare_data
from ..recipes.recipe import Batch, Recipe, Runtime
from ..recipes.tokenizer import RunTokenizer, build_tokenizer, check_suits, load_tokenizer
from .checkpoint import store
from .config.batch import BatchPlan
from .config.schema import RunConfig
from .processes.agreement import agreed, by_main
from .processes.signals import StopRequest
from .processes.topology import Topology
from .reporting import run_lock
from .reporting.run_directory import RunDirectory
from .trained_models import init_from
from .trained_models.pretrained import Pretrained

_VOCAB_MULTIPLE = 64  # rows of the embedding are rounded up to it: odd sizes slow the head's GEMM down on GPUs

_LOG = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Progress:
    """Where a run stands; stored in every checkpoint."""

    step: int = 0
    samples: int = 0
    """Sequences trained on since step 0."""
    position: int = 0
    """Sequences taken from the data in use; less than samples after a change of data between two phases."""
    phase_start: int = 0
    """The step at which the clock of the schedule stood at 0."""
    phase_start_samples: int = 0
    """`samples` at that step."""


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
        if not (directory.root / run_lock.NAME).exists():  # the main process has made it
            raise ValueError(
                f"output folder {directory.root} is not seen by {platform.node()}; choose an --output_dir on a disk that all "
                "machines share"
            )

    agreed(topology, look)


def checkpoint_to_load(
    config: RunConfig, topology: Topology, directory: RunDirectory, say: Say, *, resume: bool
) -> Path | None:
    """The checkpoint this run starts from: the newest whole one of its own when it resumes, else what `load` names, else none.

    It has been read through; called by every process. Raises ValueError if what `load` names is damaged, or every checkpoint
    of the run.
    """
    if resume and by_main(topology, lambda: bool(store.entries(directory.checkpoints))):
        return _newest_whole(directory.checkpoints, topology, say)
    if config.load.path is None:
        return None
    path = Path(config.load.path)
    source = by_main(topology, lambda: store.resolve(path, config.load.id))
    problems = store.verify_together(source, topology)

    def refuse_damage() -> None:
        if problems:
            raise ValueError(f"{source} is damaged: {', '.join(problems)}; choose another checkpoint")

    by_main(topology, refuse_damage)
    return source


def _newest_whole(folder: Path, topology: Topology, say: Say) -> Path:
    """The newest whole checkpoint in `folder`, which `latest` names from now on.

    Damaged ones that are newer are set aside: training meets their steps again.
    """
    entries = by_main(topology, lambda: [(entry.id, entry.problem) for entry in store.entries(folder)])
    damaged = {name: [problem] for name, problem in entries if problem}
    whole = None
    for name in reversed([name for name, problem in entries if not problem]):
        problems = store.verify_together(folder / name, topology)
        if not problems:
            whole = name
            break
        damaged[name] = problems

    def set_aside() -> None:
        told = [f"checkpoint {name} is damaged: {', '.join(problems)}" for name, problems in damaged.items()]
        if whole is None:
            raise ValueError(
                f"no checkpoint in {folder} can be loaded: {'; '.join(told)}; start anew with --job_name, or bring back a copy"
            )
        for name, text in zip(damaged, told, strict=True):
            new_name = store.set_aside(folder, name)
            _LOG.warning("%s; renamed to %s", text, new_name)
            say(f"warning: {text}; renamed to {new_name}, the run goes on from {whole}")
        if store.latest_id(folder) != whole:
            with suppress(OSError):  # the run can go on without it
                store.set_latest(folder, whole)

    by_main(topology, set_aside)
    return folder / str(whole)


def open_initial(config: RunConfig, topology: Topology) -> Pretrained | None:
    """What model.init_from names, read by every process; one process of each machine fetches it, if it is on the hub.

    Raises ValueError as `init_from.read_initial` does.
    """
    name = config.model.init_from
    if name is None:
        return None

    def find() -> Path:
        return init_from.find_folder(name)

    agreed(topology, find if topology.local_rank == 0 else None)  # then it is in the cache of every machine
    return agreed(topology, lambda: init_from.read_initial(name, find(), config.model))


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
            check_suits(config.model.type, tokenizer, str(config.model.init_from))
        elif weights_of is not None:
            tokenizer = load_tokenizer(weights_of / "tokenizer")
            given = config.tokenizer.path
            lowercase = config.tokenizer.do_lower_case
            if given is not None and not tokenizer.equals(load_tokenizer(given, lowercase=lowercase)):
                raise ValueError(
                    f"tokenizer.path={given} is another tokenizer than that of checkpoint {weights_of}; remove "
                    f"the key to use the checkpoint's"
                )
        else:
            with stop.raising():
                tokenizer = build_tokenizer(config.model.type, config.tokenizer, config.data, say)
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
            return prepare_data(
                config.model.type, tokenizer, config.data, config.objective, config.seed, say, unpad=config.layer.unpad
            )

    def check() -> None:
        if data.train.num_samples < batch.train_batch_size:
            raise ValueError(
                f"data.sources hold {data.train.num_samples:,} training samples, fewer than "
                f"training.train_batch_size={batch.train_batch_size:,}; add text or make the batch smaller"
            )
        if len(set(fingerprints)) > 1:
            raise ValueError(
                "data.sources differ between machines, so their processes would train on different data; "
                "give all machines the same files"
            )

    data = agreed(topology, prepare if topology.local_rank == 0 else None) or prepare()
    fingerprints = topology.gather(data.fingerprint)
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
        raise ValueError(
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
    return {**model, "vocab_size": vocab_size, "sentence_task": sentence_task(config)}


def sentence_task(config: RunConfig) -> str:
    """The sentence head of the model: nsp, sop or none."""
    return config.objective.sentence_task if config.model.type == "bert" else "none"


def starting_progress(config: RunConfig, state: dict[str, Any], fingerprint: str, *, continued: bool) -> Progress:
    """Where a run stands that starts from a checkpoint with this state.

    continued: the checkpoint is one of this run's own. Raises ValueError if the run continues on other data.
    """
    if config.load.what == "weights" and not continued:
        return Progress()
    # Checkpoints that were written before a field was there lack it.
    saved = Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})
    same_data = state["data_fingerprint"] == fingerprint
    if continued:
        if not same_data:
            raise ValueError(
                f"run {config.name} stopped at step {saved.step:,} on other data, another sequence length or another seed, so "
                f"it cannot be continued exactly; start a new run with --job_name and --load_training_checkpoint"
            )
        return saved
    return Progress(
        step=saved.step,
        samples=saved.samples,
        position=saved.position if same_data else 0,
        phase_start=saved.step if config.load.rewarmup else saved.phase_start,
        phase_start_samples=saved.samples if config.load.rewarmup else saved.phase_start_samples,
    )


def loaded_text(
    source: Path, state: dict[str, Any], progress: Progress, batch: BatchPlan, *, weights_only: bool, random_state: bool
) -> str:
    """What was taken from a checkpoint with this state, for the start-up report."""
    if weights_only:
        return f"{source} (weights only)"
    random = "random state" if random_state else "new random state, for another number of processes"
    data = f"data at sample {progress.position:,}" if progress.position else "new data"
    clock = "schedule restarted" if progress.phase_start == progress.step else "schedule continued"
    now = batch.train_batch_size
    then = state.get("train_batch_size", now)
    sizes = "" if now == then else f", {now} sequences per step instead of {then}"
    return f"{source} (weights, optimizer, {random}; {data}, {clock}{sizes})"


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
