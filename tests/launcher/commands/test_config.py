"""`xformer-train config`: show, check and schema."""

import json
import re
from pathlib import Path

import yaml
from helpers.command_line import MINIMAL, invoke

from xformer_train.launcher.config.loading import load_config


def test_config_show_prints_what_loads_back_and_what_set_each_key(runs):
    result = invoke("config", "show", "--config", "run.yaml", "--set", "seed=3")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert next(line for line in lines if line.startswith("seed:")).split() == ["seed:", "3", "#", "--set"]
    assert next(line for line in lines if "max_steps:" in line).split() == ["max_steps:", "10", "#", "run.yaml:1"]
    assert next(line for line in lines if "weight_decay:" in line).split()[-1] == "default"
    Path("again.yaml").write_text(result.stdout)
    assert load_config("again.yaml").config == load_config("run.yaml", ["seed=3"]).config


def test_config_check_says_how_the_batch_is_divided(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = invoke("config", "check", "--config", "run.yaml")
    assert result.stdout == "run.yaml: valid; 8 sequences per step = micro-batch 2 x accumulation 1 x replicas 4\n"
    Path("run.yaml").rename("a\nb.yaml")
    assert invoke("config", "check", "--config", "a\nb.yaml").stdout.startswith("a\\nb.yaml: valid; 8 sequences")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert invoke("config", "check", "--config", "a\nb.yaml").exit_code == 2


def test_config_check_names_each_path_that_is_not_there_and_what_set_it(runs):
    Path("folder").mkdir()
    Path("run.yaml").write_text(
        MINIMAL
        + "tokenizer: {path: none/vocab.txt}\n"
        + "load: {path: none}\n"
        + "data:\n  sources:\n  - {kind: text, path: 'none*.txt'}\n  - {kind: parquet, path: folder}\n"
        + "  validation: {kind: hf, path: ./none}\n"
    )
    result = invoke("config", "check", "--config", "run.yaml")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["run.yaml:2", "tokenizer.path"],
        ["run.yaml:3", "load.path"],
        ["run.yaml:6", "data.sources.0.path"],
        ["run.yaml:7", "data.sources.1.path"],
        ["run.yaml:8", "data.validation.0.path"],
    ]
    Path("run.yaml").write_text(MINIMAL)
    assert (
        "no id of the hub"
        in invoke("config", "check", "--config", "run.yaml", "--set", "model.init_from=./none").stderr
    )
    for there in ("user/model", "bert-base-uncased", "folder"):
        result = invoke("config", "check", "--config", "run.yaml", "--set", f"model.init_from={there}")
        assert result.exit_code == 0, result.output


def test_config_check_warns_of_a_run_directory_that_holds_a_run(runs):
    Path("runs/run/checkpoints").mkdir(parents=True)
    result = invoke("config", "check", "--config", "run.yaml")
    assert result.exit_code == 0
    assert result.stderr.startswith(
        "warning: output folder runs/run already holds a run; continue it with --resume auto"
    )
    assert invoke("config", "check", "--config", "run.yaml", "--job_name", "other").stderr == ""


def test_config_show_and_check_take_the_named_flags(runs):
    shown = invoke("config", "show", "--config", "run.yaml", "--max_steps", "7", "--print-steps", "3").stdout
    assert re.search(r"max_steps: 7 +# --max_steps", shown)
    assert re.search(r"every_steps: 3 +# --print_steps", shown)
    assert invoke("config", "check", "--config", "run.yaml", "--max_seq_length", "4").exit_code == 2


def test_config_schema_is_json_with_meanings():
    schema = json.loads(invoke("config", "schema").stdout)
    assert schema["additionalProperties"] is False
    assert "trust ratio" in schema["$defs"]["OptimizerConfig"]["properties"]["max_coeff"]["description"]


def test_dumped_configs_are_plain_yaml_too(runs):
    shown = yaml.safe_load(invoke("config", "show", "--config", "run.yaml").stdout)
    assert shown["optimizer"]["betas"] == [0.9, 0.999]
