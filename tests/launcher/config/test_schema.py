import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from xformer_train.launcher.config.schema import RunConfig

REPOSITORY = Path(__file__).parents[3]
MINIMAL = "training: {max_steps: 10, train_batch_size: 8}\n"


def test_a_config_is_frozen_with_all_its_sections():
    config = RunConfig()
    for section, key, value in (
        (config, "seed", 1),
        (config.model, "hidden_size", 1),
        (config.training, "max_steps", 1),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, value)


def test_a_whole_number_is_a_float_and_nothing_else_is_converted():
    assert RunConfig.model_validate({"optimizer": {"lr": 1}}).optimizer.lr == 1.0
    for tree in ({"seed": "1"}, {"seed": 1.0}, {"name": 1}, {"layer": {"unpad": 1}}, {"optimizer": {"lr": "1"}}):
        with pytest.raises(ValidationError):
            RunConfig.model_validate(tree)


def test_the_schema_of_editors_accepts_each_documented_form_of_a_list_of_sources():
    schema = RunConfig.model_json_schema()
    for key, more in (("sources", []), ("validation", [{"type": "null"}])):
        one, many, *others = schema["$defs"]["DataConfig"]["properties"][key]["anyOf"]
        assert one == {"$ref": "#/$defs/SourceConfig"}
        assert many == {"type": "array", "items": one, "minItems": 1}
        assert others == more


def test_every_key_of_the_schema_says_what_it_means():
    schema = RunConfig.model_json_schema()
    for name, section in {"run config": schema, **schema["$defs"]}.items():
        for key, field in section["properties"].items():
            assert field.get("description", "").endswith("."), f"{name}: {key}"


def test_loading_imports_neither_torch_nor_deepspeed(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL)
    code = (
        "import sys; from xformer_train.launcher.config.loading import load_config; load_config('run.yaml');"
        "print([m for m in ('torch', 'deepspeed', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_config_reference_is_up_to_date():
    path = REPOSITORY / "docs" / "config.md"
    code = f"import runpy; print(runpy.run_path({str(REPOSITORY / 'scripts' / 'config_reference.py')!r})['render'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == path.read_text(encoding="utf-8"), "run python scripts/config_reference.py"
