"""The types that the values of a state.json have. No torch."""

from datetime import datetime
from pathlib import Path
from typing import Any

_COUNTS = (
    *("step", "samples", "position", "phase_start", "phase_start_samples", "best_step"),
    *("tokens", "phase_start_tokens", "train_batch_size", "schedule_start"),
)
_TIMES = ("elapsed_s", "phase_start_s")
_ENGINE_COUNTS = {"zero_stage": 0, "world_size": 1, "tensor_parallel": 1}


def is_ours(state: dict[str, Any]) -> bool:
    """Return whether the values of a state.json have the types that a save gives them: its seal anyone can compute."""
    run, files, partitions = state["engine"], state["files"], state["partitions"]
    return (
        all(_is_count(state.get(key, 0)) for key in _COUNTS)
        and all(_is_number(state.get(key, 0)) and state.get(key, 0) >= 0 for key in _TIMES)
        and (state.get("schedule_steps") is None or _is_count(state["schedule_steps"]))
        and all(state.get(key) is None or _is_number(state[key]) for key in ("best_loss", "max_hours"))
        and _is_guard(state.get("guard", {}))
        and isinstance(state.get("phases", []), list)
        and all(map(_is_phase, state.get("phases", [])))
        and isinstance(state["model"], dict)
        and isinstance(run, dict)
        and all(_is_count(run.get(key), least) for key, least in _ENGINE_COUNTS.items())
        and run["world_size"] % run["tensor_parallel"] == 0
        and isinstance(run.get("precision"), str)
        and isinstance(partitions, dict)
        and all(isinstance(cut, list) and len(cut) == 2 and _is_count(cut[0]) for cut in partitions.values())
        and isinstance(files, dict)
        and all(_is_inside(name) and _is_record(entry) for name, entry in files.items())
        and _is_time(state["saved_at"])
    )


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_guard(value: Any) -> bool:
    """Return whether a value is such as the numerics guard writes."""
    return (
        isinstance(value, dict)
        and all(_is_count(value.get(key, 0)) for key in ("skipped_in_a_row", "rollbacks"))
        and isinstance(value.get("losses", []), list)
        and all(map(_is_number, value.get("losses", [])))
        and isinstance(value.get("in_spike", False), bool)
    )


def _is_phase(value: Any) -> bool:
    """Return whether a value is such as `Phases.begun` gives it."""
    whole = isinstance(value, dict) and _is_count(value.get("first"), 1) and isinstance(value.get("changes"), dict)
    data = value["changes"].get("data", {}) if whole else None
    return isinstance(data, dict) and _is_count(data.get("max_seq_length", 1), 1)


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and path.parts != () and ".." not in path.parts


def _is_record(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} and _is_count(entry["bytes"])


def _is_time(text: Any) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False
