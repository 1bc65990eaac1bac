"""A policy held against a model: every tensor that its rules cut, or everything that is wrong with it, in one error."""

import functools
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ....kernels.errors import UserError
from ....kernels.parallel.sharding import Partition, is_sharded
from ..catalog.layer import Layer
from ..catalog.lookup import Policies, resolve_policies
from ..catalog.paths import ABSENT, find, join, missing, owner_of
from ..catalog.policy import Policy
from ..catalog.tp_plan import PolicyOfPlan
from .modules import projection_class

Kind = Literal["column", "row", "tensors", "embedding", "head"]
"""tensors: cut as a column-parallel projection's, in a module that computes on with what it has of them."""
Block = Literal["attention", "mlp", "vocabulary"]

_RULES: dict[str, tuple[Kind, Block]] = {
    "attn_qkv": ("column", "attention"),
    "attn_out": ("row", "attention"),
    "mlp_in": ("column", "mlp"),
    "mlp_out": ("row", "mlp"),
}
_REVERSED = {"Linear": False, "QuantLinear": False, "Conv1D": True}  # which projections are stored (in, out)
_VOCABULARY_RULES: dict[str, Kind] = {"embeddings": "embedding", "head": "head"}

# What transformers' configs and modules call the numbers of heads of queries, and of keys and values.
_HEADS = (
    "num_attention_heads",
    "num_key_value_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "n_heads",
    "num_heads",
    "n_head",
    "num_attn_heads",
)


@dataclass(frozen=True)
class Projection:
    """A module whose tensors a rule cuts. path: below the layer; cuts: partitions by the parameters' names in the model."""

    kind: Kind
    block: Block
    path: str
    module: nn.Module
    cuts: dict[str, Partition]
    replace: Any


@dataclass(frozen=True)
class Place:
    """A layer of the model, and what its policy does to it. arguments: attributes by their dotted paths."""

    policy: type[Policy]
    name: str
    module: nn.Module
    config: Any
    projections: list[Projection] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def holders(self) -> dict[str, nn.Module]:
        """The modules that hold projections to queries, keys and values, by their paths below the layer."""
        columns = (one for one in self.projections if one.block == "attention" and one.kind == "column")
        return {path: self.module.get_submodule(path) for path in (one.path.rpartition(".")[0] for one in columns)}


@dataclass(frozen=True)
class Plan:
    """All that `shard` does to a model. notes: what its user should know of it, a line each; "" if nothing."""

    places: list[Place]
    vocabulary: list[Projection]
    replaced_modules: list[tuple[nn.Module, Any]]
    notes: str

    @property
    def projections(self) -> list[Projection]:
        return [projection for place in self.places for projection in place.projections] + self.vocabulary

    def warn(self) -> None:
        if self.notes:
            warnings.warn(f"what the policy of this model leaves open:\n{self.notes}", stacklevel=3)


def make_plan(model: nn.Module, policy: Policies, size: int) -> Plan:
    """What the policies, or those of the model, cut of it for `size` processes.

    Raises one ValueError for all that is wrong: rules that match nothing, tensors that no process can have its share of, large
    matrices beside those that are cut. It ends with the sizes that would do.
    """
    policies, planner = resolve_policies(model, policy), _Planner(model, size)
    if policy is None and isinstance(policies[0], PolicyOfPlan):
        planner.notes["no policy is shipped for it; it is cut by the tensor-parallel plan of its config"].append("")
    return planner.plan(policies)


class _Planner:
    def __init__(self, model: nn.Module, size: int) -> None:
        self.model, self.size = model, size
        self.problems: dict[str, list[str]] = defaultdict(list)  # where each was found
        self.notes: dict[str, list[str]] = defaultdict(list)
        self.counts: list[int] = []  # what all processes must be able to share
        self.names: dict[int, list[str]] = defaultdict(list)  # of each parameter
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names[id(parameter)].append(name)

    def plan(self, policies: Sequence[type[Policy]]) -> Plan:
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            raise UserError(f"this {type(self.model).__name__} is sharded already; shard a model once")
        places = [self._fill(place) for policy in policies for place in self._places(policy)]
        # Policies of one model, as of its encoder and its decoder, may name the same.
        vocabulary = {id(one.module): one for policy in policies for one in self._vocabulary(policy)}
        replaced = [pair for policy in policies for pair in self._replaced_modules(policy)]
        self._check_whole_parameters(places)
        plan = Plan(places, list(vocabulary.values()), replaced, problem_list(self.notes, self.model))
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
            found = (self._projection(place, kind, block, layer) for layer in getattr(place.policy, rule)())
            place.projections.extend(one for one in found if one is not None)
        if not any(one.cuts for one in place.projections):
            self._problem(place.name, f"no rule of {place.policy.__name__} finds a tensor in it")
        for block in ("attention", "mlp"):
            kinds = {one.kind for one in place.projections if one.block == block}
            if "column" in kinds and "row" not in kinds:
                self._problem(
                    place.name, f"its {block} has a projection that is cut, and none out of it that joins the parts"
                )
        self._fill_arguments(place)
        if any(one.block == "attention" for one in place.projections):
            for count, name in sorted(self._heads(place.config).items()):
                self._share(place.name, count, f"{count} heads ({name} of the config)")
        return place

    def _projection(self, place: Place, kind: Kind, block: Block, layer: Layer) -> Projection | None:
        tensors: dict[str, tuple[str, Any]] = {}
        problems = []
        for own, given in (("weight", layer.weight), ("bias", layer.bias)):
            name, tensor = ("", None) if given is None else find(place.module, given)
            if tensor is not None and tensor is not ABSENT:  # None: the layer was built without that tensor
                tensors[own] = name, tensor
                problems += no_parameter(place.module, name, tensor)
            elif tensor is ABSENT and not layer.ignore_checker:
                problems.append(missing(place.module, given or ""))
        for problem in problems:
            self._problem(place.name, problem)
        if problems or not tensors:
            return None
        path = next(name.rpartition(".")[0] for name, _ in tensors.values())
        module = place.module.get_submodule(path)
        stored = isinstance(module, nn.Embedding) or _REVERSED.get(projection_class(module) or "")  # None: not known
        if isinstance(module, nn.Embedding) or ("weight" not in tensors and stored is None):
            kind = "tensors"
        if "weight" in tensors and kind == "column" and getattr(module, "bias", None) is not None:
            tensors["bias"] = join(path, "bias"), module.bias  # whether its rule names it or not
        what = f"{path} is a {type(module).__name__}"
        if kind != "tensors" and stored is not None and layer.reversed not in (None, stored):
            self._problem(place.name, f"{what}, which takes reversed={stored}, not {layer.reversed}")
        if kind != "tensors" and stored is None and layer.replace is None:
            self._problem(place.name, f"{what}, not an nn.Linear or a Conv1D; give its rule a replace")
        cuts = {}
        for own, (name, tensor) in tensors.items():
            if own == "bias" and kind == "row":
                continue  # added once, behind the sum
            reversed = bool(layer.reversed if stored is None else stored)
            dim = 0 if own == "bias" else int(reversed) ^ int(kind == "row")
            if tensor.dim() != (1 if own == "bias" else 2):
                self._problem(place.name, f"{name} is {tuple(tensor.shape)}; a weight must have 2 dims and a bias 1")
                continue
            cuts[join(place.name, name)] = Partition(dim, self._parts(place, layer, name, tensor, dim))
        return Projection(kind, block, path, module, cuts, layer.replace)

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
        optional, whole = self._optional(place), place.policy.replace_arguments(place.config, 1)
        dead = []
        for path, value in place.policy.replace_arguments(place.config, self.size).items():
            name, found = find(place.module, path)
            if found is ABSENT:
                dead += [path] if name not in optional else []
                continue
            place.arguments[name] = value
            full = whole.get(path)
            if found != full:
                self._problem(
                    place.name, f"replace_arguments gives {full} for {path} on 1 process; the model has {found}"
                )
            elif isinstance(full, int) and value != full:
                self._share(place.name, full, f"{path} is {full}")
        for path in place.policy.divided():
            name, found = find(place.module, path)
            if found is not ABSENT:
                place.arguments[name] = found // self.size
                self._share(place.name, found, f"{path} is {found}")
            elif name not in optional:
                self._problem(place.name, f"{path} of divided does not exist")
        if dead:
            counts, left = self._heads(place.config), ""
            for path, module in place.holders.items():
                whole_ones = (one for one in _HEADS if getattr(module, one, None) in counts)
                left = next((name for one in whole_ones if (name := join(path, one)) not in place.arguments), left)
            for path in dead:
                what = f"{path} of replace_arguments does not exist"
                if left:
                    self._problem(place.name, f"{what}, and {left} stays as it is")
                else:
                    self.notes[f"{what}; it is left out"].append(place.name)

    def _optional(self, place: Place) -> set[str]:
        """Beginnings of paths at which nothing stands, and a rule allows it."""
        rules = [layer for rule in _RULES for layer in getattr(place.policy, rule)() if layer.ignore_checker]
        found = [find(place.module, path) for layer in rules for path in (layer.weight, layer.bias) if path is not None]
        return {name for name, tensor in found if tensor is ABSENT}

    def _heads(self, config: Any) -> dict[int, str]:
        """The numbers of heads in the config, each with one of its names."""
        found = {getattr(config, name, None): name for name in reversed(_HEADS)}
        return {count: name for count, name in found.items() if isinstance(count, int) and count > 0}

    def _check_whole_parameters(self, places: Sequence[Place]) -> None:
        """Matrices in no rule, as large as those in one: beside these they would compute with whole heads."""
        cut = {name for place in places for one in place.projections for name in one.cuts}
        for place in places:
            for path in place.policy.shared_by_heads():
                if find(place.module, path)[1] is ABSENT:
                    self._problem(place.name, f"shared_by_heads: {missing(place.module, path)}")
            beside = {one.path.rpartition(".")[0] for one in place.projections if one.kind != "tensors"}
            if not beside:
                continue
            parameters = dict(place.module.named_parameters())
            sizes = (one.numel() for name, one in parameters.items() if join(place.name, name) in cut and one.dim() > 1)
            smallest = min(sizes, default=math.inf)
            stays = [*place.policy.replicated(), *place.policy.shared_by_heads()]
            stays = [find(place.module, path)[0] + "." for path in stays]
            for name, parameter in parameters.items():
                named = join(place.name, name) in cut or f"{name}.".startswith(tuple(stays))
                if named or parameter.dim() < 2 or parameter.numel() < smallest:
                    continue
                what = f"{name} {tuple(parameter.shape)} is as large as what is cut, and no rule names it"
                if name.rpartition(".")[0].rpartition(".")[0] in beside:
                    self._problem(place.name, what)
                else:
                    self.notes[f"{what}; it stays whole on every process"].append(place.name)

    def _vocabulary(self, policy: type[Policy]) -> Iterator[Projection]:
        for rule, kind in _VOCABULARY_RULES.items():
            for layer in getattr(policy, rule)():
                end = f".{layer.weight or ''}"
                found = [name for names in self.names.values() for name in names if f".{name}".endswith(end)]
                if not found and not layer.ignore_checker:
                    self._problem(policy.__name__, f"{rule}: the model has no parameter that ends in {layer.weight}")
                for name in found:
                    owner, _, own_name = name.rpartition(".")
                    module = self.model.get_submodule(owner)
                    expected = nn.Embedding if kind == "embedding" else nn.Linear
                    if not isinstance(module, expected) or own_name != "weight":
                        self._problem(policy.__name__, f"{rule}: {name} is not the weight of an nn.{expected.__name__}")
                        continue
                    names = (one for tensor in module.parameters(recurse=False) for one in self.names[id(tensor)])
                    own = (one for one in names if self.model.get_submodule(one.rpartition(".")[0]) is module)
                    yield Projection(kind, "vocabulary", owner, module, dict.fromkeys(own, Partition(0)), layer.replace)

    def _replaced_modules(self, policy: type[Policy]) -> Iterator[tuple[nn.Module, Any]]:
        for name, replacement in policy.replace_modules().items():
            classes = ((module, type(module)) for module in self.model.modules())
            found = [one for one, cls in classes if name in (cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}")]
            untaken = {argument for one in found for argument in _untaken_arguments(type(one), replacement)}
            if not found:
                self.notes[f"replace_modules: the model has no module of class {name}"].append(policy.__name__)
            elif untaken:
                what = f"{replacement.__name__} takes no {', '.join(sorted(untaken))}, as {name} does; it is left out"
                self.notes[f"replace_modules: {what}"].append(policy.__name__)
            else:
                yield from ((module, replacement) for module in found)

    def _check_ties(self, plan: Plan) -> None:
        """A parameter that several projections share is cut in all of them, and alike."""
        cuts: dict[str, Partition] = {}
        for one in plan.projections:
            cuts.update(one.cuts)
        for names in self.names.values():
            for name in names:
                module = self.model.get_submodule(name.rpartition(".")[0])
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


def _untaken_arguments(cls: Any, replacement: Any) -> set[str]:
    """Arguments of a class's forward that its replacement's does not take: that was written for another version."""
    ours, theirs = (inspect.signature(one.forward).parameters for one in (cls, replacement))
    if any(one.kind is one.VAR_KEYWORD for one in theirs.values()):
        return set()
    return {name for name, one in ours.items() if name not in theirs and one.kind is not one.VAR_POSITIONAL}


def problem_list(problems: Mapping[str, list[str]], model: nn.Module) -> str:
    """A line for each problem, with the first of the places that have it, and how many more there are."""
    lines = []
    for what, places in problems.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"- {places[0] or type(model).__name__}{more}: {what}")
    return "\n".join(lines)


def no_parameter(layer: nn.Module, name: str, tensor: Any) -> list[str]:
    """What is wrong with a rule for the tensor, which it is if that is no parameter of its own; none: nothing."""
    owner, own_name = owner_of(layer, name)
    if getattr(owner, "_parameters", {}).get(own_name) is tensor:
        return []
    return [
        f"{name} is no parameter of its {type(owner).__name__}; a rule must not name a buffer, and adapters, pruning, weight "
        f"norm and quantization must be taken off the model or merged first"
    ]


def config_of(model: nn.Module, name: str) -> Any:
    """The config that a layer of the model was built from: its own, a module's inside it, or that of what encloses it."""
    steps = name.split(".") if name else []
    enclosing = [model.get_submodule(".".join(steps[:count])) for count in range(len(steps), -1, -1)]
    for module in (*enclosing[0].modules(), *enclosing):
        if hasattr(module, "config"):
            return module.config
    return None
