"""What the key-value cache of `xformer-train sample` gains, in turns with the same loop that computes the whole text each time.

Models of run configs with weights as at a run's start, on the CPU in fp32, from a prompt of one token. Both draw with the same
seed, and the texts have to be equal. Prints tokens per second, the medians over the turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_device import machine_line

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.trained_models.sampling import Sampling, choose, continued
from xformer_train.recipes import RECIPES
from xformer_train.recipes.gpt.model import GptForPretraining

PROMPT = [5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["configs/gpt_tiny.yaml", "configs/llama_tiny.yaml"])
    parser.add_argument("--tokens", type=int, default=256, help="to add; the model gets as many positions")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    print(machine_line())
    for path in arguments.config:
        model, symbols = model_of(path, arguments.tokens)
        for how, sampling in (
            ("greedy", Sampling(arguments.tokens, greedy=True)),
            ("by chance", Sampling(arguments.tokens)),
        ):
            cached, whole = measure(model, symbols, sampling, arguments.turns)
            print(
                f"{Path(path).stem}, {how}: {cached:,.1f} tokens/s, without a cache {whole:,.1f}, {cached / whole:.1f}x"
            )


def model_of(path: str, tokens: int) -> tuple[GptForPretraining, int]:
    """Return the model of a run config, with one position more than tokens are added, and how many symbols it has."""
    config = load_config(Path(path)).config
    torch.manual_seed(config.seed)
    geometry = config.model.model_copy(update={"max_position_embeddings": tokens + len(PROMPT)})
    symbols = config.tokenizer.vocab_size
    model = RECIPES["gpt"].build_model(geometry, config.layer, config.objective, symbols)
    assert isinstance(model, GptForPretraining)
    return model.eval(), symbols


def measure(model: GptForPretraining, symbols: int, sampling: Sampling, turns: int) -> tuple[float, float]:
    """Return tokens per second with a cache and without. Raises ValueError where the texts differ."""
    speeds: dict[Callable[..., list[int]], list[float]] = {continued: [], without_cache: []}
    for _ in range(turns):
        texts = []
        for run, found in speeds.items():
            start = time.perf_counter()
            texts.append(run(model, PROMPT, sampling, symbols))
            found.append(sampling.max_new_tokens / (time.perf_counter() - start))
        if texts[0] != texts[1]:
            raise ValueError("the text with a cache is not that without")
    return statistics.median(speeds[continued]), statistics.median(speeds[without_cache])


@torch.inference_mode()
def without_cache(model: GptForPretraining, ids: list[int], sampling: Sampling, symbols: int) -> list[int]:
    """Return what `continued` does, by passes over the whole text."""
    ids, generator = [*ids], torch.Generator().manual_seed(sampling.seed)
    for _ in range(sampling.max_new_tokens):
        hidden = model.encode(torch.tensor([ids[-model.config.max_position_embeddings :]]))
        ids.append(choose(model.logits(hidden[:, -1])[0, :symbols], sampling, generator))
    return ids


if __name__ == "__main__":
    main()
