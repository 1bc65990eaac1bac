"""Say of one projection which tensors it is and how they may be cut, and of a layer what it computes besides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ....kernels.errors import UserError

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
            raise UserError("a Layer names neither weight nor bias; give the path of one at least")
        if self.n_fused is not None and (self.n_fused < 1 or self.parts is not None):
            raise UserError(
                f"{self.weight}: n_fused is {self.n_fused}; it must be 1 or more, and stand without parts, which says the same"
            )
        if self.layout not in LAYOUTS:
            raise UserError(f"{self.weight}: layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}")


@dataclass(frozen=True)
class Description:
    """What a layer computes between its projections: enough to compute it otherwise.

    activation: by its name in transformers. pre_layer_norm: whether the norms stand before attention and MLP;
    otherwise after their residual sums. causal: whether a token sees only those before it. hidden_dropout, attention_dropout:
    probabilities, of what attention and MLP add to the residual stream, and of attention probabilities.
    drops_attention_output: whether hidden_dropout is applied to what attention adds, too. rms_norm: whether the norms are
    RMSNorms. gated_mlp: whether one half of what goes into the MLP passes the activation, and the other multiplies it. rotary:
    whether the layer takes `position_embeddings`, cosines and sines (B or 1, S, D), by which queries and keys are turned.
    """

    activation: str
    layer_norm_eps: float
    pre_layer_norm: bool
    causal: bool
    hidden_dropout: float
    attention_dropout: float
    drops_attention_output: bool = True
    rms_norm: bool = False
    gated_mlp: bool = False
    rotary: bool = False
