"""Shipped policies as data: a subclass of `ShippedPolicy` says where a model keeps what, and inherits the methods."""

import importlib
from typing import Any, ClassVar

from torch import nn

from .layer import Layer
from .policy import Policy


class ShippedPolicy(Policy):
    """A policy whose rules are paths to the modules that hold a weight and perhaps a bias."""

    layer_class: ClassVar[str]
    """The class of the layers, below transformers.models."""
    qkv: ClassVar[tuple[str, ...]]
    out: ClassVar[tuple[str, ...]]
    wide: ClassVar[tuple[str, ...]]
    """Modules from hidden to intermediate size."""
    narrow: ClassVar[tuple[str, ...]]
    """Modules from intermediate to hidden size."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Beginnings of paths that some layers of the class do not have."""
    arguments: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Attributes that count heads or their columns, and the config's names for what they are on one process."""
    norm_paths: ClassVar[tuple[str, ...]] = ()
    embedding_paths: ClassVar[tuple[str, ...]] = ()
    head_paths: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def original_layer_class(cls) -> type[nn.Module]:
        module, _, name = cls.layer_class.rpartition(".")
        found: type[nn.Module] = getattr(importlib.import_module(f"transformers.models.{module}"), name)
        return found

    @classmethod
    def replace_arguments(cls, config: Any, world_size: int) -> dict[str, Any]:
        return {path: getattr(config, field) // world_size for path, field in cls.arguments}

    @classmethod
    def attn_qkv(cls) -> list[Layer]:
        return cls.layers(cls.qkv)

    @classmethod
    def attn_out(cls) -> list[Layer]:
        return cls.layers(cls.out)

    @classmethod
    def mlp_in(cls) -> list[Layer]:
        return cls.layers(cls.wide)

    @classmethod
    def mlp_out(cls) -> list[Layer]:
        return cls.layers(cls.narrow)

    @classmethod
    def norms(cls) -> list[Layer]:
        return cls.layers(cls.norm_paths)

    @classmethod
    def embeddings(cls) -> list[Layer]:
        return [Layer(f"{path}.weight", ignore_checker=path.startswith(cls.optional)) for path in cls.embedding_paths]

    @classmethod
    def head(cls) -> list[Layer]:
        return [Layer(f"{path}.weight", f"{path}.bias", ignore_checker=True) for path in cls.head_paths]

    @classmethod
    def replicated(cls) -> list[str]:
        return list(cls.whole)

    @classmethod
    def layers(cls, paths: tuple[str, ...], **fields: Any) -> list[Layer]:
        """A Layer for the weight and the bias of each module."""
        return [
            Layer(f"{path}.weight", f"{path}.bias", ignore_checker=path.startswith(cls.optional), **fields)
            for path in paths
        ]


def sizes(path: str, **attributes: str) -> tuple[tuple[str, str], ...]:
    """Attributes of the module at the path, each with the config's name for it."""
    return tuple((f"{path}.{name}", field) for name, field in attributes.items())


def below(path: str, *names: str) -> tuple[str, ...]:
    """The paths of several modules of one module."""
    return tuple(f"{path}.{name}" for name in names)
