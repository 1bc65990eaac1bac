"""What a trained model says: text that goes on from a prompt (GPT), words for masks (BERT). On the CPU, in fp32."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.errors import UserError
from ...kernels.layers.cache import KeyValueCache
from ...recipes import RECIPES
from ...recipes.bert.model import BertForPretraining
from ...recipes.data.run_tokenizer import RunTokenizer
from ...recipes.gpt.model import GptForPretraining
from .pretrained import open_pretrained

MASK = "[MASK]"


def open_model(
    run: Path, checkpoint_id: str | None, command: str, *, ema: bool = False
) -> tuple[str, nn.Module, RunTokenizer]:
    """Return a line that says which model `--run`, `--id` and `--ema` name, the model and its tokenizer.

    Raises UserError if another command than this one is for its type, or it has no tokenizer.
    """
    trained, place = open_pretrained(run, checkpoint_id, ema=ema)
    model = trained.model
    own = RECIPES[model.type].command
    if own != command:
        wanted = " or ".join(name for name, recipe in RECIPES.items() if recipe.command == command)
        raise UserError(f"{place} is a {model.type}, and this command needs a {wanted}; use xformer-train {own}")
    if trained.tokenizer is None:
        raise UserError(f"{run} has no tokenizer.json or vocab.txt; save its tokenizer there")
    title = f"{place}: {model.type}, {model.num_hidden_layers} layers, hidden size {model.hidden_size:,}"
    return title, trained.build(), trained.tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: logits are divided by it. top_k: only the k most probable symbols, None for all. seed: of the choice.
    greedy: always the most probable symbol, without choice.
    """

    max_new_tokens: int = 50
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0
    greedy: bool = False


def sample(model: GptForPretraining, tokenizer: RunTokenizer, prompt: str, sampling: Sampling) -> str:
    """Return the prompt and what follows it, up to the end of the document; raises UserError for a prompt without tokens."""
    ids = [int(index) for index in tokenizer.encode_batch([prompt])[0]]
    if not ids:
        raise UserError("--prompt is empty; give text to go on from")
    return tokenizer.decode(continued(model, ids, sampling, tokenizer.vocab_size, tokenizer.special_id("eos")))


@torch.inference_mode()
def continued(
    model: GptForPretraining, ids: list[int], sampling: Sampling, symbols: int, end: int | None = None
) -> list[int]:
    """Return the ids and what follows them, up to `end`, of the first `symbols` of the vocabulary.

    The model sees the last max_position_embeddings tokens. As long as there are no more, a step computes its new token alone,
    with the kept keys and values of those before it. After that each step drops the first token and moves all others, so that
    their keys and values change, and computes the whole again.
    """
    ids, generator = [*ids], torch.Generator().manual_seed(sampling.seed)
    window = model.config.max_position_embeddings
    cache = KeyValueCache(min(window, len(ids) + sampling.max_new_tokens))
    for _ in range(sampling.max_new_tokens):
        fits = len(ids) <= window
        unseen = ids[cache.length :] if fits else ids[-window:]
        hidden = model.encode(torch.tensor([unseen]), cache=cache if fits else None)
        # rows of the embedding beyond the last symbol mean nothing
        chosen = choose(model.logits(hidden[:, -1])[0, :symbols], sampling, generator)
        if chosen == end:
            break
        ids.append(chosen)
    return ids


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token by its logits (V,); the generator is for the choice.

    Among all symbols what is drawn for each does not depend on the order of their logits, which rounding may change.
    """
    if sampling.greedy:
        return int(logits.argmax())
    if sampling.top_k is None:
        return int(torch.multinomial(torch.softmax(logits / sampling.temperature, dim=0), 1, generator=generator))
    kept = logits.topk(min(sampling.top_k, len(logits)))
    probabilities = torch.softmax(kept.values / sampling.temperature, dim=0)
    return int(kept.indices[torch.multinomial(probabilities, 1, generator=generator)])


@dataclass(frozen=True)
class Candidate:
    """A symbol for a mask; text: as it reads in the sentence."""

    id: int
    text: str
    probability: float


@torch.inference_mode()
def fill_mask(model: BertForPretraining, tokenizer: RunTokenizer, text: str, top_k: int) -> list[list[Candidate]]:
    """Return the most probable symbols for each mask in the text, best first.

    A mask is written [MASK], or as the tokenizer has it. Raises UserError if there is none, or the text is too long.
    """
    mask_id = tokenizer.special_id("mask")
    inner = tokenizer.reader().encode(text.replace(MASK, tokenizer.specials["mask"]), add_special_tokens=False).ids
    if mask_id not in inner:
        raise UserError(f"the text has no {MASK}; write it in the place of a word")
    ids = [tokenizer.special_id("cls"), *inner, tokenizer.special_id("sep")]
    limit = model.config.max_position_embeddings
    if len(ids) > limit:
        raise UserError(f"the text has {len(ids):,} tokens, the model takes {limit:,}; shorten it")
    input_ids = torch.tensor([ids])
    hidden = model.encode(input_ids)[input_ids == mask_id]
    # rows of the embedding beyond the last symbol mean nothing
    probabilities = torch.softmax(model.mlm_logits(hidden)[:, : tokenizer.vocab_size], dim=-1)
    best = probabilities.topk(min(top_k, tokenizer.vocab_size))

    def candidate(index: int, probability: float) -> Candidate:
        # White space itself as the tokenizer writes it.
        text = tokenizer.decode([index]).strip() or str(tokenizer.tokenizer.id_to_token(index))
        return Candidate(index, text, probability)

    return [list(map(candidate, *row)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
