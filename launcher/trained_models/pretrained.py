"""A trained model with its tokenizer, read from a checkpoint of a run or from a folder as transformers saves it.

Nothing that is read is executed, and transformers is not needed.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.errors import UserError, refused
from ...recipes import RECIPES
from ...recipes.config import LayerFlags, ModelConfig, ObjectiveConfig, SentenceTask
from ...recipes.data.run_tokenizer import RunTokenizer
from ...recipes.data.tokenizer import load_tokenizer
from ...recipes.transformers_format.convert import from_huggingface, model_config_of, parameters_of, sentence_task_of
from ..checkpoint import store
from ..checkpoint.files import read_file, understood
from ..checkpoint.loading import weights as checkpoint_weights

CONFIG_FILE = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
_SENTENCE_HEAD = "sentence_classifier.weight"


@dataclass(frozen=True)
class Pretrained:
    """A model in memory.

    model: its geometry; model.vocab_size is the number of rows of its word embedding. sentence_task: of its sentence head.
    weights: by the names of our modules, whole, on the CPU; heads may be missing. tokenizer: None where the folder has none.
    left_out: names of weights that have no place here.
    """

    model: ModelConfig
    sentence_task: SentenceTask
    weights: dict[str, Tensor]
    tokenizer: RunTokenizer | None
    left_out: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """Return the model in fp32, in evaluation mode, on the CPU, with the sentence head where the weights have one.

        Raises UserError if another head is missing.
        """
        objective = ObjectiveConfig(sentence_task=self.sentence_task if _SENTENCE_HEAD in self.weights else "none")
        assert isinstance(self.model.vocab_size, int), "the rows of a trained model are known"
        module = RECIPES[self.model.type].build_model(self.model, LayerFlags(), objective, self.model.vocab_size)
        missing = sorted({name.split(".")[0] for name in module.state_dict().keys() - self.weights.keys()})
        if missing:
            raise UserError(f"the weights lack {', '.join(missing)}; give a model with its language-model head")
        module.load_state_dict({name: self.weights[name].float() for name in module.state_dict()})
        return module.eval()


def from_checkpoint(checkpoint: Path, *, ema: bool = False) -> Pretrained:
    """Return the model of a checkpoint of any ZeRO stage and number of processes.

    ema: with the mean of its weights. Raises UserError if the checkpoint is damaged, or has no mean that is asked for.
    """
    state = store.read_state(checkpoint)
    store.refuse_damaged(checkpoint, store.damage(checkpoint, state["files"]))
    facts = dict(state["model"])
    with understood(checkpoint):
        task = facts.pop("sentence_task")
        tokenizer = load_tokenizer(checkpoint / "tokenizer")
        found = Pretrained(ModelConfig(**facts), task, checkpoint_weights(checkpoint, ema=ema), tokenizer)
        _check_layers(found.model, found.weights)
        _check_weights(found.model, task, found.weights)
    return found


def from_folder(folder: Path) -> Pretrained:
    """Return the model in a folder of config.json, weights (safetensors, else pytorch_model.bin) and perhaps a tokenizer.

    Raises UserError if something is missing or no model here computes what config.json describes.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        remedy = "give a folder that transformers or export wrote (load.path takes a run)"
        raise UserError(f"{folder} has no {CONFIG_FILE}; {remedy}")
    with refused(f"{path} cannot be read", "correct its permissions"):
        content = path.read_bytes()
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); correct it") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is a {type(config).__name__}, not an object of keys and values; correct it")
    try:
        with understood(path):
            model, task = model_config_of(config), sentence_task_of(config)
        with understood(folder):
            state = _read_weights(folder)
            _check_layers(model, state)
            weights, left_out = from_huggingface(state, config)
            _check_weights(model, task, weights)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(folder)) else f"{folder}: {text}") from error
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    with understood(folder):
        tokenizer = load_tokenizer(folder) if has_tokenizer else None
    return Pretrained(model, task, weights, tokenizer, tuple(left_out))


def open_pretrained(path: Path, checkpoint_id: str | None, *, ema: bool = False) -> tuple[Pretrained, str]:
    """Return what `--run` and `--id` mean, and where it was found: an exported folder, a run directory or a checkpoint of one.

    ema: as for `from_checkpoint`. Raises UserError if there is none.
    """
    if (path / CONFIG_FILE).is_file():
        if checkpoint_id is not None:
            raise UserError(f"--id={checkpoint_id}: {path} is an exported model, which has no checkpoints; remove --id")
        if ema:
            text = f"--ema: {path} is an exported model, which has one set of weights; remove --ema, or export with it"
            raise UserError(text)
        return from_folder(path), str(path)
    checkpoint = find_checkpoint(path, checkpoint_id)
    return from_checkpoint(checkpoint, ema=ema), f"{checkpoint}{', mean of the weights' if ema else ''}"


def find_checkpoint(run: Path, checkpoint_id: str | None) -> Path:
    """Return the checkpoint that `--run` and `--id` mean; no id is the newest. Raises UserError if there is none."""
    return store.resolve(run, checkpoint_id or store.LATEST, ("--run", "--id"))


def _check_layers(model: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError for more layers than there are weights, which would take for ever to build."""
    if model.num_hidden_layers > len(weights):
        what = f"num_hidden_layers is {model.num_hidden_layers}, and there are {len(weights)} weights in all"
        raise UserError(f"{what}; give a whole model")


def _check_weights(model: ModelConfig, sentence_task: SentenceTask, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the weights, by our names, are floating-point numbers of the sizes that config.json gives."""
    expected = parameters_of(model, sentence_task)
    for name, weight in weights.items():
        shape = tuple(expected[name])
        if tuple(weight.shape) != shape:
            raise UserError(f"{name} is {tuple(weight.shape)}, and {shape} by {CONFIG_FILE}; give a whole folder")
        if not weight.is_floating_point():
            raise UserError(f"{name} is {weight.dtype}, as quantized weights are; give the model before quantization")
        if weight.is_meta or weight.layout != torch.strided:
            raise UserError(f"{name} is a tensor without a number for each place; give a whole folder")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        if path.suffix == ".safetensors":
            try:
                state |= load_file(path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path.name} cannot be read ({error}); fetch it again") from None
        else:
            found: Any = read_file(path)
            if not isinstance(found, dict):
                raise UserError(f"{path.name} holds a {type(found).__name__}, not weights by name; fetch it again")
            state |= {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return state


def _weight_files(folder: Path) -> Iterator[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            yield folder / name
            return
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                files = {Path(file).name for file in named}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{index.name} does not say which files hold the weights; fetch it again") from None
            yield from (folder / file for file in sorted(files))
            return
    raise UserError("it holds neither model.safetensors nor pytorch_model.bin; give a folder that does")
