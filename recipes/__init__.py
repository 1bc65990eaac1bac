"""What is trained: the BERT and GPT models, their objective and their data.

`RECIPES` maps `model.type` to a `Recipe` (see `recipe.py`). It is built on first access, because the models import torch
and a command that only reads a run config must not wait for that.
"""

from typing import Any

__all__ = ["RECIPES"]


def __getattr__(name: str) -> Any:
    if name == "RECIPES":
        from .bert.recipe import RECIPE as BERT
        from .gpt.recipe import RECIPE as GPT

        return {"bert": BERT, "gpt": GPT}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
