"""A model held against what the fused layer computes: how to make each layer, or all that stands against it in one error."""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.errors import UserError
from ....kernels.layers.config import LayerConfig
from ....kernels.ops.attention.attention import AttentionMask
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
from .fused_layer import FusedLayer, FusedTransformerLayer, Origin, build_fused
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
_LARGEST_DIFFERENCE = 1e-9  # of outputs in fp64, relative; another eps or the other GELU makes one of 1e-6 or more


@dataclass(frozen=True)
class SwapPlace:
    """A layer of the model and the fused layer that it becomes. parallel: the processes that share it."""

    name: str
    module: nn.Module
    config: LayerConfig
    description: Description
    origins: dict[str, Origin]
    parallel: TensorParallel
    masks: LayerMasks
    layer_idx: int | None

    def build(self, stock: nn.Module) -> FusedTransformerLayer:
        """The fused layer with the parameters of a layer like `module`."""
        parameters = dict(stock.named_parameters())
        drops = self.description.drops_attention_output
        return build_fused(self.config, drops, self.origins, self.parallel, parameters)


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
            if own and not self.problems:
                self._compare(own[-1])  # the last, because some models scale by the number of the layer
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
        origins = self._origins(policy, name, layer, heads // parallel.size)
        self._check_modules(name, layer, description)
        layer_config = self._layer_config(name, layer, origins, description, activation, heads)
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

    def _origins(self, policy: type[Policy], name: str, layer: nn.Module, heads: int) -> dict[str, Origin]:
        origins: dict[str, Origin] = {}
        for ours, rule in _RULES.items():
            rules = [one for one in getattr(policy, rule)() if self._exists(name, layer, one)]
            parts = [one.n_fused for one in rules]
            if parts != [None] and not (ours == "qkv" and parts in ([3], [None] * 3)):
                self._problem(
                    name, f"{rule} names {len(rules)} projections that the layer has; a fused layer has {ours} alone"
                )
                continue
            module, _ = owner_of(layer, find(layer, rules[0].weight or "")[0])
            transposed = projection_class(module) == "Conv1D"
            interleaved = heads if rules[0].layout == "interleaved" else None
            for kind in ("weight", "bias"):
                names = tuple(find(layer, getattr(one, kind))[0] for one in rules)
                origins[f"{ours}.{kind}"] = Origin(names, transposed and kind == "weight", interleaved)
        norms = policy.norms()
        if len(norms) != 2:
            self._problem(name, f"norms of {policy.__name__} has {len(norms)} LayerNorms; a fused layer has 2")
            return origins
        for ours, norm in zip(("attention_norm", "mlp_norm"), norms, strict=True):
            if self._exists(name, layer, norm):
                origins |= {
                    f"{ours}.{kind}": Origin((find(layer, getattr(norm, kind))[0],)) for kind in ("weight", "bias")
                }
        return origins

    def _exists(self, name: str, layer: nn.Module, rule: Layer) -> bool:
        """Whether the layer has the rule's tensors; they are asked for unless it allows their absence."""
        for kind in ("weight", "bias"):
            path = getattr(rule, kind)
            if path is None:
                self._problem(name, f"the rule of {rule.weight or rule.bias} names no {kind}")
                return False
            found, tensor = find(layer, path)
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
            if any(True for _ in module.parameters(recurse=False)) and not _is_plain(module):
                self._problem(name, f"{where} is a {kind}; it must be an nn.Linear, nn.LayerNorm or Conv1D")
            if isinstance(module, nn.Dropout) and module.p not in drops:
                self._problem(name, f"{where} drops {module.p}; its policy describes {sorted(drops - {0.0})}")
            if isinstance(module, nn.LayerNorm) and module.eps != description.layer_norm_eps:
                self._problem(name, f"{where} has eps {module.eps}; its policy describes {description.layer_norm_eps}")

    def _layer_config(
        self,
        name: str,
        layer: nn.Module,
        origins: dict[str, Origin],
        description: Description,
        activation: Activation,
        heads: int,
    ) -> LayerConfig | None:
        if "output.bias" not in origins or "intermediate.bias" not in origins:
            return None
        wide = layer.get_parameter(origins["intermediate.bias"].names[0])
        try:
            return LayerConfig(
                len(layer.get_parameter(origins["output.bias"].names[0])),
                heads,
                len(wide) * (_parallel_of(layer).size if is_sharded(wide) else 1),
                hidden_act=activation,
                hidden_dropout_prob=float(description.hidden_dropout),
                attention_probs_dropout_prob=float(description.attention_dropout),
                pre_layer_norm=description.pre_layer_norm,
                layer_norm_eps=description.layer_norm_eps,
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

    @torch.no_grad()
    def _compare(self, place: SwapPlace) -> None:
        """Computes a copy of the layer and its fused form in fp64, because a policy or transformers itself may have changed."""
        # Processes that share a layer may have no way to communicate but from their GPUs.
        device = "cpu" if place.parallel.size == 1 else next(place.module.parameters()).device
        place = dataclasses.replace(place, config=dataclasses.replace(place.config, kernels="reference"))
        stock = copy.deepcopy(place.module).to(device, torch.float64).eval()
        for module in stock.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        size = place.config.hidden_size
        x = torch.randn(2, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            expected = type(stock).forward(stock, x)
        except Exception as error:  # of whatever kind: layers that need more are not what the fused layer computes
            self._problem(place.name, f"it does not compute on hidden states alone ({type(error).__name__}: {error})")
            return
        if not isinstance(expected, Tensor):
            self._problem(
                place.name, f"it returns a {type(expected).__name__}, not a tensor as layers of transformers 5"
            )
            return
        found = place.build(stock).eval()(x, AttentionMask(place.description.causal))
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= _LARGEST_DIFFERENCE:
            self._problem(
                place.name,
                f"it computes something else than its policy describes: outputs differ by {difference:.1e} of the largest",
            )

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
            f"one MLP, with biases and two LayerNorms, of {models}; docs/huggingface.md has the list of options"
        )


def _parallel_of(module: nn.Module) -> TensorParallel:
    """The processes that share the module, by what `shard` made of its projections."""
    return next((one.parallel for one in module.modules() if isinstance(one, Sharded)), ONE_PROCESS)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module computes what its class says, and no adapter or quantization changes it."""
    cls = class_before(module)
    return cls in (nn.Linear, nn.LayerNorm) or (projection_class(module) == cls.__name__ == "Conv1D")


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is not one of transformers, by which it collects outputs."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")
