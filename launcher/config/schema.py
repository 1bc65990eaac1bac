"""The run config: every key of a run, its type, its default and its meaning.

`load_config` (in `loading.py`) reads one from YAML or JSON; `config schema` and `docs/config.md` are generated from
these classes. No torch import.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ...kernels.ops.choices import ActivationCheckpointing
from ...recipes.config import (
    DataConfig,
    Fraction,
    LayerFlags,
    ModelConfig,
    ObjectiveConfig,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    TokenizerConfig,
)
from .optimizers import OptimizerConfig

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
"""What training.precision comes to on a machine; fp8 is bf16 to DeepSpeed."""


RUN_LENGTHS = ("max_steps", "num_epochs", "max_tokens", "max_hours")
"""The keys of `training` of which a run gives exactly one."""


class ScheduleConfig(Section):
    type: Literal["EE", "LE", "EP", "linear", "cosine", "constant", "wsd"] = "linear"
    """EE, LE, EP are the schedules of DeepSpeed's BERT recipe (exponential or linear warm-up, then exponential or polynomial
    decay); wsd is warm-up, stable, decay."""
    warmup_proportion: Fraction | None = None
    """Warm-up as a share of total_steps; give this or warmup_steps."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Warm-up in steps; without either key there is none."""
    total_steps: PositiveInt | None = None
    """Length of the schedule in steps; default the length of the run."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.99
    """EE, LE: factor of lr over each decay_steps."""
    decay_steps: PositiveInt = 1000
    """EE, LE: see decay_rate."""
    decay_proportion: Fraction = 0.2
    """wsd: share of total_steps in which lr falls to zero."""
    decay: Literal["linear", "1-sqrt"] = "linear"
    """wsd: how lr falls there, with the step, or steep at first by 1 - the root of the part that is over (arXiv 2405.18392)."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """What lr falls to, from optimizer.lr; EE and LE come near it without end."""
    lr_offset: Annotated[float, Field(ge=0)] = 0.0
    """Added to lr at every step."""


class TrainingConfig(Section):
    train_batch_size: PositiveInt | None = None
    """Sequences per optimizer step, over all processes; any two of the three batch keys give the third."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per forward pass of one replica of the model: a process, or parallel.tensor of them."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches of one replica per optimizer step."""
    batch_warmup_from: PositiveInt | None = None
    """Sequences of the first step. From there the batch grows to train_batch_size, in whole micro-batches of all replicas."""
    batch_warmup_steps: PositiveInt | None = None
    """Steps in which the batch grows so, linearly with the step."""
    max_steps: PositiveInt | None = None
    """Length of the run in optimizer steps, counted from step 0, or from the loaded step with load.rewarmup, as the other
    lengths are; give one of max_steps, num_epochs, max_tokens and max_hours."""
    num_epochs: PositiveInt | None = None
    """Length of the run in passes over the data."""
    max_tokens: PositiveInt | None = None
    """Length of the run in token positions, sequences times max_seq_length, padding included; it ends with the first step that
    reaches them."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in hours from its first step on, over all its starts, with evaluations and saves, the last ones too.
    The schedule then follows the share of the time that is over."""
    precision: Literal["auto", Precision] = "auto"
    """auto is bf16 where the GPU has it, fp16 on older GPUs; on a CPU bf16 where a measurement at the start finds products
    faster in it (docs/train.md), else fp32; where a run goes on from a checkpoint, what that was trained in. fp8 is bf16 with
    FP8 operands in the layers' matrix products: docs/fp8.md."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What backward computes again in place of keeping it: selective is the attention probabilities, where there are any; full
    is all of a layer but its input, for the time of a second forward pass. docs/memory.md has the bytes."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential mean of the weights too, of which each step keeps this share: 0.999 is a mean over some 1,000 steps.
    Validation measures it beside the weights, and export, sample and fill-mask take it with --ema."""


def length_key(training: TrainingConfig) -> str:
    """Return the key of `training` that gives the length of a valid run."""
    return next(name for name in RUN_LENGTHS if getattr(training, name) is not None)


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    """Processes that share every layer, the embedding and the head; the others hold further replicas of the model."""
    sequence: bool = False
    """Split the tokens between the products of a layer over those processes too: less memory, the same communication."""


class CheckpointConfig(Section):
    save_every_steps: PositiveInt | None = None
    """null saves once, at the end of the run."""
    keep_last: PositiveInt | None = 3
    """Older checkpoints are removed once a newer one is written and verified; null keeps all."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are never removed."""
    asynchronous: bool = True
    """Write beside training: a step waits only until the state is copied. The copy takes as much host memory as the process
    writes, and is kept until the run ends."""
    id_format: str = "step{step:08d}"
    """Name of a checkpoint; must hold {step}, so that no two are equal, and may hold {epoch}. `:08d` pads with zeros, so that
    names sort by step."""


class LoadConfig(Section):
    path: PathText | None = None
    """A run directory, its `checkpoints` folder, or one checkpoint."""
    id: str = "latest"
    """A checkpoint id, a unique prefix of one, or latest."""
    what: Literal["all", "weights"] = "all"
    """all continues: weights, optimizer, step, data position, random state; weights starts a new run from them."""
    rewarmup: bool = False
    """Restart the schedule at the loaded step."""
    decay: bool = False
    """wsd: begin the decay of lr at the loaded step. The run is that decay, as long as training says; warm-up, total_steps and
    decay_proportion of schedule belong to the run that is loaded from, and have no effect."""


class EvalConfig(Section):
    every_steps: PositiveInt | None = None
    """null evaluates once, at the end of the run, when there is held-out data."""
    batches: PositiveInt | None = None
    """Most micro-batches per replica and evaluation; null for the whole held-out set."""


class LoggingConfig(Section):
    every_steps: PositiveInt = 10
    """Steps between two rows of metrics."""
    tensorboard: bool = True
    """Write the same numbers for TensorBoard."""


class ReliabilityConfig(Section):
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """When a process makes no progress, all have ended after this time, and have said who hung where."""
    nan: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or gradient is not finite: stop, go on without the step, or go on from the newest checkpoint, behind the
    samples seen since. In fp16 the loss scaler skips such steps by itself: see min_loss_scale."""
    nan_limit: PositiveInt = 5
    """Most steps skipped in a row, or most rollbacks of a run, resumed or not; one more stops the run."""
    loss_spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A logged loss above this factor times the median of the 32 before it is told, and with nan rollback undone; null for no
    such test."""
    min_loss_scale: Annotated[float, Field(gt=0)] = 1.0
    """fp16: the run stops when the loss scale falls to this."""


class Changes(Section):
    """A section of a phase: what it does not give, null, stays as it was before the phase."""

    @model_serializer(mode="wrap")
    def _only_what_is_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value not in (None, {})}


class DataChanges(Changes):
    max_seq_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens in one sample from here on."""
    source_weights: list[PositiveFloat] | None = None
    """The weight of each of data.sources, in their order."""


class TrainingChanges(Changes):
    train_batch_size: PositiveInt | None = None
    """Sequences per optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per forward pass of one replica."""


class ObjectiveChanges(Changes):
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the tokens to predict."""
    max_predictions_per_seq: PositiveInt | None = None
    """Most positions to predict in one sample."""


class OptimizerChanges(Changes):
    lr: PositiveFloat | None = None
    """What the schedule multiplies; the schedule begins anew with the phase, over the steps up to the next lr or schedule."""


class PhaseConfig(Changes):
    from_step: PositiveInt | None = None
    """The steps before the phase, counted as training.max_steps is; give this or from_share."""
    from_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the run that is over when the phase begins."""
    data: DataChanges = DataChanges()
    """max_seq_length; source_weights, the weight of each of data.sources."""
    objective: ObjectiveChanges = ObjectiveChanges()
    """mlm_probability, max_predictions_per_seq."""
    optimizer: OptimizerChanges = OptimizerChanges()
    """lr, with which the schedule begins anew."""
    schedule: ScheduleConfig | None = None
    """A schedule of its own, with all the keys of the section: what it leaves out has the default. Its clock starts with the
    phase, and it ends where the run does, or where a later phase gives lr or schedule."""
    training: TrainingChanges = TrainingChanges()
    """train_batch_size, micro_batch_size; gradient_accumulation_steps follows from the two."""

    @property
    def begins_schedule(self) -> bool:
        """Return whether the clock of the schedule starts with this phase."""
        return self.schedule is not None or self.optimizer.lr is not None


class RunConfig(Section):
    name: str = "run"
    """The run directory is output_dir/name."""
    output_dir: PathText = "runs"
    """Folder of run directories."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Decides the weights at the start, dropout, masks and the order of samples."""
    model: ModelConfig = ModelConfig()
    """What is trained."""
    layer: LayerFlags = LayerFlags()
    """How its layers are computed, and what they keep for backward."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    data: DataConfig = DataConfig()
    """The text, and how it is cut into samples."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the model learns to predict."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How a gradient becomes a step."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate of each step."""
    training: TrainingConfig = TrainingConfig()
    """Batch, length and precision of the run."""
    phases: list[PhaseConfig] | None = None
    """What changes while the run trains, in the order of the steps: docs/phases.md."""
    parallel: ParallelConfig = ParallelConfig()
    """How the processes of the run divide the model."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, and which ones stay."""
    load: LoadConfig = LoadConfig()
    """The checkpoint that the run starts from; without one it starts from new weights."""
    eval: EvalConfig = EvalConfig()
    """When the loss on validation text is measured."""
    logging: LoggingConfig = LoggingConfig()
    """What is written down while the run trains."""
    reliability: ReliabilityConfig = ReliabilityConfig()
    """What happens when a process hangs or a number is not finite."""
    deepspeed: PathText | dict[str, Any] | None = None
    """A DeepSpeed JSON file, looked up beside the run config first, or its contents; our sections own batch, optimizer,
    clipping and precision."""


def schedule_of(config: RunConfig) -> ScheduleConfig:
    """Return the schedule that a run follows: that of its config, or with load.decay the decay of it alone."""
    if not config.load.decay:
        return config.schedule
    others = {"warmup_proportion": None, "warmup_steps": None, "total_steps": None}
    return config.schedule.model_copy(update={**others, "decay_proportion": 1.0})
