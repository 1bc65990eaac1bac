"""A model held against what the fused layer computes: how to make each layer, or all that stands against it in one error."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ....kernels.errors import UserError
from ....kernels.layers.config import LayerConfig
from ....kernels.ops.choices import Activation
from ....kernels.parallel.collectives import ONE_PROCESS, TensorParallel
from ....kernels.parallel.sharding import is_sharded
from ...shared.transformers_form import ACTIVATIONS
from ..catalog.layer import Description, Layer
from ..catalog.lookup import shipped_models
from ..catalog.paths import ABSENT, find, missing, owner_of
from ..catalog.policy import Policy
from ..sharding.modules import Sharded, class_before, projection_class
from ..sharding.plan import config_of, no_parameter, problem_list
from .comparison import SwapPlace, differences
from .fused_layer import FusedLayer, FusedTransformerLayer, Origin
from .masks import IMPLEMENTATIONS, LayerMasks

# Options of transformers' configs that change what a layer computes, and their only value that the fused layer can have.
_OPTIONS = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "chunk_size_feed_forward": 0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}
_RULES = {"qkv": "attn_qkv", "attention_output": "attn_out", "intermediate": "mlp_in", "output": "mlp_out"}
_NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")


def plan_swap(model: nn.Module, policies: Sequence[type[Policy]]) -> list[SwapPlace]:
    """All layers to swap. Raises one ValueError for all that the fused layer cannot take over or honour."""
    return _Planner(model).plan(policies)


class _Planner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.problems: dict[str, list[str]] = defaultdict(list)  # where each was found
        self.uses: dict[int, int] = defaultdict(int)  # of each parameter
        for _, parameter in model.named_parameters(remove_duplicate=False):
            self.uses[id(parameter)] += 1

    def plan(self, policies: Sequence[type[Policy]]) -> list[SwapPlace]:
        name = type(self.model).__name__
        if any(isinstance(module, FusedLayer) for module in self.model.modules()):
            raise UserError(f"this {name} is swapped already; call revert(model) before another swap")
        if any(isinstance(one, Sharded) and one.parallel.divides_tokens for one in self.model.modules()):
            raise UserError(
                f"this {name} is sharded with sequence_parallel=True, which fused layers cannot take over; leave it out, or "
                f"do not swap"
            )
        places = []
        for policy in policies:
            own = self._places(policy)
            places += own
            if not self.problems:
                # of each kind the last, because some models scale by the number of the layer
                for place in {place.config: place for place in own}.values():
                    for problem in differences(place):
                        self._problem(place.name, problem)
        self._raise_problems()
        return places

    def _places(self, policy: type[Policy]) -> list[SwapPlace]:
        cls = policy.original_layer_class()
        found = [(name, module) for name, module in self.model.named_modules() if isinstance(module, cls)]
        if not found:
            self._problem(policy.__name__, f"the model has no {cls.__name__}, to whose layers the policy applies")
        shared: dict[int, LayerMasks] = {}  # of the layers with one config
        places = [self._place(policy, name, module, shared) for name, module in found]
        return [place for place in places if place is not None]

    def _place(
        self, policy: type[Policy], name: str, layer: nn.Module, shared: dict[int, LayerMasks]
    ) -> SwapPlace | None:
        if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
            self._problem(name, "DeepSpeed's ZeRO stage 3 has partitioned its parameters; swap before it does")
            return None
        config = config_of(self.model, name)
        description = policy.describe(config)
        if description is None:
            self._problem(name, f"{policy.__name__} does not describe what the layer computes")
            return None
        activation, heads = self._check_options(name, config, description)
        parallel = _parallel_of(layer)
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        origins = self._origins(policy, name, layer, description, (heads, key_heads))
        self._check_modules(name, layer, description)
        layer_config = self._layer_config(name, layer, origins, description, activation, config)
        if layer_config is None:
            return None
        place = SwapPlace(
            name,
            layer,
            layer_config,
            description,
            origins,
            parallel,
            shared.setdefault(id(config), LayerMasks(config, description.causal)),
            next((module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")), None),  # type: ignore[arg-type]
            self._window(policy, name, layer),
        )
        self._check_parameters(place)
        return place

    def _check_options(self, name: str, config: Any, description: Description) -> tuple[Activation, int]:
        for option, only in _OPTIONS.items():
            value = getattr(config, option, only)
            if value != only:
                self._problem(name, f"{option} is {value!r}; a fused layer can only have {only!r}")
        implementation = getattr(config, "_attn_implementation", None) or "sdpa"
        if implementation not in IMPLEMENTATIONS:
            self._problem(name, f"attn_implementation is {implementation!r}; it must be {', '.join(IMPLEMENTATIONS)}")
        activation = ACTIVATIONS.get(description.activation)
        if activation is None:
            self._problem(name, f"the activation is {description.activation!r}; it must be {', '.join(ACTIVATIONS)}")
        heads = getattr(config, "num_attention_heads", 0)
        if not heads:
            self._problem(name, "the config has no num_attention_heads")
        return activation or "gelu", heads or 1

    def _origins(
        self, policy: type[Policy], name: str, layer: nn.Module, description: Description, heads: tuple[int, int]
    ) -> dict[str, Origin]:
        """heads: of queries, and of keys and values, on all processes."""
        origins: dict[str, Origin] = {}
        for ours, rule in _RULES.items():
            rules = [one for one in getattr(policy, rule)() if self._exists(name, layer, one)]
            parts = [one.n_fused for one in rules]
            fused = {"qkv": 3, "intermediate": 1 + description.gated_mlp}.get(ours, 1)
            if parts not in ([None], [fused], [None] * fused):
                self._problem(
                    name, f"{rule} names {len(rules)} projections that the layer has; a fused layer has {ours} alone"
                )
                continue
            module, _ = owner_of(layer, find(layer, rules[0].weight or "")[0])
            transposed = projection_class(module) == "Conv1D"
            interleaved = heads[0] // _parallel_of(layer).size if rules[0].layout == "interleaved" else None
            shares = (heads[0], heads[1], heads[1]) if ours == "qkv" and len(rules) == 3 else ()
            for kind in self._kinds(name, layer, rules):
                names = tuple(find(layer, getattr(one, kind))[0] for one in rules)
                origins[f"{ours}.{kind}"] = Origin(names, transposed and kind == "weight", interleaved, shares)
        norms = policy.norms()
        if len(norms) != 2:
            self._problem(name, f"norms of {policy.__name__} has {len(norms)} norms; a fused layer has 2")
            return origins
        for ours, norm in zip(_NORMS, [*norms, *policy.head_norms()], strict=False):
            if self._exists(name, layer, norm):
                for kind in self._kinds(name, layer, [norm]):
                    origins[f"{ours}.{kind}"] = Origin((find(layer, getattr(norm, kind))[0],))
        self._check_biases(name, origins)
        return origins

    def _kinds(self, name: str, layer: nn.Module, rules: Sequence[Layer]) -> tuple[str, ...]:
        """Which tensors the rules' modules have: weights, and biases unless all of them lack one."""
        biases = {path: find(layer, path)[1] for one in rules if (path := one.bias) is not None}
        without = [path for path, tensor in biases.items() if tensor is None or tensor is ABSENT]
        if len(without) not in (0, len(rules)):
            self._problem(
                name, f"{without[0]} is None, and others of its product are not; a fused layer has all or none"
            )
        return ("weight",) if without else ("weight", "bias")

    def _check_biases(self, name: str, origins: dict[str, Origin]) -> None:
        for group in (("qkv", "attention_output"), ("intermediate", "output"), ("attention_norm", "mlp_norm")):
            found = [one for one in group if f"{one}.weight" in origins]
            without = [one for one in found if f"{one}.bias" not in origins]
            if without and without != found:
                path = origins[f"{without[0]}.weight"].names[0].removesuffix("weight") + "bias"
                self._problem(name, f"{path} is None; a fused layer has biases in {' and '.join(group)}, or in neither")

    def _exists(self, name: str, layer: nn.Module, rule: Layer) -> bool:
        """Whether the layer has the rule's tensors; they are asked for unless it allows their absence. A bias may be None."""
        for kind in ("weight", "bias"):
            path = getattr(rule, kind)
            if path is None:
                self._problem(name, f"the rule of {rule.weight or rule.bias} names no {kind}")
                return False
            found, tensor = find(layer, path)
            if kind == "bias" and (tensor is None or tensor is ABSENT):  # the latter of an RMSNorm
                continue
            if tensor is ABSENT:
                if not rule.ignore_checker:
                    self._problem(name, missing(layer, path))
                return False
            problems = no_parameter(layer, found, tensor)
            if tensor is None:
                problems = [f"{path} is None; a fused layer needs one"]
            for problem in problems:
                self._problem(name, problem)
            if problems:
                return False
        return True

    def _window(self, policy: type[Policy], name: str, layer: nn.Module) -> int | None:
        """How far from a token the layer attends, None: as far as its mask allows."""
        path = policy.window()
        tokens = None if path is None else find(layer, path)[1]
        if tokens is ABSENT:
            self._problem(name, f"{path} of window does not exist")
        return tokens - 1 if isinstance(tokens, int) else None

    def _check_modules(self, name: str, layer: nn.Module, description: Description) -> None:
        drops = {0.0, description.hidden_dropout, description.attention_dropout}
        for path, module in layer.named_modules():
            where = path or type(layer).__name__
            kind = type(module).__name__
            if path and any(
                _is_foreign(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            ):
                self._problem(name, f"{where} has forward hooks, which nobody would call in a fused layer")
            if any(True for _ in module.buffers(recurse=False)):
                self._problem(name, f"{where} has buffers, for which a fused layer has no place")
            if any(True for _ in module.parameters(recurse=False)) and not _is_plain(module, description):
                norm = "an RMSNorm of transformers" if description.rms_norm else "nn.LayerNorm"
                self._problem(name, f"{where} is a {kind}; it must be an nn.Linear, {norm} or Conv1D")
            if isinstance(module, nn.Dropout) and module.p not in drops:
                self._problem(name, f"{where} drops {module.p}; its policy describes {sorted(drops - {0.0})}")
            eps = getattr(module, "variance_epsilon", module.eps if isinstance(module, nn.LayerNorm) else None)
            if eps not in (None, description.layer_norm_eps):
                self._problem(name, f"{where} has eps {eps}; its policy describes {description.layer_norm_eps}")

    def _layer_config(
        self,
        name: str,
        layer: nn.Module,
        origins: dict[str, Origin],
        description: Description,
        activation: Activation,
        config: Any,
    ) -> LayerConfig | None:
        if "intermediate.weight" not in origins or "mlp_norm.weight" not in origins:
            return None
        wide = origins["intermediate.weight"]
        rows = len(wide.join([layer.get_parameter(one) for one in wide.names]))
        rows *= _parallel_of(layer).size if is_sharded(layer.get_parameter(wide.names[0])) else 1
        size, heads = len(layer.get_parameter(origins["mlp_norm.weight"].names[0])), config.num_attention_heads
        try:
            return LayerConfig(
                size,
                heads,
                rows // (2 if description.gated_mlp else 1),
                hidden_act=activation,
                hidden_dropout_prob=float(description.hidden_dropout),
                attention_probs_dropout_prob=float(description.attention_dropout),
                pre_layer_norm=description.pre_layer_norm,
                layer_norm_eps=description.layer_norm_eps,
                norm="rms_norm" if description.rms_norm else "layer_norm",
                norm_bias="mlp_norm.bias" in origins,
                attention_bias="qkv.bias" in origins or "attention_output.bias" in origins,
                mlp_bias="intermediate.bias" in origins or "output.bias" in origins,
                gated_mlp=description.gated_mlp,
                num_key_value_heads=getattr(config, "num_key_value_heads", None),
                head_dim=getattr(config, "head_dim", None),
                qk_norm="q_norm.weight" in origins,
                norm_before_attention="attention_norm.weight" in origins,
            )
        except UserError as error:
            self._problem(name, str(error))
            return None

    def _check_parameters(self, place: SwapPlace) -> None:
        parameters = dict(place.module.named_parameters(remove_duplicate=False))
        for kind in ("dtype", "device"):
            found = {str(getattr(parameter, kind)) for parameter in parameters.values()}
            if len(found) > 1:
                self._problem(place.name, f"its parameters have {kind}s {', '.join(sorted(found))}; they must be alike")
        if any(parameter.is_meta for parameter in parameters.values()):
            self._problem(place.name, "its parameters are on meta; give them values first")
        with torch.device("meta"):
            fused = FusedTransformerLayer(place.config, True, place.parallel)
        used = set()
        for ours, origin in place.origins.items():
            used |= set(origin.names)
            pieces = origin.split(fused.get_parameter(ours))
            for name, piece in zip(origin.names, pieces, strict=True):
                shape, expected = tuple(parameters[name].shape), tuple(piece.shape)
                if shape != expected:
                    self._problem(place.name, f"{name} is {shape}; a fused layer needs {expected}")
            if len({parameters[name].requires_grad for name in origin.names}) > 1:
                self._problem(place.name, f"{', '.join(origin.names)} must be frozen together or not at all")
        for name, parameter in parameters.items():
            if name not in used:
                self._problem(place.name, f"a fused layer has no place for {name} {tuple(parameter.shape)}")
            if self.uses[id(parameter)] > 1:
                self._problem(place.name, f"{name} is tied to another parameter")

    def _problem(self, where: str, what: str) -> None:
        self.problems[what].append(where)

    def _raise_problems(self) -> None:
        if not self.problems:
            return
        models = shipped_models(lambda family: family.description)
        raise UserError(
            f"{type(self.model).__name__} cannot be swapped:\n"
            + problem_list(self.problems, self.model)
            + "\nsupported: layers of self-attention and "
            f"one MLP, with two norms, of {models}; docs/huggingface.md has the list of options"
        )


def _parallel_of(module: nn.Module) -> TensorParallel:
    """The processes that share the module, by what `shard` made of its projections."""
    return next((one.parallel for one in module.modules() if isinstance(one, Sharded)), ONE_PROCESS)


def _is_plain(module: nn.Module, description: Description) -> bool:
    """Whether the module computes what its class says, and no adapter or quantization changes it."""
    cls = class_before(module)
    if description.rms_norm and cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("RMSNorm"):
        return True
    return cls in (nn.Linear, nn.LayerNorm) or (projection_class(module) == cls.__name__ == "Conv1D")


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is not one of transformers, by which it collects outputs."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")
