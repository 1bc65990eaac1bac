"""Writes docs/config.md, the reference of all keys of a run config, from the schema. Run it after a change of the schema."""

import json
from pathlib import Path
from typing import Any

from xformer_train.launcher.config.schema import RunConfig

PAGE = Path(__file__).parent.parent / "docs" / "config.md"
INTRODUCTION = """\
# Run config: all keys

Written by `python scripts/config_reference.py` from `recipes/config.py`, and `schema.py` and `optimizers.py` of
`launcher/config`; do not edit.

A run config is a YAML file (or JSON, if its name ends in `.json`) with the sections below. What it leaves out has the
default. `--set section.key=value` changes a key on the command line (value in YAML, list items by number:
`--set data.sources.0.path=text.txt`), and the named flags of `xformer-train --help` come last. Floats such as `11e-3` are
numbers. Of `training.max_steps`, `num_epochs`, `max_tokens` and `max_hours`, one that is given later in this order replaces
another, and so it is with `schedule.warmup_steps` and `schedule.warmup_proportion`. A file holds at most 10,000 values with its
YAML aliases written out, nested at most 64 deep, and whole numbers of at most 64 bits.

`xformer-train config show --config FILE` prints every key with what set it, `config check` says what is wrong with it, and
`config schema` prints a JSON Schema. Editors that use the YAML language server complete keys and mark mistakes by it: write it
to a file once, `xformer-train config schema > run.schema.json`, and begin a run config beside that file with the line

    # yaml-language-server: $schema=run.schema.json

In every path `~` is the home folder, and a relative path starts at the current folder, wherever the run config is. One file is
looked for in a second place: `deepspeed` beside the run config, before the current folder where the run config names it, and
after it where the command line does.
"""
SOURCES = """\
## data.sources, data.validation

A list of mappings with these keys; one mapping stands for a list of one.
"""
PHASES = """\
A list of mappings with these keys, in the order of their steps. What a phase gives holds from there on, until a later one
changes it.
"""
BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
}
WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "boolean",
    "null": "null",
    "object": "mapping",
}


def render() -> str:
    """The text of docs/config.md."""
    schema = RunConfig.model_json_schema()
    top, sections = [], []
    for name, field in schema["properties"].items():
        if "$ref" in field:
            sections.append((name, field["description"], _definition(schema, field)))
        elif name == "phases":
            sections.append((name, f"{field['description']}\n\n{PHASES}".strip(), _phase(schema)))
        else:
            top.append((name, field))
    source = schema["$defs"]["SourceConfig"]
    parts = [INTRODUCTION, "## Top level\n", _table(top, [])]
    for name, meaning, section in sections:
        parts += [f"## {name}\n\n{meaning}\n", _table(section["properties"].items(), section.get("required", []))]
        if name == "data":
            parts += [SOURCES, _table(source["properties"].items(), source["required"])]
    return "\n".join(parts)


def _phase(schema: dict[str, Any]) -> dict[str, Any]:
    """The keys of a phase, with those of its sections by their dotted names, but for the schedule."""
    fields = {}
    for name, field in schema["$defs"]["PhaseConfig"]["properties"].items():
        if name == "schedule":
            fields[name] = {"type": "object", "default": None, "description": field["description"]}
        elif "$ref" in field:
            inner = _definition(schema, field)["properties"]
            fields |= {f"{name}.{key}": {**one, "default": None} for key, one in inner.items()}
        else:
            fields[name] = field
    return {"properties": fields}


def _definition(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][field["$ref"].rpartition("/")[2]]


def _table(fields: Any, required: list[str]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields:
        default = "required" if name in required else f"`{json.dumps(field['default'])}`"
        meaning = " ".join(field.get("description", "").split())
        rows.append(f"| `{name}` | {_type(field)} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(member) for member in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return "source"
    bounds = " ".join(text.format(field[key]) for key, text in BOUNDS.items() if key in field)
    if field["type"] == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: {_type(field['prefixItems'][0])}"
        word, _, bounds = _type(field["items"]).partition(" ")
        return f"list of {word}s {bounds}".strip()
    return f"{WORDS[field['type']]} {bounds}".strip()


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
