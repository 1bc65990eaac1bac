"""What is trained: the models, their objectives and their data. A model is a folder, and a line in each of the two tables here.

`RECIPES` maps `model.type` to a `Recipe` (see `recipe.py`), `CONFIG_CHECKS` to the rules of a run config that only this model
has. They are built on first access: recipes import torch, and a command that only reads a run config must not wait for that.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ConfigCheck
    from .recipe import Recipe

    RECIPES: Mapping[str, Recipe]
    CONFIG_CHECKS: Mapping[str, ConfigCheck]

__all__ = ["CONFIG_CHECKS", "RECIPES"]


def __getattr__(name: str) -> Any:
    if name == "RECIPES":
        from .bert.recipe import BERT
        from .gpt.recipe import GPT

        return {recipe.name: recipe for recipe in (BERT, GPT)}
    if name == "CONFIG_CHECKS":
        from .bert import checks as bert
        from .gpt import checks as gpt

        return {"bert": bert.faults, "gpt": gpt.faults}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
