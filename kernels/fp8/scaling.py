"""FP8 recipes, the regions in which they hold, and the scales that delayed scaling keeps from step to step.

An FP8 number is q = cast(clamp(x * scale, -max, max)), and q / scale stands for x. With amax = max |x|, current scaling takes
scale = max / amax from the tensor itself; delayed scaling takes it from the amaxes of earlier steps:
  history[0] = amax of this step;  scale = max / amax(history) / 2**margin;  history = roll(history, -1);  history[0] = 0
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.region import active_region, in_regions, open_regions
from ..ops.replay import at_end_of_backward, remembered, will_have_gradients

_SLOTS = ("input", "weight", "grad_output")
_FIELDS = ("scale", "amax_history", "updates")  # of an Fp8State in a state dict


class Format(Enum):
    """E4M3: 3 bits of mantissa, up to 448. E5M2: 2 bits, up to 57344. HYBRID: E4M3, and E5M2 for gradients of outputs."""

    E4M3 = "E4M3"
    E5M2 = "E5M2"
    HYBRID = "HYBRID"


@dataclass(frozen=True)
class Float8CurrentScaling:
    """Each tensor's scale comes from its own amax, read before the cast: nothing to keep, nothing stale.

    override_linear_precision: which of (forward product, input's gradient, weight's gradient) stay in high precision; only
    (False, False, False) and (False, False, True) exist. Raises ValueError for other values and for Format.E5M2.
    """

    fp8_format: Format = Format.HYBRID
    override_linear_precision: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        _check_products(self.fp8_format, self.override_linear_precision)
        object.__setattr__(self, "override_linear_precision", tuple(self.override_linear_precision))


@dataclass(frozen=True)
class DelayedScaling:
    """Scales come from the amaxes of the last `amax_history_len` steps, so a tensor is cast in the pass that reads its amax.

    margin: the scale is divided by 2**margin. interval: steps from one computation of the scale to the next, the first step
    included. amax_compute_algo: `max` over the history, `most_recent`, or a function (history (L, n)) -> amax (n,).
    scaling_factor_compute_algo: a function (amax (n,), scale (n,), largest FP8 number, recipe) -> scale (n,), or None for
    largest / amax / 2**margin. Where amax is zero, infinite or NaN the scale stays; an infinite scale becomes fp32's maximum.
    reduce_amax: take the maximum over fp8_autocast's group. override_linear_precision: as in Float8CurrentScaling.
    Raises ValueError for values that do not exist, naming the field.
    """

    margin: int = 0
    interval: int = 1
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1
    amax_compute_algo: Literal["max", "most_recent"] | Callable[[Tensor], Tensor] = "most_recent"
    scaling_factor_compute_algo: Callable[[Tensor, Tensor, float, "DelayedScaling"], Tensor] | None = None
    reduce_amax: bool = True
    override_linear_precision: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        for name, least in (("margin", 0), ("interval", 1), ("amax_history_len", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
        if self.amax_compute_algo not in ("max", "most_recent") and not callable(self.amax_compute_algo):
            raise ValueError(
                f"amax_compute_algo is {self.amax_compute_algo!r}; it must be 'max', 'most_recent' or a function"
            )
        if self.scaling_factor_compute_algo is not None and not callable(self.scaling_factor_compute_algo):
            raise ValueError(
                f"scaling_factor_compute_algo is {self.scaling_factor_compute_algo!r}; it must be a function or None"
            )
        _check_products(self.fp8_format, self.override_linear_precision)
        object.__setattr__(self, "override_linear_precision", tuple(self.override_linear_precision))


Recipe = Float8CurrentScaling | DelayedScaling


def _check_products(fp8_format: Format, override: tuple[bool, bool, bool]) -> None:
    if fp8_format not in (Format.E4M3, Format.HYBRID):
        raise ValueError(
            f"fp8_format is {fp8_format}; it must be Format.HYBRID or Format.E4M3, as E5M2 is too coarse for activations"
        )
    if tuple(override) not in ((False, False, False), (False, False, True)):
        raise ValueError(
            f"override_linear_precision is {override!r}; it must be (False, False, False) or (False, False, True), as only "
            f"the weight's gradient can stay in high precision"
        )


def forward_dtype(recipe: Recipe) -> torch.dtype:
    """Return the FP8 type of activations and weights."""
    return torch.float8_e4m3fn


def backward_dtype(recipe: Recipe) -> torch.dtype:
    """Return the FP8 type of gradients of outputs."""
    return torch.float8_e5m2 if recipe.fp8_format is Format.HYBRID else torch.float8_e4m3fn


@dataclass(frozen=True)
class Region:
    """One `with fp8_autocast(...)` that is open."""

    enabled: bool
    calibrating: bool
    recipe: Recipe
    group: Any
    step: "_Step"


@contextmanager
def fp8_autocast(
    enabled: bool = True, calibrating: bool = False, fp8_recipe: Recipe | None = None, fp8_group: Any = None
) -> Iterator[None]:
    """Give the forward passes of this thread inside FP8 products, and their backward passes, which may run after it.

    enabled: False gives high precision, also inside an enabled region: the innermost one decides.
    calibrating: with enabled=False, forward passes record the amaxes of a DelayedScaling recipe and run in high precision.
    fp8_recipe: None is Float8CurrentScaling(). fp8_group: the process group over which amaxes are reduced; None is all.
    The scales of delayed scaling change when the outermost region ends: not after an exception, nor under torch.no_grad(),
    so that an evaluation leaves them alone. Those of gradients change when the backward pass ends.
    Other threads are outside, as with torch.autocast.
    """
    if not isinstance(calibrating, bool):
        raise ValueError(
            f"calibrating is {calibrating!r}; it must be True or False, and the recipe is named fp8_recipe"
        )
    recipe = Float8CurrentScaling() if fp8_recipe is None else fp8_recipe
    if not isinstance(recipe, Float8CurrentScaling | DelayedScaling):
        raise ValueError(f"fp8_recipe is {recipe!r}; it must be a DelayedScaling or a Float8CurrentScaling")
    outside = open_regions()
    step = outside[0].step if outside else _Step()
    with in_regions((*outside, Region(enabled, calibrating, recipe, fp8_group, step))):
        yield
    if not outside:
        step.finish_forward()


def is_fp8_enabled() -> bool:
    """Return whether a forward pass that starts here has FP8 products. A recomputation has them if its first pass had."""
    region = active_region()
    return region is not None and region.enabled


@dataclass
class _Slot:
    """Delayed scaling of one tensor. scale: (), amax_history: (L,), both fp32; row 0 is zero between steps."""

    scale: Tensor
    amax_history: Tensor
    updates: int

    def fit(self, length: int, device: torch.device) -> None:
        """Move to the device, and to another length; the newest amaxes, which stand at the end, are kept."""
        if self.scale.device != device:
            self.scale, self.amax_history = self.scale.to(device), self.amax_history.to(device)
        old = len(self.amax_history)
        if old != length:
            kept = min(old, length) - 1
            history = self.amax_history.new_zeros(length)
            history[length - kept :] = self.amax_history[old - kept :]
            self.amax_history = history


@dataclass
class Use:
    """A linear layer in one outermost region: the scales that its first pass took, which a recomputation takes again.

    kept_weight_scale: of the FP8 weight that it took from an earlier micro-batch in place of casting it.
    """

    region: Region
    slots: dict[str, _Slot]
    scales: dict[str, Tensor]
    amaxes: dict[str, Tensor] = field(default_factory=dict)
    kept_weight_scale: Tensor | None = None

    @property
    def recipe(self) -> Recipe:
        return self.region.recipe

    def scale(self, name: str) -> Tensor | None:
        """Return the scale of input or weight in this step, or of grad_output now; None with current scaling."""
        if name == "grad_output" and name in self.slots:
            return self.slots[name].scale
        return self.scales.get(name)

    def record(self, name: str, amax: Tensor) -> None:
        """Record an amax, (), for the update at the end of the pass. A recomputation's amaxes were recorded before."""
        step = self.region.step
        if not self.slots or (step.closed and name != "grad_output"):
            return
        known = self.amaxes.get(name)
        self.amaxes[name] = amax if known is None else torch.maximum(known, amax)
        if name == "grad_output":
            step.finish_backward_later()


class _Step:
    """What the layers of one outermost region recorded.

    closed: the region ended. counted: and the scales of its forward pass were updated.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.closed = False
        self.counted = False
        self._queued = False

    def finish_forward(self) -> None:
        """Update the scales of inputs and weights."""
        self.closed = True
        self.counted = will_have_gradients()
        if self.counted and self.uses:
            _update(self.uses, ("input", "weight"), forward_dtype)
        for use in self.uses:
            use.amaxes.clear()

    def finish_backward_later(self) -> None:
        """Have the scales of gradients updated at the end of the backward pass that is running."""
        if not self._queued:
            self._queued = True
            at_end_of_backward(self._finish_backward)

    def _finish_backward(self) -> None:
        self._queued = False
        _update(self.uses, ("grad_output",), backward_dtype)


def _update(uses: Iterable[Use], names: tuple[str, ...], fp8_dtype: Callable[[Recipe], torch.dtype]) -> None:
    """Update the slots with a recorded amax, all of one recipe, group and device together."""
    batches: dict[Any, tuple[Region, list[tuple[_Slot, Tensor]]]] = {}
    for use in uses:
        for name in names:
            amax = use.amaxes.pop(name, None)
            if amax is not None:
                region = use.region
                key = region.recipe, id(region.group), amax.device
                batches.setdefault(key, (region, []))[1].append((use.slots[name], amax))
    for region, batch in batches.values():
        assert isinstance(region.recipe, DelayedScaling)  # the only recipe with slots
        amaxes = torch.stack([amax for _, amax in batch])
        if region.recipe.reduce_amax:
            amaxes = _group_maximum(amaxes, region.group)
        fp8_max = torch.finfo(fp8_dtype(region.recipe)).max
        _advance([slot for slot, _ in batch], amaxes, region.recipe, fp8_max)


def _group_maximum(amaxes: Tensor, group: Any) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return amaxes
    # Which operand wins against NaN depends on the order, so ranks could disagree. Both keep the old scale.
    amaxes = amaxes.nan_to_num(nan=math.inf, posinf=math.inf)
    torch.distributed.all_reduce(amaxes, torch.distributed.ReduceOp.MAX, group)
    return amaxes


def _advance(slots: list[_Slot], amaxes: Tensor, recipe: DelayedScaling, fp8_max: float) -> None:
    """Take one step of the formula above for slots whose amaxes (n,) are new."""
    history = torch.stack([slot.amax_history for slot in slots], dim=1)  # (L, n)
    history[0] = amaxes
    scales = _new_scales(history, torch.stack([slot.scale for slot in slots]), recipe, fp8_max)
    history = history.roll(-1, 0)
    history[0] = 0
    for slot, column, scale in zip(slots, history.unbind(1), scales.unbind(), strict=True):
        slot.amax_history = column
        if slot.updates % recipe.interval == 0:
            slot.scale = scale
        slot.updates += 1


def _new_scales(history: Tensor, old: Tensor, recipe: DelayedScaling, fp8_max: float) -> Tensor:
    if callable(recipe.amax_compute_algo):
        amax = recipe.amax_compute_algo(history)
    else:
        amax = history.amax(0) if recipe.amax_compute_algo == "max" else history[0]
    if recipe.scaling_factor_compute_algo is not None:
        return recipe.scaling_factor_compute_algo(amax, old, fp8_max, recipe)
    scales = divided(fp8_max, amax) / 2**recipe.margin
    return torch.where((amax > 0) & amax.isfinite(), scales, old).clamp(max=torch.finfo(torch.float32).max)


def divided(number: float, by: Tensor) -> Tensor:
    """Return number / by, rounded once; torch's own operator multiplies by the rounded reciprocal."""
    return torch.full_like(by, number) / by


class Fp8State(nn.Module):
    """FP8 state of one linear layer, which owns it as a submodule so that it follows the layer through state dicts.

    In the state dict, only after DelayedScaling was used: scale (3,), amax_history (L, 3), both fp32, and updates (3,), int64,
    for input, weight and gradient of the output. Without them loading starts afresh. Casts of the layer leave them fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight_cache: Any = None
        """kernels/fp8/linear.py keeps the FP8 weight of a first micro-batch here."""
        self._slots: dict[str, _Slot] = {}
        self._last_use: Use | None = None

    def begin(self, device: torch.device) -> Use | None:
        """Return the scales and histories for a forward pass that starts now, None where it computes in high precision."""
        return remembered(self, lambda: self._begin(device))

    def _begin(self, device: torch.device) -> Use | None:
        region, last = active_region(), self._last_use
        # torch gives no public way to ask; torch.utils.checkpoint asks in the same way.
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and last is not None and (region is None or last.region.step.counted):
            return last  # a recomputation; one whose first pass was not counted, being without gradients, counts itself
        if region is None or not (region.enabled or region.calibrating):
            self._last_use = None
            return None
        if last is None or last.region != region:
            slots = self._slots_on(device, region.recipe)
            scales = {name: slot.scale for name, slot in slots.items()}
            self._last_use = last = Use(region, slots, scales)
            region.step.uses.append(last)
        return last

    def _slots_on(self, device: torch.device, recipe: Recipe) -> dict[str, _Slot]:
        if not isinstance(recipe, DelayedScaling):
            return {}
        length = recipe.amax_history_len
        if not self._slots:
            self._slots = {
                name: _Slot(torch.ones((), device=device), torch.zeros(length, device=device), 0) for name in _SLOTS
            }
        for slot in self._slots.values():
            slot.fit(length, device)
        return self._slots

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8State":
        self.weight_cache = None
        for slot in self._slots.values():
            slot.fit(len(slot.amax_history), fn(slot.scale.new_empty(0)).device)
        if any(slot.scale.is_meta for slot in self._slots.values()):
            self._slots = {}  # the values are gone
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._slots:
            slots = [self._slots[name] for name in _SLOTS]
            destination[f"{prefix}scale"] = torch.stack([slot.scale for slot in slots])
            destination[f"{prefix}amax_history"] = torch.stack([slot.amax_history for slot in slots], dim=1)
            destination[f"{prefix}updates"] = torch.tensor([slot.updates for slot in slots])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, _: Any, __: bool, ___: Any, ____: Any, error_msgs: list[str]
    ) -> None:
        self.weight_cache = self._last_use = None
        self._slots = {}
        found = {name: state_dict[prefix + name] for name in _FIELDS if prefix + name in state_dict}
        if not found:
            return
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in found.items()}
        length = (shapes.get("amax_history") or (0,))[0]
        if length == 0 or shapes != {"scale": (3,), "amax_history": (length, 3), "updates": (3,)}:
            error_msgs.append(
                f"{prefix.rstrip('.')} has an FP8 state of the shapes {shapes}, must have scale (3,), amax_history (L, 3) and "
                "updates (3,); remove these keys to start it afresh"
            )
            return
        scale, history, updates = (found[name] for name in _FIELDS)
        self._slots = {
            name: _Slot(scale[i].float().clone(), history[:, i].float().clone(), int(updates[i]))
            for i, name in enumerate(_SLOTS)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last pass, with its process group, and the cached weight out of copies."""
        return self.__dict__ | {"_last_use": None, "weight_cache": None}
