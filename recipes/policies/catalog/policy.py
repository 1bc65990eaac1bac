"""What a policy says of a transformer layer: which tensors are its projections and how they may be cut.

The names are parallelformers', and a policy written for it runs here as it is. What this file adds to them is marked "ours" and
may be left out.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from .layer import Description, Layer
from .tp_plan import policy_of_plan


class Policy(ABC):
    """How the layers of one class are cut. Everything is static; a subclass is never instantiated but by who wants one.

    Paths are relative to a layer, those of `embeddings` and `head` to any module of the model.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        """Attributes of a layer and what they are on one of `world_size` processes, by path: {"attn.num_heads": 6}."""
        return {}

    @staticmethod
    def divided() -> list[str]:
        """Ours: attributes of a layer that count what processes share, as "attn.num_heads"; they become a process's part."""
        return []

    @staticmethod
    def replace_modules() -> dict[str, Any]:
        """Classes whose attributes take the place of those of a model's class, by that class's qualified or bare name."""
        return {}

    @staticmethod
    def attn_qkv() -> list[Layer]:
        """The projections to queries, keys and values: column-parallel, each process has its heads."""
        return []

    @staticmethod
    def attn_out() -> list[Layer]:
        """The output projections of attention: row-parallel."""
        return []

    @staticmethod
    def mlp_in() -> list[Layer]:
        """The projections from hidden to intermediate size: column-parallel."""
        return []

    @staticmethod
    def mlp_out() -> list[Layer]:
        """The projections from intermediate to hidden size: row-parallel."""
        return []

    @staticmethod
    @abstractmethod
    def original_layer_class() -> type[nn.Module]:
        """The class of the layers. Its subclasses are layers too."""

    @staticmethod
    def norms() -> list[Layer]:
        """Ours: the normalizations of a layer, in the order in which they are computed.

        To name them promises that besides the projections a layer computes nothing across tokens, that the layer and the
        module that holds `attn_qkv` take hidden states (B, S, H) first or as `hidden_states`, and that the layers follow
        each other in one nn.ModuleList. `shard(sequence_parallel=True)` relies on that.
        """
        return []

    @staticmethod
    def embeddings() -> list[Layer]:
        """Ours: embeddings whose vocabulary is shared among the processes."""
        return []

    @staticmethod
    def head() -> list[Layer]:
        """Ours: the projections to a vocabulary that is shared among the processes; they make complete logits on each."""
        return []

    @staticmethod
    def replicated() -> list[str]:
        """Ours: modules of a layer that stay whole, because they compute the same on every process; they may be absent."""
        return []

    @staticmethod
    def shared_by_heads() -> list[str]:
        """Ours: parameters that stay whole though each process uses them on its own heads only, as a norm of queries."""
        return []

    @staticmethod
    def head_norms() -> list[Layer]:
        """Ours: the RMSNorms of each head's queries and of each head's keys, in this order, as `shared_by_heads` does."""
        return []

    @staticmethod
    def window() -> str | None:
        """Ours: the attribute of a layer that counts the tokens within which attention stays, a token itself and those on one
        side of it, by its path; it may be None in a layer that sees all. None: there is no such attribute.
        """
        return None

    @staticmethod
    def describe(config: Any) -> Description | None:
        """Ours: what the layer computes besides; None: not said, and the layer cannot be swapped."""
        return None

    @staticmethod
    def from_tp_plan(config: Any) -> "type[Policy]":
        """Return the policy that a transformers config carries as `base_model_tp_plan`.

        Raises UserError if it has none, or one with styles that no rule here expresses.
        """
        policy: type[Policy] = policy_of_plan(Policy, config)
        return policy
