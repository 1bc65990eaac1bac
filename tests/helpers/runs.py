"""Small runs for tests: their text, their config, and what they left behind."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

BERT = {
    "model": {
        "type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 64,
    },
    "tokenizer": {"type": "bytes"},
    "objective": {"sentence_task": "nsp"},
    "training": {"train_batch_size": 8, "micro_batch_size": 4, "max_steps": 12, "precision": "fp32"},
    "optimizer": {"type": "adamw", "lr": 0.001},
    "schedule": {"type": "linear", "warmup_steps": 2, "total_steps": 12},
    "logging": {"every_steps": 1, "tensorboard": False},
}
GPT = BERT | {
    "model": BERT["model"] | {"type": "gpt", "hidden_act": "gelu_tanh", "layer_norm_eps": 1e-5},
    "objective": {"type": "clm"},
}
PACKED = BERT | {"data": {"packing": "best_fit", "short_seq_prob": 0.5}, "objective": {"sentence_task": "none"}}
_TODAYS = {
    "position_embedding": "rope",
    "gated_mlp": True,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "layer_norm_eps": 1e-5,
}
MODERNBERT = BERT | {
    "model": BERT["model"]
    | _TODAYS
    | {"rope_theta": 160000.0, "local_rope_theta": 100.0, "sliding_window": 8, "global_attn_every_n_layers": 2},
    "objective": {"sentence_task": "none", "mlm_probability": 0.3},
}
LLAMA = GPT | {
    "model": GPT["model"]
    | _TODAYS
    | {
        "norm": "rms_norm",
        "hidden_act": "silu",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "tie_word_embeddings": False,
    },
}


def write_text(path: Path, num_documents: int = 40) -> Path:
    """Documents of made-up sentences, separated by blank lines."""
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 8))) for _ in range(200)]
    documents = []
    for _ in range(num_documents):
        sentences = [" ".join(generator.choices(words, k=generator.randint(3, 9))) + "." for _ in range(8)]
        documents.append(" ".join(sentences))
    path.write_text("\n\n".join(documents) + "\n")
    return path


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """base with the dotted keys of `changes` set."""
    copy: dict[str, Any] = json.loads(json.dumps(base))
    for key, value in changes.items():
        *sections, last = key.split(".")
        holder = copy
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[last] = value
    return copy


def write_config(folder: Path, base: dict[str, Any] = BERT, **changes: Any) -> Path:
    """A run config in `folder`, its text, cache and output there too; `changes` have __ in the place of dots."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    settings = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "data.sources": [{"kind": "text", "path": str(text)}],
        "data.max_seq_length": 32,
        "data.cache_dir": str(folder / "cache"),
    } | {key.replace("__", "."): value for key, value in changes.items()}
    content = merged(base, settings)
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in metrics(run) if "loss" in row}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The module of a checkpoint of ZeRO stage 0."""
    state: dict[str, torch.Tensor] = torch.load(
        checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
    )["module"]
    return state
