"""README.md of an exported model: what the run's own files say of its training, and how to load it."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...recipes import RECIPES
from ...recipes.config import ModelConfig
from ..checkpoint import store
from ..config.loading import load_config
from ..config.schema import RunConfig
from ..processes import console
from ..reporting.metrics import rows
from ..reporting.run_directory import RunDirectory

_RUN_CONFIG_FILE = "config.resolved.yaml"


def read_run(checkpoint: Path) -> RunConfig:
    """Return the run config of a checkpoint. Raises UserError if it is damaged."""
    world_size = store.read_state(checkpoint)["engine"]["world_size"]
    return load_config(checkpoint / _RUN_CONFIG_FILE, world_size=world_size).config


def trained_length(checkpoint: Path, run: RunConfig) -> int:
    """Return the most tokens of a sample in the phases that had begun when a checkpoint was saved."""
    begun = [phase["changes"].get("data", {}) for phase in store.read_state(checkpoint).get("phases", [])]
    return max([run.data.max_seq_length, *(data.get("max_seq_length", 0) for data in begun)])


def model_card(
    checkpoint: Path, run: RunConfig, config: Mapping[str, Any], state: Mapping[str, Tensor], *, ema: bool = False
) -> str:
    """Return the text of the model card. run: of the checkpoint. config: of config.json. state: what is exported.

    ema: whether that is the mean of the weights.

    What the run directory around the checkpoint no longer has (metrics, versions) is left out.
    """
    saved = store.read_state(checkpoint)
    name, form = config["architectures"][0], RECIPES[run.model.type].transformers
    facts = "\n".join(f"| {label} | {text} |" for label, text in _facts(checkpoint, saved, run, config, state, ema=ema))
    return f"""\
---
library_name: transformers
pipeline_tag: {form.pipeline_tag}
---

# {run.name}

`{name}`, exported by xformer-train from checkpoint `{checkpoint.name}` of run `{run.name}`.

| | |
|---|---|
{facts}

## Load

```python
from transformers import {form.auto_class}, AutoTokenizer

model = {form.auto_class}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

The vocabulary is the tokenizer's {config["vocab_size"]:,} symbols; rows that filled it up in training are cut off.
{"".join(form.notes(run.model, run.objective))}
## Run config

```yaml
{(checkpoint / _RUN_CONFIG_FILE).read_text(encoding="utf-8").strip()}
```
"""


def _facts(
    checkpoint: Path,
    saved: Mapping[str, Any],
    run: RunConfig,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    ema: bool,
) -> Iterator[tuple[str, str]]:
    engine, model, data = saved["engine"], run.model, run.data
    yield "parameters", f"{sum(tensor.numel() for tensor in state.values()):,}, {config['torch_dtype']}"
    if ema:
        yield "weights", f"their exponential mean over the steps, training.ema_decay {run.training.ema_decay}"
    yield "model", ", ".join(_geometry(model))
    yield (
        "length",
        f"up to {model.max_position_embeddings:,} tokens; trained on up to {trained_length(checkpoint, run):,}",
    )
    yield "objective", RECIPES[model.type].transformers.objective(run.objective)
    yield "started from", run.model.init_from or run.load.path or "new weights"
    given = (source.model_dump(mode="json", exclude_defaults=True) for source in data.sources)
    yield "data", "; ".join(f"`{json.dumps(source, ensure_ascii=False)}`" for source in given)
    yield "steps", f"{saved['step']:,}, {saved['samples']:,} samples"
    for phase in saved.get("phases", []):
        yield f"from step {phase['first']:,}", f"`{json.dumps(phase['changes'])}`"
    yield "optimizer", f"{run.optimizer.type}, lr {run.optimizer.lr:g}, schedule {run.schedule.type}"
    yield (
        "processes",
        f"{engine['world_size']}, parallel.tensor {engine['tensor_parallel']}, ZeRO stage {engine['zero_stage']}, "
        f"{engine['precision']}",
    )
    directory = RunDirectory(checkpoint.parent.parent)
    yield from _if_whole(directory.metrics, lambda path: _losses(path, saved["step"]))
    yield "saved", saved["saved_at"]
    yield from _if_whole(directory.root / "env.json", _versions)


def _geometry(model: ModelConfig) -> Iterator[str]:
    """Yield what a model is made of, in words; what the classic models do not have only where it is there."""
    yield f"{model.num_hidden_layers} layers"
    yield f"hidden size {model.hidden_size:,}"
    shared = model.key_heads != model.num_attention_heads
    of_keys = f" ({model.key_heads} of keys and values)" if shared else ""
    yield f"{model.num_attention_heads} heads{of_keys}"
    yield f"feed-forward width {model.intermediate_size:,}{', gated' if model.gated_mlp else ''}"
    yield f"{'pre' if model.pre_layer_norm else 'post'}-LN{' by RMSNorm' if model.norm == 'rms_norm' else ''}"
    yield model.hidden_act
    if model.position_embedding == "rope":
        local = "" if model.local_rope_theta is None else f", in local layers {model.local_rope_theta:,g}"
        yield f"rotary positions with theta {model.rope_theta:,g}{local}"
    if model.sliding_window is not None:
        every = model.global_attn_every_n_layers
        among = "" if every is None else f" but in one of {every} layers"
        yield f"a window of {model.sliding_window} tokens{among}"


def _if_whole(path: Path, read: Callable[[Path], Iterator[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return what a file of the run directory says, nothing with a warning if it is damaged: the model is whole without it."""
    if not path.is_file():
        return []
    try:
        return list(read(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        console.warn(f"{path} cannot be read ({type(error).__name__}: {error}), so the model card leaves it out")
        return []


def _versions(environment: Path) -> Iterator[tuple[str, str]]:
    packages = json.loads(environment.read_text(encoding="utf-8"))["packages"]
    yield "versions", ", ".join(f"{package} {version}" for package, version in packages.items() if version)


def _losses(metrics: Path, step: int) -> Iterator[tuple[str, str]]:
    """Yield the last losses at or before a step."""
    measured = [json.loads(text) for at, text in rows(metrics) if at <= step]
    for label, prefix in (("training loss", ""), ("held-out loss", "val_")):
        row: dict[str, Any] = next((row for row in reversed(measured) if f"{prefix}loss" in row), {})
        if row.get(f"{prefix}loss") is not None:
            parts = {part: row.get(prefix + part) for part in ("mlm", "nsp", "sop")}
            shown = ", ".join(f"{part} {loss:.4f}" for part, loss in parts.items() if loss is not None)
            yield label, f"{row[f'{prefix}loss']:.4f}{f' ({shown})' if shown else ''} at step {row['step']:,}"
        if row.get("val_ema") is not None:
            yield "held-out loss of the mean", f"{row['val_ema']:.4f} at step {row['step']:,}"
