"""DeepSpeedTransformerConfig: the settings of DeepSpeed's transformer layer, by their names."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from ..layers.config import LayerConfig


class _IntermediateSize:
    """The attribute `intermediate_size`: what was given if positive, else four times the hidden_size of the moment."""

    def __get__(self, config: "DeepSpeedTransformerConfig | None", owner: type) -> int:
        if config is None:
            return -1  # the class attribute, which `dataclass` takes for the default
        given: int = config.__dict__["intermediate_size"]
        sizes = (given, config.hidden_size)
        derives = all(isinstance(size, Integral) for size in sizes) and given <= 0 < config.hidden_size
        return 4 * config.hidden_size if derives else given

    def __set__(self, config: "DeepSpeedTransformerConfig", value: int) -> None:
        config.__dict__["intermediate_size"] = value


@dataclass
class DeepSpeedTransformerConfig:
    """Geometry, environment and flags of a `DeepSpeedTransformerLayer`, with DeepSpeed's names, order and defaults.

    -1 means not set. A config may be filled attribute by attribute; values are checked where a layer is built from it, and
    an attribute that does not exist is refused with AttributeError.

    batch_size: most sequences a layer accepts in one call; not set for any number.
    hidden_size: H. Needed.
    intermediate_size: F, width of the feed-forward part; 4 * hidden_size where not positive.
    heads: N, has to divide hidden_size. Needed.
    attn_dropout_ratio: dropout of the attention probabilities, in [0, 1). Needed.
    hidden_dropout_ratio: dropout of what each half of the layer adds to the residual stream, in [0, 1). Needed.
    num_hidden_layers: layers in the model. Needed with adjust_init_range, and read by nothing else.
    initializer_range: standard deviation of the normal distribution that weights start from. Needed.
    layer_norm_eps: added to the variance in LayerNorm.
    local_rank: number of the GPU the layer runs on. When set, and PyTorch has CUDA, building a layer makes that GPU the
        current one; leave it if the program chose its device already.
    seed: random seed of dropout, mixed into the seed that each training call draws from torch's default generator. So
        layers, or ranks, with different seeds drop different elements though torch was seeded alike; the same
        `torch.manual_seed` and the same seed drop the same elements again; and restoring torch's generator state is all it
        takes to resume, or to recompute a layer under `torch.utils.checkpoint`. Not set, torch's generator decides alone.
        Initial weights never depend on it.
    fp16: build the parameters in half precision. `.half()` and `.to(torch.bfloat16)` do so later.
    pre_layer_norm: LayerNorm before each half of the layer (pre-LN) instead of after it (post-LN, the original BERT).
    normalize_invertible, gelu_checkpoint, attn_dropout_checkpoint, stochastic_mode: see `LayerConfig`.
    adjust_init_range: start attn_ow and output_w at initializer_range / sqrt(2 * num_hidden_layers), on every rank.
    return_tuple: `forward` returns the 1-tuple (output,) instead of the output.
    training: whether a new layer starts in training mode; `module.train()` and `module.eval()` decide afterwards.
    max_seq_length: longest sequence a layer accepts; not set for any length. From DeepSpeed's tutorial.
    layer_id, test_gemm, is_grad_enabled: attributes there, which programs set; they change nothing. Of `deepspeed_config` of a
        layer, layer_id is that layer's.
    """

    batch_size: int = -1
    hidden_size: int = -1
    intermediate_size: int = _IntermediateSize()  # type: ignore[assignment]
    heads: int = -1
    attn_dropout_ratio: float = -1
    hidden_dropout_ratio: float = -1
    num_hidden_layers: int = -1
    initializer_range: float = -1
    layer_norm_eps: float = 1e-12
    local_rank: int = -1
    seed: int = -1
    fp16: bool = False
    pre_layer_norm: bool = True
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    adjust_init_range: bool = True
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False
    return_tuple: bool = False
    training: bool = True
    max_seq_length: int = field(default=-1, kw_only=True)
    layer_id: int = field(default=-1, kw_only=True)
    test_gemm: bool = field(default=False, kw_only=True)
    is_grad_enabled: bool = field(default=True, kw_only=True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:
            raise AttributeError(_unknown(name, value))
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return a config with the given values and defaults elsewhere; raises ValueError for a key that is no parameter."""
        for name, value in values.items():
            if name not in cls.__dataclass_fields__:
                raise ValueError(_unknown(name, value))
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Return the config in a UTF-8 JSON file that holds one object; raises ValueError as `from_dict` does."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a JSON {type(values).__name__}; it must hold one object of parameters")
        return cls.from_dict(values)

    def layer_config(self) -> LayerConfig:
        """Return the `LayerConfig` of these values; raises ValueError for one that is missing, mistyped or impossible."""
        self._check_types()
        self._check_values()
        return LayerConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            hidden_act="gelu_tanh",
            hidden_dropout_prob=self.hidden_dropout_ratio,
            attention_probs_dropout_prob=self.attn_dropout_ratio,
            pre_layer_norm=self.pre_layer_norm,
            layer_norm_eps=self.layer_norm_eps,
            initializer_range=self.initializer_range,
            num_hidden_layers=self.num_hidden_layers if self.adjust_init_range else 1,
            adjust_init_range=self.adjust_init_range,
            normalize_invertible=self.normalize_invertible,
            gelu_checkpoint=self.gelu_checkpoint,
            attn_dropout_checkpoint=self.attn_dropout_checkpoint,
            stochastic_mode=self.stochastic_mode,
        )

    def _check_types(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "layer_id" and value is None:
                continue  # as DeepSpeed's own tests set it
            kind = {int: Integral, float: Real, bool: bool}[entry.type]  # type: ignore[index]
            if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
                raise ValueError(
                    f"{entry.name}={value!r} is of type {type(value).__name__}; give it as {entry.type.__name__}"  # type: ignore[union-attr]
                )

    def _check_values(self) -> None:
        positive = ["hidden_size", "heads"] + (["num_hidden_layers"] if self.adjust_init_range else [])
        for name in positive:
            if getattr(self, name) <= 0:
                why = " when adjust_init_range is on" if name == "num_hidden_layers" else ""
                raise ValueError(f"{name}={getattr(self, name)} is not positive; set the model's {name}{why}")
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by heads={self.heads}; "
                f"choose a number of heads that divides it"
            )
        for name in ("attn_dropout_ratio", "hidden_dropout_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a dropout probability; set it in [0, 1), 0 for no dropout"
                )
        for name, usual in (("initializer_range", 0.02), ("layer_norm_eps", 1e-12)):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is negative or not finite; set it, usually to {usual}")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} does not fit 63 bits; set it below 2**63")


def _unknown(name: str, value: Any) -> str:
    near = difflib.get_close_matches(name, DeepSpeedTransformerConfig.__dataclass_fields__, 1)
    remedy = f"did you mean {near[0]}?" if near else "remove it"
    return f"{name}={value!r}: DeepSpeedTransformerConfig has no parameter {name}; {remedy}"
