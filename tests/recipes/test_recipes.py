"""A model is a folder: the tables name every model of the schema, and no other file asks for a model by its name."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from xformer_train.recipes import CONFIG_CHECKS, RECIPES
from xformer_train.recipes.config import ModelConfig

ROOT = Path(__file__).parents[2]
MODELS = get_args(ModelConfig.model_fields["type"].annotation)


def test_every_model_of_the_schema_has_a_recipe_of_its_name_and_checks():
    assert [recipe.name for recipe in RECIPES.values()] == list(RECIPES) == list(CONFIG_CHECKS) == list(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_named_in_its_folder_the_schema_and_the_tables_alone(model):
    named = re.compile(f"[\"']{model}[\"']")
    files = {
        str(path.relative_to(ROOT / "recipes")) if room == "recipes" else str(path)
        for room in ("launcher", "recipes")
        for path in (ROOT / room).rglob("*.py")
        if named.search(path.read_text(encoding="utf-8"))
    }
    assert {file for file in files if not file.startswith(f"{model}/")} <= {"__init__.py", "config.py"}


def test_what_an_architecture_of_transformers_says_of_a_model_belongs_to_its_recipe():
    for name, recipe in RECIPES.items():
        assert all(architecture.fixed["type"] == name for architecture in recipe.transformers.architectures)
        assert set(recipe.tokenizer.needed) <= set(recipe.tokenizer.specials)


def test_the_rules_of_a_model_import_no_torch():
    program = (
        "import sys; from xformer_train.recipes import CONFIG_CHECKS; print(CONFIG_CHECKS, 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).endswith(" False\n")
