"""The configs that ship: each parses, resolves, and says what it is meant to say."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.config.batch import solve_batch
from xformer_train.launcher.config.deepspeed import deepspeed_config
from xformer_train.launcher.config.loading import dump_config, load_config
from xformer_train.recipes import RECIPES

CONFIGS = Path(__file__).parents[3] / "configs"
DEEPSPEED_FILE = "deepspeed_bsz32K_lamb_config_seq512.json"
RUN_CONFIGS = sorted(path.name for path in CONFIGS.iterdir() if path.name != DEEPSPEED_FILE)


def test_the_promised_configs_ship():
    promised = {
        "bert_base.yaml",
        "bert_large_lamb.json",
        "bert_large_seq128.yaml",
        "bert_large_seq512.yaml",
        "bert_tiny.yaml",
        "gpt2_medium.yaml",
        "gpt2_small.yaml",
        "gpt_tiny.yaml",
        "llama_135m.yaml",
        "llama_tiny.yaml",
        "modernbert_base.yaml",
        "modernbert_tiny.yaml",
    }
    assert promised <= set(RUN_CONFIGS)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_each_config_resolves_for_one_and_for_several_processes(name, world_size):
    config = load_config(CONFIGS / name, world_size=world_size).config
    assert config.name == Path(name).stem
    batch = solve_batch(config.training, world_size)
    for precision in ("fp32", "bf16", "fp16"):
        assert deepspeed_config(config, batch, precision)["train_batch_size"] == batch.train_batch_size


@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_each_config_can_be_dumped_and_loaded(name, tmp_path):
    config = load_config(CONFIGS / name).config
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml").config == config


@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_each_config_says_what_kind_and_size_of_model_it_is(name):
    config = load_config(CONFIGS / name).config
    given = yaml.safe_load((CONFIGS / name).read_text())
    assert {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"} <= given["model"].keys()
    model = config.model
    if model.position_embedding == "rope":
        assert model.gated_mlp
        assert model.hidden_act == {"bert": "gelu", "gpt": "silu"}[model.type]
        assert not (model.norm_bias or model.attention_bias or model.mlp_bias)
        return
    assert model.intermediate_size == 4 * model.hidden_size
    if model.type == "gpt":
        assert (model.hidden_act, model.layer_norm_eps) == ("gelu_tanh", 1e-5)


@pytest.mark.parametrize(("name", "number"), [("modernbert_base.yaml", 149_655_232), ("llama_135m.yaml", 134_515_008)])
def test_a_published_model_has_its_number_of_parameters(name, number):
    config = load_config(CONFIGS / name).config
    with torch.device("meta"):
        recipe, rows = RECIPES[config.model.type], config.tokenizer.vocab_size
        model = recipe.build_model(config.model, config.layer, config.objective, rows)
    assert sum(parameter.numel() for parameter in model.parameters()) == number


@pytest.mark.parametrize("name", ["bert_tiny.yaml", "gpt_tiny.yaml", "modernbert_tiny.yaml", "llama_tiny.yaml"])
def test_the_tiny_configs_need_no_download_and_no_gpu(name):
    config = load_config(CONFIGS / name).config
    assert [source.kind for source in config.data.sources] == ["builtin"]
    assert config.data.validation_fraction > 0
    assert config.training.precision == "fp32"


def test_phase_2_continues_phase_1():
    first = load_config(CONFIGS / "bert_large_seq128.yaml").config
    second = load_config(CONFIGS / "bert_large_seq512.yaml").config
    assert second.model == first.model
    assert second.tokenizer == first.tokenizer
    assert (second.load.path, second.load.rewarmup) == (f"{first.output_dir}/{first.name}", True)
    assert second.optimizer.model_dump(exclude={"lr"}) == first.optimizer.model_dump(exclude={"lr"})
    assert (first.optimizer.lr, first.schedule.lr_offset) == (0.011, 0.001)
    assert (second.optimizer.lr, second.schedule.lr_offset) == (0.002, 0.0)
    assert (first.schedule.type, second.schedule.type) == ("EE", "EE")


def test_the_json_for_the_tutorial_is_phase_2_without_what_its_flags_say():
    phase_2 = load_config(CONFIGS / "bert_large_seq512.yaml").config.model_dump()
    tutorial = load_config(CONFIGS / "bert_large_lamb.json").config.model_dump()
    same = phase_2.keys() - {"name", "load", "layer", "deepspeed"}
    assert {key: tutorial[key] for key in same} == {key: phase_2[key] for key in same}


def test_the_command_of_the_tutorial_runs_as_it_stands(monkeypatch):
    """The DeepSpeed transformer-kernel tutorial's arguments, from inside configs/, with its two variables set."""
    arguments = (
        "--local_rank=0 --cf bert_large_lamb.json --max_seq_length 512 --print_steps 100 --deepspeed "
        f"--deepspeed_transformer_kernel --deepspeed_config {DEEPSPEED_FILE} --rewarmup --lr_schedule EE --lr_offset 0.0 "
        "--attention_dropout_checkpoint --load_training_checkpoint ../saved_models/phase1 --load_checkpoint_id epoch150_"
    )
    runs = []
    train = types.ModuleType("xformer_train.launcher.training.train")
    train.run = lambda loaded, **_: runs.append(loaded)
    monkeypatch.setitem(sys.modules, train.__name__, train)
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.chdir(CONFIGS)
    result = CliRunner().invoke(cli.app, arguments.split())
    assert result.exit_code == 0, result.output
    config = runs[0].config
    assert config.data.max_seq_length == 512
    assert config.logging.every_steps == 100
    assert config.load.model_dump() == {
        "path": "../saved_models/phase1",
        "id": "epoch150_",
        "what": "all",
        "rewarmup": True,
        "decay": False,
    }
    assert (config.schedule.type, config.schedule.lr_offset) == ("EE", 0.0)
    assert config.layer.attn_dropout_checkpoint
    assert not config.layer.gelu_checkpoint
    assert config.optimizer.type == "lamb"
    batch = solve_batch(config.training, 64)
    assert (batch.train_batch_size, batch.micro_batch_size, batch.gradient_accumulation_steps) == (32768, 16, 32)
    result = deepspeed_config(config, batch, "fp16", runs[0].origins)
    assert result["fp16"] == {"enabled": True, "loss_scale": 0}
    assert result["prescale_gradients"] is False
    assert runs[0].origins["deepspeed.train_batch_size"] == f"{DEEPSPEED_FILE}:2"


def test_the_deepspeed_file_is_plain_json():
    assert json.loads((CONFIGS / DEEPSPEED_FILE).read_text())["train_batch_size"] == 32768
