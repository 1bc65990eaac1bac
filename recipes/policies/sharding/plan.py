"""A policy held against a model: every tensor that its rules cut, or everything that is wrong with it, in one error."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ....kernels.errors import UserError
from ....kernels.parallel.sharding import Partition, is_sharded
from ..catalog.layer import Layer
from ..catalog.paths import closest, dotted, first_missing, get, owner_of, split_last
from ..catalog.policy import Policy

Kind = Literal["column", "row", "embedding", "head"]
Block = Literal["attention", "mlp", "vocabulary"]

_RULES: dict[str, tuple[Kind, Block]] = {
    "attn_qkv": ("column", "attention"),
    "attn_out": ("row", "attention"),
    "mlp_in": ("column", "mlp"),
    "mlp_out": ("row", "mlp"),
}
_VOCABULARY_RULES: dict[str, Kind] = {"embeddings": "embedding", "head": "head"}

# What transformers' configs call the numbers of heads of queries, and of keys and values.
_HEADS = (
    "num_attention_heads",
    "num_key_value_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "n_heads",
    "num_heads",
)


@dataclass(frozen=True)
class Projection:
    """A module whose tensors a rule cuts. cuts: partitions by the parameters' names in the model."""

    kind: Kind
    block: Block
    module: nn.Module
    cuts: dict[str, Partition]
    replace: Any


@dataclass(frozen=True)
class Place:
    """A layer of the model, and what its policy does to it. holder: the module that has the queries' projection."""

    policy: type[Policy]
    name: str
    module: nn.Module
    config: Any
    projections: list[Projection] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    holders: list[nn.Module] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """All that `shard` does to a model."""

    places: list[Place]
    vocabulary: list[Projection]
    replaced_modules: list[tuple[nn.Module, Any]]

    @property
    def projections(self) -> list[Projection]:
        return [projection for place in self.places for projection in place.projections] + self.vocabulary


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, a linear layer whose weight is stored (in, out)."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def make_plan(model: nn.Module, policies: Sequence[type[Policy]], size: int) -> Plan:
    """What the policies cut of the model for `size` processes.

    Raises one ValueError for all that is wrong: rules that match nothing, tensors that no process can have its share of, large
    matrices that no rule names. It ends with the sizes that would do.
    """
    return _Planner(model, size).plan(policies)


class _Planner:
    def __init__(self, model: nn.Module, size: int) -> None:
        self.model, self.size = model, size
        self.problems: dict[str, list[str]] = defaultdict(list)  # where each was found
        self.counts: list[int] = []  # what all processes must be able to share
        self.names: dict[int, list[str]] = defaultdict(list)  # of each parameter
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names[id(parameter)].append(name)

    def plan(self, policies: Sequence[type[Policy]]) -> Plan:
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            raise UserError(f"this {type(self.model).__name__} is sharded already; shard a model once")
        places = [place for policy in policies for place in self._places(policy)]
        plan = Plan(
            [self._fill(place) for place in places],
            # Policies of one model, as of its encoder and its decoder, may name the same.
            list({id(one.module): one for policy in policies for one in self._vocabulary(policy)}.values()),
            [pair for policy in policies for pair in self._replaced_modules(policy)],
        )
        self._check_ties(plan)
        self._raise_problems()
        return plan

    def _places(self, policy: type[Policy]) -> list[Place]:
        cls = policy.original_layer_class()
        found = [
            Place(policy, name, module, config_of(self.model, name))
            for name, module in self.model.named_modules()
            if isinstance(module, cls)
        ]
        if not found:
            self._problem(policy.__name__, f"the model has no {cls.__name__}, to whose layers the policy applies")
        return found

    def _fill(self, place: Place) -> Place:
        for rule, (kind, block) in _RULES.items():
            for layer in getattr(place.policy, rule)():
                projection = self._projection(place, kind, block, layer)
                if projection is None:
                    continue
                place.projections.append(projection)
                if rule == "attn_qkv" and layer.weight is not None:
                    holder, _ = split_last(split_last(layer.weight)[0])
                    module = get(place.module, holder) if holder else place.module
                    if all(module is not other for other in place.holders):
                        place.holders.append(module)
        if not any(one.cuts for one in place.projections):
            self._problem(place.name, f"no rule of {place.policy.__name__} finds a tensor in it")
        self._fill_arguments(place)
        self._check_heads(place)
        self._check_whole_parameters(place)
        return place

    def _projection(self, place: Place, kind: Kind, block: Block, layer: Layer) -> Projection | None:
        paths = [path for path in (layer.weight, layer.bias) if path is not None]
        missing = [path for path in paths if first_missing(place.module, path) is not None]
        if missing:
            if not layer.ignore_checker:
                for path in missing:
                    self._problem(place.name, f"{path} does not exist{closest(place.module, path)}")
            return None
        tensors = {path: get(place.module, path) for path in paths}
        # A None stands where the layer was built without that tensor.
        present = {path: tensor for path, tensor in tensors.items() if tensor is not None}
        if not present:
            return None
        module, _ = owner_of(place.module, next(iter(present)))
        self._check_module(place, kind, layer, module)
        cuts = {}
        for path, tensor in present.items():
            is_bias = path == layer.bias
            if is_bias and kind == "row":
                continue  # added once, behind the sum
            dim = 0 if is_bias else int(bool(layer.reversed)) ^ int(kind == "row")
            if tensor.dim() != (1 if is_bias else 2):
                self._problem(place.name, f"{path} is {tuple(tensor.shape)}; a weight must have 2 dims and a bias 1")
                continue
            parts = self._parts(place, layer, path, tensor, dim)
            cuts[_join(place.name, dotted(path))] = Partition(dim, parts)
        return Projection(kind, block, module, cuts, layer.replace)

    def _check_module(self, place: Place, kind: Kind, layer: Layer, module: nn.Module) -> None:
        path, _ = split_last(layer.weight or layer.bias or "")
        name = type(module).__name__
        stored_reversed = {nn.Linear: False, nn.Embedding: True}
        expected = next((value for cls, value in stored_reversed.items() if isinstance(module, cls)), None)
        expected = True if is_conv1d(module) else expected
        if expected is not None and bool(layer.reversed) != expected:
            self._problem(place.name, f"{path} is a {name}, which takes reversed={expected}, not {layer.reversed}")
        if layer.weight is not None and layer.bias is None and getattr(module, "bias", None) is not None:
            self._problem(place.name, f"{path} has a bias, which its rule does not name")
        if layer.replace is not None:
            return
        if isinstance(module, nn.Embedding):
            if kind == "row":
                self._problem(place.name, f"{path} is an Embedding, whose rows no process can have a share of here")
        elif not is_conv1d(module) and (
            not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward
        ):
            self._problem(place.name, f"{path} is a {name}, not an nn.Linear or a Conv1D; give its rule a replace")

    def _parts(self, place: Place, layer: Layer, path: str, tensor: Tensor, dim: int) -> tuple[int, ...] | None:
        """Sizes of the fused parts along the dim, None for one part."""
        length = tensor.shape[dim]
        if layer.parts is not None:
            parts = tuple(layer.parts(place.config) if callable(layer.parts) else layer.parts)
        elif layer.n_fused and layer.layout == "concat":
            parts = (length // layer.n_fused,) * layer.n_fused
        else:
            parts = (length,)
        if sum(parts) != length:
            self._problem(
                place.name, f"{path} is {length} along dim {dim}, its fused parts {list(parts)} add up to {sum(parts)}"
            )
            return None
        for part in sorted(set(parts)):
            self._share(place.name, part, f"{path} is {part} along dim {dim}" + (" a part" if len(parts) > 1 else ""))
        return parts if len(parts) > 1 else None

    def _fill_arguments(self, place: Place) -> None:
        whole = place.policy.replace_arguments(place.config, 1)
        for path, value in place.policy.replace_arguments(place.config, self.size).items():
            missing = first_missing(place.module, path)
            if missing is not None:
                if missing not in self._optional(place):
                    self._problem(place.name, f"{path} of replace_arguments does not exist")
                continue
            place.arguments[path] = value
            full, found = whole.get(path), get(place.module, path)
            if found != full:
                self._problem(
                    place.name, f"replace_arguments gives {full} for {path} on 1 process; the model has {found}"
                )
            elif isinstance(full, int) and value != full:
                self._share(place.name, full, f"{path} is {full}")

    def _optional(self, place: Place) -> set[str]:
        """Beginnings of paths at which nothing stands, and a rule allows it."""
        missing = (
            first_missing(place.module, path)
            for rule in _RULES
            for layer in getattr(place.policy, rule)()
            if layer.ignore_checker
            for path in (layer.weight, layer.bias)
            if path is not None
        )
        return {prefix for prefix in missing if prefix is not None}

    def _check_heads(self, place: Place) -> None:
        if not any(one.block == "attention" for one in place.projections):
            return
        numbers = {name: getattr(place.config, name, None) for name in _HEADS}
        for count in sorted({value for value in numbers.values() if isinstance(value, int) and value > 0}):
            name = next(name for name, value in numbers.items() if value == count)
            self._share(place.name, count, f"{count} heads ({name} of the config)")

    def _check_whole_parameters(self, place: Place) -> None:
        for path in place.policy.shared_by_heads():
            if first_missing(place.module, path) is not None:
                self._problem(place.name, f"{path} of shared_by_heads does not exist{closest(place.module, path)}")
        cut = {name for one in place.projections for name in one.cuts}
        parameters = {_join(place.name, name): parameter for name, parameter in place.module.named_parameters()}
        smallest = min((parameters[name].numel() for name in cut if parameters[name].dim() > 1), default=math.inf)
        stays = [dotted(path) for path in (*place.policy.replicated(), *place.policy.shared_by_heads())]
        for name, parameter in place.module.named_parameters():
            if _join(place.name, name) in cut or parameter.dim() < 2 or parameter.numel() < smallest:
                continue
            if not any(f"{name}.".startswith(f"{path}.") for path in stays):
                shape = tuple(parameter.shape)
                self._problem(place.name, f"{name} {shape} is as large as what is cut, and no rule names it")

    def _vocabulary(self, policy: type[Policy]) -> Iterator[Projection]:
        for rule, kind in _VOCABULARY_RULES.items():
            for layer in getattr(policy, rule)():
                end = f".{dotted(layer.weight or '')}"
                found = [name for names in self.names.values() for name in names if f".{name}".endswith(end)]
                if not found and not layer.ignore_checker:
                    self._problem(policy.__name__, f"{rule}: the model has no parameter that ends in {layer.weight}")
                for name in found:
                    owner, own_name = split_last(name)
                    module = self.model.get_submodule(owner)
                    expected = nn.Embedding if kind == "embedding" else nn.Linear
                    if not isinstance(module, expected) or own_name != "weight":
                        self._problem(policy.__name__, f"{rule}: {name} is not the weight of an nn.{expected.__name__}")
                        continue
                    names = [f"{owner}.{own}" for own, tensor in module.named_parameters(recurse=False)]
                    yield Projection(kind, "vocabulary", module, dict.fromkeys(names, Partition(0)), layer.replace)

    def _replaced_modules(self, policy: type[Policy]) -> Iterator[tuple[nn.Module, Any]]:
        for name, replacement in policy.replace_modules().items():
            classes = ((module, type(module)) for module in self.model.modules())
            found = [one for one, cls in classes if name in (cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}")]
            if not found:
                self._problem(policy.__name__, f"replace_modules: the model has no module of class {name}")
            yield from ((module, replacement) for module in found)

    def _check_ties(self, plan: Plan) -> None:
        """A parameter that several projections share is cut in all of them, and alike."""
        cuts: dict[str, Partition] = {}
        for one in plan.projections:
            cuts.update(one.cuts)
        for names in self.names.values():
            for name in names:
                module = self.model.get_submodule(split_last(name)[0])
                if not isinstance(module, (nn.Linear, nn.Embedding)):
                    continue
                other = next((one for one in names if one in cuts and cuts[one] != cuts.get(name)), None)
                if other is not None:
                    self._problem(name, f"it is tied to {other}, which is cut otherwise; give both a rule, or neither")

    def _share(self, where: str, count: int, what: str) -> None:
        self.counts.append(count)
        if count % self.size:
            self._problem(where, f"{what}, not divisible by {self.size}")

    def _problem(self, where: str, what: str) -> None:
        self.problems[what].append(where)

    def _raise_problems(self) -> None:
        if not self.problems:
            return
        common = functools.reduce(math.gcd, self.counts, 0)
        sizes = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
        raise UserError(
            f"{type(self.model).__name__} cannot be sharded over {self.size} processes by its policy:\n"
            + problem_list(self.problems, self.model)
            + f"\nvalid tensor-parallel sizes: {sizes or 'any'}"
        )


def problem_list(problems: Mapping[str, list[str]], model: nn.Module) -> str:
    """A line for each problem, with the first of the places that have it, and how many more there are."""
    lines = []
    for what, places in problems.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"- {places[0] or type(model).__name__}{more}: {what}")
    return "\n".join(lines)


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if name else path


def config_of(model: nn.Module, name: str) -> Any:
    """The config that a layer of the model was built from: its own, a module's inside it, or that of what encloses it."""
    steps = name.split(".") if name else []
    enclosing = [model.get_submodule(".".join(steps[:count])) for count in range(len(steps), -1, -1)]
    for module in (*enclosing[0].modules(), *enclosing):
        if hasattr(module, "config"):
            return module.config
    return None
