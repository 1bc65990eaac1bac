"""Shipped policies as data: a `Family` says where models keep what, and makes a policy for each class of layers."""

import functools
import importlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .layer import Description, Layer
from .policy import Policy


class ShippedPolicy(Policy):
    """What the policies made by `Family.policies` have in common."""

    family: ClassVar["Family"]
    layer_class: ClassVar[str]

    @classmethod
    def original_layer_class(cls) -> type[nn.Module]:
        module, _, name = cls.layer_class.rpartition(".")
        found: type[nn.Module] = getattr(importlib.import_module(module), name)
        return found

    @classmethod
    def window(cls) -> str | None:
        return cls.family.window or None

    @classmethod
    def describe(cls, config: Any) -> Description | None:
        fields = (cls.family.description or {}).items()
        given = {name: getattr(config, value) if isinstance(value, str) else value for name, value in fields}
        return Description(**given) if given else None


@dataclass(frozen=True)
class Family:
    """Models with the same modules. All texts name paths below a layer, as `paths` reads them.

    models: classes of layers, each as "bert.BertLayer" for transformers.models.bert.modeling_bert.BertLayer.
    attention: "a -> b", from queries, keys and values to the output; mlp: from hidden to intermediate size and back. These are
    modules with a weight and perhaps a bias; biases: parameters of attention that are no module's.
    counts: attributes that count heads or their columns. norms, head_norms, window: as in `Policy`. whole: modules that stay
    whole.
    words, logits: ends of names of embeddings, and of the projections to these words; a model has some of them.
    description: fields of a `Description`, texts being the config's names for them.
    """

    models: str
    attention: str = "->"
    mlp: str = "->"
    counts: str = ""
    biases: str = ""
    norms: str = ""
    head_norms: str = ""
    window: str = ""
    whole: str = ""
    words: str = "word_embedding{,s} embed_tokens shared wte embed_in tokens_embed w embeddings"
    logits: str = (
        "{predictions,lm_head}.decoder pred_layer.proj lm_head generator_lm_head vocab_projector embed_out lm_loss "
        "output_projection"
    )
    description: Mapping[str, Any] | None = None

    def policies(self) -> dict[str, type[ShippedPolicy]]:
        """A policy for each class of layers, by the qualified name of that class."""
        texts = (*self.attention.split("->"), *self.mlp.split("->"), self.norms, self.head_norms)
        rules: dict[str, list[Any]] = dict(
            zip(("attn_qkv", "attn_out", "mlp_in", "mlp_out", "norms", "head_norms"), map(_layers, texts), strict=True)
        )
        rules["attn_qkv"] += [Layer(bias=path) for path, *_ in paths(self.biases)]
        for rule, text in (("embeddings", self.words), ("head", self.logits)):
            rules[rule] = [Layer(f"{path}.weight", ignore_checker=True) for path, *_ in paths(text)]
        for rule, text in (("divided", self.counts), ("replicated", self.whole)):
            rules[rule] = [path for path, *_ in paths(text)]
        rules["shared_by_heads"] = [layer.weight for layer in rules["head_norms"]]
        methods: dict[str, Any] = {rule: staticmethod(functools.partial(list, one)) for rule, one in rules.items()}
        found = {}
        for model in self.models.split():
            folder, *module, name = model.split(".")
            layer_class = ".".join(["transformers.models", folder, *(module or [f"modeling_{folder}"]), name])
            fields = {"family": self, "layer_class": layer_class, **methods}
            found[layer_class] = type(f"{name}Policy", (ShippedPolicy,), fields)
        return found


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
