"""What a policy says of a transformer layer: which tensors are its projections and how they may be cut.

The names are parallelformers', and a policy written for it runs here as it is. What this file adds to them is marked "ours" and
may be left out.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

LAYOUTS = ("concat", "interleaved")


@dataclass(frozen=True)
class Layer:
    """One projection of a transformer layer.

    weight, bias: paths from the layer to its tensors. `.` gets an attribute, `[0]` an element of an nn.ModuleList, as in
        "mlp[0].dense.weight".
    n_fused: how many projections of equal size one tensor holds, 3 for the queries, keys and values of GPT-2; each is cut for
        itself.
    replace: the class of the module after slicing. None: AllReduceLinear or AllReduceConv1D behind a row-parallel product,
        ColumnParallelLinear or ColumnParallelConv1D otherwise, as the module is an nn.Linear or a Conv1D of transformers.
    reversed: whether the weight is stored (in, out), as a Conv1D and an nn.Embedding do.
    ignore_checker: whether the tensors may be absent, as those of cross-attention are in an encoder.
    parts (ours): sizes of fused projections that are not equal, or a function of the model's config that gives them: with g
        groups of keys and values for a heads of d columns, [a * d, g * d, g * d].
    layout (ours): "concat", one fused projection after the other; "interleaved", head by head, which is cut as one.

    Raises ValueError if no tensor is named, if n_fused is below 1 or beside parts, and for another layout.
    """

    weight: str | None = None
    bias: str | None = None
    n_fused: int | None = None
    replace: Any = None
    reversed: Any = None
    ignore_checker: bool = False
    parts: Sequence[int] | Callable[[Any], Sequence[int]] | None = None
    layout: Literal["concat", "interleaved"] = "concat"

    def __post_init__(self) -> None:
        if self.weight is None and self.bias is None:
            raise ValueError("a Layer names neither weight nor bias; give the path of one at least")
        if self.n_fused is not None and (self.n_fused < 1 or self.parts is not None):
            raise ValueError(
                f"{self.weight}: n_fused is {self.n_fused}; it must be 1 or more, and stand without parts, which says the same"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"{self.weight}: layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}")


@dataclass(frozen=True)
class Description:
    """What a layer computes between its projections: enough to compute it otherwise.

    activation: by its name in transformers. pre_layer_norm: whether the LayerNorms stand before attention and MLP;
    otherwise after their residual sums. causal: whether a token sees only those before it. hidden_dropout, attention_dropout:
    probabilities, of what attention and MLP add to the residual stream, and of attention probabilities.
    drops_attention_output: whether hidden_dropout is applied to what attention adds, too.
    """

    activation: str
    layer_norm_eps: float
    pre_layer_norm: bool
    causal: bool
    hidden_dropout: float
    attention_dropout: float
    drops_attention_output: bool = True


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
    def describe(config: Any) -> Description | None:
        """Ours: what the layer computes besides; None: not said, and the layer cannot be swapped."""
        return None

    @staticmethod
    def from_tp_plan(config: Any) -> "type[Policy]":
        """The policy that a transformers config carries as `base_model_tp_plan`.

        Raises ValueError if it has none, or one with styles that no rule here expresses.
        """
        from .tp_plan import policy_of_plan

        return policy_of_plan(config)
