"""The command-line flags that set a key of the run config: one table. Those of DeepSpeed's BERT recipe are among them.

Each is written with underscores or with hyphens. Torch-free, and quick to import, since `--help` needs it.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag: its spellings, the key that it sets (None: accepted, without effect) and what it takes."""

    names: tuple[str, ...]
    key: str | None
    kind: type
    help: str

    @property
    def parameter(self) -> str:
        """The name under which the parsed value is handed on."""
        return self.names[0].removeprefix("--")

    @property
    def help_text(self) -> str:
        """What it takes, its other spellings and its key."""
        others = f"; also {', '.join(self.names[1:])}." if self.names[1:] else "."
        return self.help.removesuffix(".") + others + (f" ({self.key})" if self.key else "")


FLAGS = (
    Flag(("--max_seq_length",), "data.max_seq_length", int, "Tokens in one sequence."),
    Flag(("--print_steps",), "logging.every_steps", int, "Steps between two lines of progress."),
    Flag(("--max_steps",), "training.max_steps", int, "Length of the run in optimizer steps."),
    Flag(("--max_tokens",), "training.max_tokens", int, "Length of the run in token positions."),
    Flag(("--max_hours",), "training.max_hours", float, "Length of the run in hours, over all its starts."),
    Flag(("--seed",), "seed", int, "Seed of weights, dropout, masks and the order of samples."),
    Flag(("--output_dir",), "output_dir", str, "Folder of run directories."),
    Flag(("--job_name",), "name", str, "Name of the run directory."),
    Flag(("--lr_schedule",), "schedule.type", str, "EE, LE or EP."),
    Flag(("--lr_offset",), "schedule.lr_offset", float, "Added to the learning rate at every step."),
    Flag(("--load_training_checkpoint", "--load_cp"), "load.path", str, "Run directory or checkpoint to load from."),
    Flag(("--load_checkpoint_id", "--load_cp_id"), "load.id", str, "Checkpoint id, unique prefix of one, or latest."),
    Flag(("--rewarmup",), "load.rewarmup", bool, "Restart the schedule at the loaded step."),
    Flag(("--decay",), "load.decay", bool, "Begin the decay of a wsd schedule at the loaded step."),
    Flag(
        ("--attention_dropout_checkpoint",),
        "layer.attn_dropout_checkpoint",
        bool,
        "Recompute dropped-out attention in backward.",
    ),
    Flag(("--gelu_checkpoint",), "layer.gelu_checkpoint", bool, "Recompute GELU in backward."),
    Flag(("--normalize_invertible",), "layer.normalize_invertible", bool, "Drop the inputs of LayerNorm."),
    Flag(("--stochastic_mode",), "layer.stochastic_mode", bool, "Faster, with results that differ from run to run."),
    Flag(("--deepspeed_config",), "deepspeed", str, "A DeepSpeed JSON file."),
    Flag(("--deepspeed",), None, bool, "Accepted: training always runs on DeepSpeed."),
    Flag(("--deepspeed_transformer_kernel",), None, bool, "Accepted: layers are always the fused ones."),
    Flag(("--local_rank",), None, int, "Accepted: processes read the environment variable LOCAL_RANK."),
)
FLAG_OF_KEY = {flag.key: flag.names[0] for flag in FLAGS if flag.key is not None}


def values_by_key(parsed: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the run config that were set on the command line, from parsed flags by parameter name."""
    given = {flag.key: parsed[flag.parameter] for flag in FLAGS if flag.key is not None}
    return {key: value for key, value in given.items() if value is not None and value is not False}
