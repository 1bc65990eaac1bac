"""DeepSpeed's transformer layer by its published names, computed by `TransformerLayer`.

`DeepSpeedTransformerConfig` and `DeepSpeedTransformerLayer` take the arguments of DeepSpeed's classes of those names
(deepspeed.readthedocs.io, Transformer Kernels), and a layer's state dict has DeepSpeed's parameter names and shapes.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from ..layers.layer import TransformerLayer
from ..layers.parts import compose
from ..layers.products import Products
from ..ops.attention.attention import AttentionMask
from ..ops.attention.hiding_bias import lowest_score
from ..ops.dropout import draw_seed
from .config import DeepSpeedTransformerConfig

# As DeepSpeed calls what its own tests compare; of the fused parameters it reports the values' rows.
_REPORTED = {"attn_qkv": "V", "attn_o": "O", "attn_n": "N2", "inter_": "int", "output_": "out", "norm_": "norm"}


class _Linear(NamedTuple):
    """Parameters as `TransformerLayer` uses those of an nn.Linear."""

    weight: Tensor
    bias: Tensor
    std: float

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class _LayerNorm(NamedTuple):
    """Parameters as `TransformerLayer` uses those of an nn.LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class DeepSpeedTransformerLayer(TransformerLayer):
    """One BERT layer with DeepSpeed's constructor, parameters and `forward`.

    The rows of attn_qkvw and attn_qkvb are all queries, then all keys, then all values. attn_nw and attn_nb belong to the
    LayerNorm between attention and feed-forward part; norm_w and norm_b to the first LayerNorm of a pre-LN layer, but to
    the last one of a post-LN layer. A stack of pre-LN layers needs one more LayerNorm at its end. GELU is the tanh
    approximation, as in DeepSpeed's kernel. `config` is the `LayerConfig` the layer computes with, `deepspeed_config` a
    copy of what it was built from.

    layer_id: on the class, the number of layers built so far; on a layer, how many were built before it, or the index it
    was given. Nothing is shared between layers through it.
    """

    layer_id = 0
    norm_w: nn.Parameter
    norm_b: nn.Parameter
    attn_nw: nn.Parameter
    attn_nb: nn.Parameter

    # What TransformerLayer computes with, looked up in the flat parameters at each use, so that there is one copy of them
    # and replacing one (functional_call, parametrize, a data-parallel replica) reaches the computation.
    qkv: Any = property(lambda layer: _Linear(layer.attn_qkvw, layer.attn_qkvb, layer.config.initializer_range))
    attention_output: Any = property(lambda layer: _Linear(layer.attn_ow, layer.attn_ob, layer.config.output_range))
    intermediate: Any = property(lambda layer: _Linear(layer.inter_w, layer.inter_b, layer.config.initializer_range))
    output: Any = property(lambda layer: _Linear(layer.output_w, layer.output_b, layer.config.output_range))
    attention_norm: Any = property(lambda layer: layer._layer_norm(first=True))
    mlp_norm: Any = property(lambda layer: layer._layer_norm(first=False))

    @overload
    def __init__(
        self,
        config: DeepSpeedTransformerConfig,
        initial_weights: Sequence[Tensor] | None = None,
        initial_biases: Sequence[Tensor] | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        layer_id: int,
        config: DeepSpeedTransformerConfig,
        initial_weights: Sequence[Tensor] | None = None,
        initial_biases: Sequence[Tensor] | None = None,
    ) -> None: ...

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Build a layer from `(config)` or, as in DeepSpeed's tutorial, `(layer_id, config)`.

        initial_weights: values of Wq, Wk, Wv, attn_ow, attn_nw, inter_w, output_w, norm_w in this order, the first three
        (H, H); initial_biases: those of bq, bk, bv, attn_ob, attn_nb, inter_b, output_b, norm_b. They are copied. What is
        not given starts as `reset_parameters` says. Raises ValueError for a config no layer can have.
        """
        nn.Module.__init__(self)  # TransformerLayer's own would create the parameters a second time
        if arguments and isinstance(arguments[0], int):
            named["layer_id"], *arguments = arguments  # type: ignore[assignment]
        self._build(*arguments, **named)

    def _build(
        self,
        config: DeepSpeedTransformerConfig,
        initial_weights: Sequence[Tensor] | None = None,
        initial_biases: Sequence[Tensor] | None = None,
        layer_id: int | None = None,
    ) -> None:
        self.config, self.deepspeed_config = config.layer_config(), copy.copy(config)
        self.parts = compose(self.config, self.parallel)
        if config.local_rank >= 0 and torch.cuda.is_available():
            torch.cuda.set_device(config.local_rank)
        H, F_ = self.config.hidden_size, self.config.intermediate_size
        shapes = {"attn_qkv": (3 * H, H), "attn_o": (H, H), "attn_n": (H,)}
        shapes |= {"inter_": (F_, H), "output_": (H, F_), "norm_": (H,)}
        dtype = torch.half if config.fp16 else torch.get_default_dtype()
        for name, shape in shapes.items():
            self.register_parameter(name + "w", nn.Parameter(torch.empty(shape, dtype=dtype)))
            self.register_parameter(name + "b", nn.Parameter(torch.empty(shape[0], dtype=dtype)))
        self.reset_parameters()
        if initial_weights is not None:
            self._copy_initial("initial_weights", initial_weights, "w")
        if initial_biases is not None:
            self._copy_initial("initial_biases", initial_biases, "b")
        self.train(config.training)
        self.layer_id = DeepSpeedTransformerLayer.layer_id if layer_id is None else layer_id
        self.deepspeed_config.layer_id = self.layer_id
        DeepSpeedTransformerLayer.layer_id += 1

    @torch.no_grad()
    def _copy_initial(self, argument: str, values: Sequence[Tensor], kind: str) -> None:
        names = [part + kind for part in ("attn_o", "attn_n", "inter_", "output_", "norm_")]
        targets = [*getattr(self, "attn_qkv" + kind).chunk(3), *(getattr(self, name) for name in names)]
        if len(values) != len(targets):
            raise ValueError(f"{argument} has {len(values)} tensors; give 8: query, key, value, {', '.join(names)}")
        for index, (target, value) in enumerate(zip(targets, values, strict=True)):
            if value.shape != target.shape:
                raise ValueError(
                    f"{argument}[{index}] has shape {tuple(value.shape)}; its place in this layer has {tuple(target.shape)}"
                )
            target.copy_(value)

    def _layer_norm(self, *, first: bool) -> _LayerNorm:
        if first is self.config.pre_layer_norm:
            return _LayerNorm(self.norm_w, self.norm_b, self.config.layer_norm_eps)
        return _LayerNorm(self.attn_nw, self.attn_nb, self.config.layer_norm_eps)

    def _products(self, called: tuple[str, ...]) -> Products:
        return Products()  # never in FP8, which DeepSpeed's API does not know

    def _draw_seed(self, device: torch.device) -> Tensor:
        drawn = draw_seed(device)
        return drawn if self.deepspeed_config.seed < 0 else drawn ^ self.deepspeed_config.seed

    def forward(  # type: ignore[override]  # noqa: PLR0913, PLR0917 - DeepSpeed's signature
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: None = None,
        layer_head_mask: None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_value: None = None,
        output_attentions: bool = False,
        grads: list[Any] | None = None,
    ) -> Tensor | tuple[Tensor]:
        """Return the layer's output, (B, S, H) in the dtype of hidden_states; in a 1-tuple with return_tuple.

        hidden_states: (B, S, H), contiguous or not, any S. attention_mask: what to add to the scores of each key before
        the softmax, (B, 1, 1, S) or (B, S), any float dtype, usually 0 for tokens and -10000 for padding; None for no
        padding. -inf, or what hidden_states' dtype cannot hold, counts as half the lowest value that it can, so that a
        sequence of padding alone stays finite. No gradient flows into it.
        grads: for tests, as there: backward appends [gradient, name] of each parameter, of attn_qkvw and attn_qkvb the values'.
        The other arguments are there for callers that pass their defaults. Raises ValueError if one of them has another
        value, for a mask of another shape or kind, an input of another dtype than the parameters, and one larger than
        batch_size or max_seq_length allow.
        """
        refused = {
            "head_mask": head_mask,
            "layer_head_mask": layer_head_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_value": past_key_value,
            "output_attentions": output_attentions or None,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"{name} was given, but the layer cannot honour it; call the layer without it")
        self._check_input(hidden_states)
        if grads is not None and torch.is_grad_enabled():
            self._report_gradients(grads)
        bias = None if attention_mask is None else _key_bias(attention_mask, hidden_states)
        output = super().forward(hidden_states, AttentionMask(bias=bias))
        return (output,) if self.deepspeed_config.return_tuple else output

    def _report_gradients(self, grads: list[Any]) -> None:
        for (name, reported), kind in itertools.product(_REPORTED.items(), "wb"):
            rows, label = (
                slice(2 * self.config.hidden_size if reported == "V" else 0, None),
                f"{reported}_{kind.upper()}",
            )
            getattr(self, name + kind).register_hook(lambda g, rows=rows, label=label: grads.append([g[rows], label]))

    def _check_input(self, hidden_states: Tensor) -> None:
        if hidden_states.dim() != 3:
            raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}; give it as (B, S, H)")
        dtype = self.attn_qkvw.dtype
        if hidden_states.dtype != dtype:
            raise ValueError(
                f"hidden_states is {hidden_states.dtype}, the parameters are {dtype}; convert one of them, as by .to({dtype})"
            )
        limits = {
            "batch_size": self.deepspeed_config.batch_size,
            "max_seq_length": self.deepspeed_config.max_seq_length,
        }
        for (name, limit), size in zip(limits.items(), hidden_states.shape, strict=False):
            if 0 < limit < size:
                raise ValueError(
                    f"hidden_states has shape {tuple(hidden_states.shape)}, above {name}={limit}; "
                    f"raise {name}, or leave it at -1 for no limit"
                )

    def extra_repr(self) -> str:
        return (
            f"layer_id={self.layer_id}, hidden_size={self.config.hidden_size}, heads={self.config.num_attention_heads}"
        )


def _key_bias(mask: Tensor, hidden_states: Tensor) -> Tensor:
    B, S = hidden_states.shape[:2]
    if not mask.is_floating_point():
        raise ValueError(
            f"attention_mask is of {mask.dtype}, but it is added to the scores; give (1 - mask) * -10000.0, where mask is 1 "
            f"for tokens and 0 for padding"
        )
    if mask.shape not in ((B, 1, 1, S), (B, S)):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; give one value per key, {(B, 1, 1, S)} or {(B, S)} (for masks "
            f"per query, as causal ones are, use TransformerLayer)"
        )
    wide = torch.promote_types(mask.dtype, hidden_states.dtype)
    lowest = lowest_score(hidden_states.dtype)
    return mask.detach().to(wide).clamp(min=lowest).to(hidden_states.dtype).view(B, 1, 1, S)
