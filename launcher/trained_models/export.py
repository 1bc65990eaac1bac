"""A checkpoint as a folder that transformers loads: safetensors, config.json, tokenizer, model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ...kernels.errors import RefusedError, UserError
from ...recipes import RECIPES
from ...recipes.config import ModelConfig
from ...recipes.data.cache import whole_folder
from ...recipes.data.run_tokenizer import RunTokenizer
from ...recipes.transformers_format.convert import config_json, to_huggingface
from .model_card import model_card, read_run, trained_length
from .pretrained import CONFIG_FILE, Pretrained, from_checkpoint

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"


def export(checkpoint: Path, folder: Path, *, force: bool, ema: bool = False) -> str:
    """Write the model of `checkpoint` to `folder`, and return the name of its class in transformers.

    The folder comes into being whole or not at all; one that is there keeps its other files. The vocabulary ends with the last
    symbol of the tokenizer: rows that only fill it up are cut off. force: replace the files of the same names in `folder`.
    ema: write the mean of the weights in their place.
    Raises UserError if the checkpoint is damaged or has no such mean, no class of transformers computes its model, or `folder`
    holds files; RefusedError if it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to={folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        remedy = "name another folder, or add --force to replace those it writes"
        raise UserError(f"--to={folder} holds files already; {remedy}")
    from safetensors import SafetensorError

    trained = from_checkpoint(checkpoint, ema=ema)
    assert trained.tokenizer is not None, "every checkpoint has its tokenizer"
    try:
        config = config_json(trained.model, trained.tokenizer, trained.sentence_task)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    state = to_huggingface(trained.weights, trained.model, config)
    config["torch_dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    run = read_run(checkpoint)
    card = model_card(checkpoint, run, config, state, ema=ema)

    try:
        with whole_folder(folder) as partial:
            _write(partial, trained, state, config, trained_length(checkpoint, run))
            (partial / CARD_FILE).write_text(card, encoding="utf-8")
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefusedError(f"cannot write --to={folder}: {reason}; free space, or name another folder") from error
    name: str = config["architectures"][0]
    return name


def _write(
    folder: Path, trained: Pretrained, state: dict[str, Tensor], config: dict[str, Any], most_tokens: int
) -> None:
    """Write all files but the card. state, config: of the model in transformers. most_tokens: of a sample."""
    from safetensors.torch import save_file

    _write_json(folder / CONFIG_FILE, config)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors keeps others out whatever the umask says
    assert trained.tokenizer is not None, "every checkpoint has its tokenizer"
    generation = RECIPES[trained.model.type].transformers.generation
    if generation:
        ids = {key: trained.tokenizer.special_id(name) for key, name in generation.items()}
        _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(folder, trained.tokenizer, trained.model, most_tokens)


def _write_tokenizer(folder: Path, tokenizer: RunTokenizer, model: ModelConfig, most_tokens: int) -> None:
    """Write the files of a tokenizer that adds the special tokens to a text that the recipe adds to its samples."""
    copy = tokenizer.reader()
    form = RECIPES[model.type].transformers
    copy.post_processor = form.post_processor(tokenizer)
    (folder / "tokenizer.json").write_text(copy.to_str(pretty=True), encoding="utf-8")
    specials = {f"{name}_token": token for name, token in tokenizer.specials.items()}
    if "pad_token_id" in form.generation:
        specials.setdefault("pad_token", tokenizer.specials[form.generation["pad_token_id"]])
    _write_json(folder / "special_tokens_map.json", specials)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": most_tokens,  # positions beyond it have not been trained
        "padding_side": form.padding_side,
        "model_input_names": form.written_as(model).inputs,
        "clean_up_tokenization_spaces": False,
        **specials,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
