"""Checkpoints and folders that are whole by their checksums and hold something else: one sentence, and nothing executed."""

import json
import os
import shutil

import pytest
import torch
from helpers.checkpoints import bare_checkpoint, changed_state
from helpers.runs import BERT, write_config
from safetensors.torch import load_file

from xformer_train.kernels.errors import UserError
from xformer_train.launcher.checkpoint import store
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet
from xformer_train.launcher.trained_models.export import export
from xformer_train.launcher.trained_models.pretrained import from_checkpoint, from_folder

quiet(debug=False)

from xformer_train.launcher.training.train import run  # noqa: E402 - DeepSpeed is quiet only when told before

MODEL, OPTIMIZER, RANDOM = "mp_rank_00_model_states.pt", "*optim_states.pt", "rng_replica0.pt"


class Evil:
    """What a pickle of it would do if it were executed: make the file `executed` in the current folder."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run at ZeRO stage 1 and its export."""
    folder = tmp_path_factory.mktemp("hostile")
    zero = {"zero_optimization": {"stage": 1}}
    path = write_config(folder, BERT, training__max_steps=1, deepspeed=zero)
    run(load_config(path), resume=False)
    export(newest(folder), folder / "exported", force=False)
    return folder


def newest(folder):
    checkpoints = folder / "runs" / "run" / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip()


def one_line(error):
    return "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, RANDOM])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02junk",
        b"PK\x03\x04" + bytes(100),
        [],
        None,
        7,
        {},
        torch.zeros(3),
        {"module": None},
        {"optimizer_state_dict": {"base_optimizer_state": 3}, "module": {"x": torch.zeros(1)}},
        Evil(),
    ],
    ids=["empty", "junk", "zip", "list", "none", "number", "no keys", "tensor", "no module", "other keys", "code"],
)
def test_a_file_of_a_checkpoint_with_other_contents_is_refused(root, tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "runs", tmp_path / "runs")
    checkpoint = newest(tmp_path)
    [path] = checkpoint.glob(name)
    with changed_state(checkpoint):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError) as error:
        run(load_config(root / "run.yaml", [f"output_dir={tmp_path}/runs", "training.max_steps=1"]), resume=True)
    assert one_line(error)
    if name == OPTIMIZER:  # in fp32 the weights themselves are there
        with pytest.raises(UserError) as error:
            from_checkpoint(checkpoint)
        assert one_line(error)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"},
        {"step": -1},
        {"step": 2**63},
        {"step": True},
        {"samples": []},
        {"model": None},
        {"engine": []},
        {"engine": {"zero_stage": 0, "world_size": 0, "tensor_parallel": 1, "precision": "fp32"}},
        {"engine": {"zero_stage": 0, "world_size": 3, "tensor_parallel": 2, "precision": "fp32"}},
        {"partitions": {"a": 3}},
        {"files": [1]},
        {"files": {"../x": {"bytes": 1, "sha256": ""}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
        {"files": {"a": {"bytes": 1}}},
        {"files": {"a": None}},
        {"saved_at": 3},
        {"saved_at": "yesterday"},
    ],
    ids=str,
)
def test_a_forged_state_is_no_checkpoint(tmp_path, change):
    checkpoint = bare_checkpoint(tmp_path, "a", 1)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sha256"]
    (checkpoint / "state.json").write_text(store.sealed({**state, **change}))
    assert store.problems_of(checkpoint) == ["state.json says what no save of this project writes"]
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        store.read_state(checkpoint)
    assert [entry.state for entry in store.entries(tmp_path)] == [None]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "x"},
        {"hidden_size": -1},
        {"hidden_size": 10**30},
        {"num_hidden_layers": 10**12},
        {"num_attention_heads": 0},
        {"vocab_size": []},
        {"hidden_act": {}},
        {"layer_norm_eps": None},
    ],
    ids=str,
)
def test_a_config_json_with_other_values_is_refused(root, tmp_path, changes):
    folder = tmp_path / "model"
    shutil.copytree(root / "exported", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=str(folder)) as error:
        from_folder(folder)
    assert one_line(error)


@pytest.mark.parametrize(
    "kind", ["list", "none", "code", "ints", "meta", "small", "int keys", "nested", "empty", "junk"]
)
def test_weights_that_are_none_are_refused(root, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(root / "exported", folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    content = {
        "list": [],
        "none": None,
        "code": Evil(),
        "ints": {name: weight.long() for name, weight in weights.items()},
        "meta": {name: weight.to("meta") for name, weight in weights.items()},
        "small": {name: torch.zeros(1) for name in weights},
        "int keys": {1: torch.zeros(2)},
        "nested": {"state_dict": weights},
        "empty": b"",
        "junk": b"\x80\x02junk",
    }[kind]
    path = folder / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=str(folder)) as error:
        from_folder(folder)
    assert one_line(error)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"[" * 100_000, b"\xff", b'{"a":' + b"9" * 5000 + b"}"])
def test_a_file_of_a_folder_with_other_contents_is_refused(root, tmp_path, name, content):
    folder = tmp_path / "model"
    shutil.copytree(root / "exported", folder)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=str(folder)) as error:
        from_folder(folder)
    assert one_line(error)
