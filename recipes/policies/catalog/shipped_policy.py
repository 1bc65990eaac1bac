"""Shipped policies as data: a subclass of `ShippedPolicy` says where models keep what, and inherits the methods."""

import importlib
import itertools
import re
from typing import ClassVar

from torch import nn

from .layer import Layer
from .policy import Policy


class ShippedPolicy(Policy):
    """A policy whose rules are texts that `paths` reads; a module holds a weight and perhaps a bias."""

    models: ClassVar[str]
    """The classes of layers, each as "bert.BertLayer" for transformers.models.bert.modeling_bert.BertLayer."""
    layer_class: ClassVar[str]
    """The one of them that this class is of, by its qualified name."""
    attention: ClassVar[str] = "->"
    """From queries, keys and values to the output."""
    mlp: ClassVar[str] = "->"
    """From hidden to intermediate size, and from there back."""
    counts: ClassVar[str] = ""
    """Attributes that count heads or their columns."""
    norm_paths: ClassVar[str] = ""
    whole: ClassVar[str] = ""
    words: ClassVar[str] = "word_embedding{,s} embed_tokens shared wte embed_in tokens_embed w embeddings"
    """The ends of names of embeddings; a model has some of them."""
    logits: ClassVar[str] = (
        "{predictions,lm_head}.decoder pred_layer.proj lm_head generator_lm_head vocab_projector embed_out output_projection "
        "lm_loss"
    )
    """The ends of names of the projections to these words."""

    @classmethod
    def original_layer_class(cls) -> type[nn.Module]:
        module, _, name = cls.layer_class.rpartition(".")
        found: type[nn.Module] = getattr(importlib.import_module(module), name)
        return found

    @classmethod
    def divided(cls) -> list[str]:
        return [path for path, *_ in paths(cls.counts)]

    @classmethod
    def attn_qkv(cls) -> list[Layer]:
        return _layers(cls.attention.split("->")[0])

    @classmethod
    def attn_out(cls) -> list[Layer]:
        return _layers(cls.attention.split("->")[1])

    @classmethod
    def mlp_in(cls) -> list[Layer]:
        return _layers(cls.mlp.split("->")[0])

    @classmethod
    def mlp_out(cls) -> list[Layer]:
        return _layers(cls.mlp.split("->")[1])

    @classmethod
    def norms(cls) -> list[Layer]:
        return _layers(cls.norm_paths)

    @classmethod
    def embeddings(cls) -> list[Layer]:
        return [Layer(f"{path}.weight", ignore_checker=True) for path, *_ in paths(cls.words)]

    @classmethod
    def head(cls) -> list[Layer]:
        return [Layer(f"{path}.weight", ignore_checker=True) for path, *_ in paths(cls.logits)]

    @classmethod
    def replicated(cls) -> list[str]:
        return [path for path, *_ in paths(cls.whole)]


def _layers(text: str) -> list[Layer]:
    """A Layer for the weight and the bias of each module."""
    return [
        Layer(f"{path}.weight", f"{path}.bias", n_fused, ignore_checker=optional)
        for path, n_fused, optional in paths(text)
    ]


def paths(text: str) -> list[tuple[str, int | None, bool]]:
    """The paths that a text names, how many projections stand there if not one, and whether some layers lack it.

    "a.{b,c} d*3?" is a.b, a.c, and d, which holds three and may be absent.
    """
    found: list[tuple[str, int | None, bool]] = []
    for word in text.split():
        path, _, n_fused = word.removesuffix("?").partition("*")
        choices = [part.split(",") for part in re.split("[{}]", path)]
        for steps in itertools.product(*choices):
            found.append(("".join(steps), int(n_fused) if n_fused else None, word.endswith("?")))
    return found


def by_class(family: type[ShippedPolicy]) -> dict[str, type[ShippedPolicy]]:
    """A policy for each class of layers of a family, by the qualified name of that class."""
    found = {}
    for model in family.models.split():
        folder, *module, name = model.split(".")
        layer_class = ".".join(["transformers.models", folder, *(module or [f"modeling_{folder}"]), name])
        found[layer_class] = type(family.__name__, (family,), {"layer_class": layer_class})
    return found
