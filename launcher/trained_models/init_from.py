"""`model.init_from`: the weights of a Hugging Face model in the place of new ones."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.errors import UserError
from ...recipes.config import ModelConfig, TokenizerConfig
from ...recipes.data.run_tokenizer import RunTokenizer
from ...recipes.data.tokenizer import given_tokenizer
from ...recipes.shared.transformers_form import BY_SYMBOL
from ...recipes.transformers_format.convert import differing_keys, shown
from ..checkpoint.resharding import own_part
from ..config.paths import HUB_ID
from ..processes.topology import Topology
from .pretrained import CONFIG_FILE, TOKENIZER_FILES, Pretrained, from_folder

_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_FILES = [CONFIG_FILE, *TOKENIZER_FILES, "tokenizer_config.json", *_WEIGHTS]
_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


def find_folder(name: str) -> Path:
    """Return the folder that model.init_from names: one on this machine, else the files of that hub id, downloaded once.

    Raises UserError if there is no such folder and the hub does not give one.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"model.init_from={name} is a file; give the folder that holds {CONFIG_FILE} and the weights")
    if not HUB_ID.fullmatch(name):
        remedy = "correct the path, or give the id of a hub model"
        raise UserError(f"model.init_from={name}: there is no such folder; {remedy}")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, allow_patterns=_FILES))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, allow_patterns=[*_FILES, *_PICKLES]))
    except (OSError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"there is no such folder, and the Hugging Face hub gave no model of that name ({said})"
        remedy = "correct it, or give a folder that holds the model"
        raise UserError(f"model.init_from={name}: {what}; {remedy}") from error
    return found


def read_initial(name: str, folder: Path, model: ModelConfig) -> Pretrained:
    """Return the model in `folder`, which model.init_from=`name` means.

    Raises UserError if it cannot be read, or is another model than the section `model` describes: all differing keys at once.
    """
    try:
        found = from_folder(folder)
    except UserError as error:
        raise UserError(f"model.init_from={name}: {error}") from None
    differing = [
        f"model.{key} is {shown(getattr(found.model, key))} there and {shown(getattr(model, key))} in the run config"
        for key in differing_keys(found.model, model)
    ]
    if differing:
        raise UserError(f"model.init_from={name} is another model: {'; '.join(differing)}; change the run config")
    return found


def initial_tokenizer(name: str, initial: Pretrained, config: TokenizerConfig) -> RunTokenizer:
    """Return the tokenizer whose symbols the weights belong to: that of the folder, or the given one where the folder has none.

    Raises UserError if neither is there, tokenizer.path is another one, or it has more symbols than the weights.
    """
    given = None if config.path is None else given_tokenizer(config)
    tokenizer = initial.tokenizer or given
    if tokenizer is None:
        remedy = "save its tokenizer there with AutoTokenizer.save_pretrained, or give tokenizer.path"
        raise UserError(f"model.init_from={name} holds no {' or '.join(TOKENIZER_FILES)}; {remedy}")
    if given is not None and not tokenizer.equals(given):
        what = f"another tokenizer than that of model.init_from={name}, to which its weights belong"
        raise UserError(f"tokenizer.path={config.path} is {what}; remove the key")
    rows = len(initial.weights["word_embeddings.weight"])
    if tokenizer.vocab_size > rows:
        what = f"has weights for {rows:,} symbols, and its tokenizer has {tokenizer.vocab_size:,}"
        raise UserError(f"model.init_from={name} {what}; give the tokenizer that the model was trained with")
    return tokenizer


@torch.no_grad()
def load_initial(
    module: nn.Module, initial: Pretrained, vocab_size: int, sentence_task: str, topology: Topology
) -> str:
    """Put the weights into a new model that no engine holds yet, and say what of it stays new.

    vocab_size: rows of the word embedding, over all processes that share it. sentence_task: of the run.
    """
    weights = {name: weight for name, weight in initial.weights.items() if name in module.state_dict()}
    if initial.sentence_task != sentence_task:
        weights = {name: weight for name, weight in weights.items() if not name.startswith("sentence_classifier.")}
    for name in BY_SYMBOL:
        if name in weights:
            weights[name] = with_rows(weights[name], vocab_size)
    own = own_part(weights, module, topology)
    new = sorted({name.split(".")[0] for name in module.state_dict().keys() - own.keys()})
    module.load_state_dict(own, strict=False)
    unused = [*initial.left_out, *(name for name in initial.weights if name not in weights)]
    texts = [f"new: {', '.join(new)}"] if new else []
    if unused:
        texts.append(f"left out: {', '.join(unused[:5])}" + (f" and {len(unused) - 5} more" if len(unused) > 5 else ""))
    return f"weights only; {'; '.join(texts)}" if texts else "weights only"


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """`weight` (V, ...) with `rows` rows: further ones are the mean of all, rows too many are cut off.

    A row of zeros would have the logit 0, which in GPT-2 is far above that of any symbol. The mean has the mean logit, and
    exp(mean) <= mean(exp): n such rows take at most n / V of the probability of the others.
    """
    missing = rows - len(weight)
    if missing <= 0:
        return weight[:rows]
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, *weight.shape[1:])])
