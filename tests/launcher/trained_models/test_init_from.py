"""model.init_from: what is taken from a Hugging Face model, what stays new, what is refused."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from distributed.workers.runs import runs_worker
from helpers.runs import BERT, GPT, LLAMA, MODERNBERT, write_config
from helpers.spawn import free_port, run_processes
from safetensors.torch import load_file, save_file

from xformer_train.launcher.checkpoint import loading
from xformer_train.launcher.config.loading import ConfigError, load_config
from xformer_train.launcher.processes.topology import quiet
from xformer_train.launcher.trained_models.export import export
from xformer_train.launcher.trained_models.init_from import find_folder, with_rows
from xformer_train.launcher.trained_models.pretrained import from_checkpoint, from_folder

quiet(debug=False)

from xformer_train.launcher.training.train import run  # noqa: E402 - DeepSpeed is quiet only when told before

STILL = {  # a step that moves no weight by more than 1e-9
    "optimizer__lr": 1e-9,
    "optimizer__weight_decay": 0.0,
    "training__max_steps": 1,
    "training__micro_batch_size": None,
    "schedule": {"type": "constant"},
    "tokenizer__type": "auto",
    "tokenizer__vocab_size": 300,
}
KINDS = {"bert": BERT, "gpt": GPT, "modernbert": MODERNBERT, "llama": LLAMA}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def newest(run_folder):
    return run_folder / "checkpoints" / (run_folder / "checkpoints" / "latest").read_text().strip()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Exports of models of each kind, and runs that started from them, alone and shared by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: write_config(folder, base, **STILL, name=name) for name, base in KINDS.items()}
    started = []
    for name, path in configs.items():
        run(load_config(path, ["seed=7", "model.initializer_range=0.3"]), resume=False)
        export(newest(folder / "runs" / name), folder / f"{name}-exported", force=False)
        first = f"model.init_from={folder / name}-exported"
        started += [(path, [f"name={name}{size}", first, f"parallel.tensor={size}"], False) for size in (1, 2)]
    for size in (1, 2):
        runs = [(*each, free_port()) for each in started if each[1][-1].endswith(str(size))]
        printed = run_processes(runs_worker, size, size, runs)[0]
        for (_, sets, _, _), text in zip(runs, printed, strict=True):
            (folder / f"{sets[0].removeprefix('name=')}.printed").write_text(text)
    return folder


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_run_from_an_export_has_the_logits_of_the_exported_run(root, kind, size):
    first, second = (from_checkpoint(newest(root / "runs" / name)) for name in (kind, f"{kind}{size}"))
    assert second.tokenizer.equals(first.tokenizer)
    ids = torch.randint(5, first.tokenizer.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    logits = [
        (model.logits if first.model.type == "gpt" else model.mlm_logits)(model.encode(ids))[
            ..., : first.tokenizer.vocab_size
        ]
        for model in (first.build(), second.build())
    ]
    # one step of 1e-9 lies between them
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    text = " ".join((root / f"{kind}{size}.printed").read_text().split())
    assert f"start from {root / kind}-exported (weights only)" in text
    if kind == "bert":
        name = "sentence_classifier.weight"
        torch.testing.assert_close(second.weights[name], first.weights[name], rtol=0, atol=1e-6)


def test_a_run_resumes_without_the_model_it_started_from(root):
    moved = root / "elsewhere"
    (root / "bert-exported").rename(moved)
    try:
        path = root / "bert.yaml"
        sets = ["name=bert1", f"model.init_from={root}/bert-exported", "training.max_steps=2"]
        run(load_config(path, sets), resume=True)
        assert newest(root / "runs" / "bert1").name == "step00000002"
        run(load_config(path, ["name=bert1", "training.max_steps=3"]), resume=True)  # the key changes no function
    finally:
        moved.rename(root / "bert-exported")


def test_a_head_for_another_sentence_task_stays_new(root, capsys):
    path = root / "bert.yaml"
    first = f"model.init_from={root}/bert-exported"
    run(load_config(path, ["name=sop", first, "objective.sentence_task=sop"]), resume=False)
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "(weights only; new: sentence_classifier; left out: sentence_classifier.weight, sentence_classifier.bias)"
        in text
    )
    before, after = (loading.weights(newest(root / "runs" / name)) for name in ("bert", "sop"))
    torch.testing.assert_close(after["pooler.weight"], before["pooler.weight"], rtol=0, atol=1e-6)
    assert (after["sentence_classifier.weight"] - before["sentence_classifier.weight"]).abs().max() > 0.01


def refused(path, *sets):
    with pytest.raises(ValueError) as error:
        run(load_config(path, ["name=refused", *sets]), resume=False)
    return str(error.value)


def test_a_model_of_another_geometry_is_refused_with_all_keys(root):
    first = f"model.init_from={root}/bert-exported"
    text = refused(
        root / "bert.yaml", first, "model.hidden_size=32", "model.pre_layer_norm=false", "model.layer_norm_eps=1e-5"
    )
    for part in (
        "model.hidden_size is 16 there and 32 in the run config",
        "model.pre_layer_norm is true there and false in the run config",
        "model.layer_norm_eps is 1e-12 there and 1e-05 in the run config",
    ):
        assert part in text
    assert "num_hidden_layers" not in text
    first_llama = f"model.init_from={root}/llama-exported"
    others = ["model.num_key_value_heads=4", "model.rope_theta=5e5", "model.sliding_window=8", "model.qk_norm=false"]
    text = refused(root / "llama.yaml", first_llama, *others, "model.tie_word_embeddings=true", "model.head_dim=4")
    for part in (
        "model.num_key_value_heads is 2 there and 4 in the run config",
        "model.rope_theta is 10000.0 there and 500000.0 in the run config",
        "model.sliding_window is null there and 8 in the run config",
        "model.qk_norm is true there and false in the run config",
        "model.tie_word_embeddings is false there and true in the run config",
    ):
        assert part in text
    assert "head_dim" not in text  # which says what the run config leaves out
    assert "model.type is bert there and gpt" in refused(root / "gpt.yaml", first)


def test_folders_that_hold_no_model_are_refused(root, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(root / "bert-exported", broken)
    first = f"model.init_from={broken}"
    (broken / "tokenizer.json").unlink()
    assert "holds no tokenizer.json or vocab.txt" in refused(root / "bert.yaml", first)
    other = root / "runs" / "gpt" / "tokenizer"
    text = refused(root / "bert.yaml", f"model.init_from={root}/bert-exported", f"tokenizer.path={other}")
    assert "is another tokenizer than that of model.init_from" in text
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "model.safetensors cannot be read" in refused(root / "bert.yaml", first)
    (broken / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refused(root / "bert.yaml", first)
    (broken / "config.json").unlink()
    assert "has no config.json" in refused(root / "bert.yaml", first)
    assert "is a file; give the folder" in refused(root / "bert.yaml", f"{first}/tokenizer_config.json")
    assert "there is no such folder" in refused(root / "bert.yaml", f"model.init_from={tmp_path}/nowhere/at/all")


def test_damaged_folders_are_refused_by_what_is_wrong(root, tmp_path):
    exported = root / "bert-exported"
    state = load_file(exported / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    query = next(name for name in state if name.endswith("layer.1.attention.self.query.weight"))
    norm, words = "roberta_prelayernorm.LayerNorm.weight", "roberta_prelayernorm.embeddings.word_embeddings.weight"

    def read(weights=state, settings=config, index=None, pickled=None):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / "config.json").write_text(json.dumps(settings))
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(index)
        elif pickled is not None:
            torch.save(pickled, folder / "pytorch_model.bin")
        else:
            save_file(weights, folder / "model.safetensors")
        with pytest.raises(ValueError) as error:
            from_folder(folder)
        assert str(error.value).startswith(str(folder))
        return str(error.value)

    assert "final_norm.weight is (8,), and (16,) by config.json" in read(state | {norm: state[norm][:8].clone()})
    assert "query.weight (16, 8)" in read(state | {query: state[query][:, :8].contiguous()})
    assert "is torch.int8, as quantized weights are" in read(state | {words: state[words].to(torch.int8)})
    assert "query.weight is torch.int8, as quantized weights are" in read(state | {query: state[query].to(torch.int8)})
    assert "config.json is a list, not an object" in read(settings=[config])
    assert "model_type ['bert']" in read(settings=config | {"model_type": ["bert"]})
    assert "hidden_act is {}, not one of gelu, " in read(settings=config | {"hidden_act": {}})
    assert "sentence_task 3; it must be one of nsp, sop, none" in read(settings=config | {"sentence_task": 3})
    assert "pad_token_id is None" in read(settings=config | {"pad_token_id": None})
    assert "max_position_embeddings is None" in read(settings=config | {"max_position_embeddings": None})
    assert "is not divisible by num_attention_heads=3" in read(settings=config | {"num_attention_heads": 3})
    for index in ("{", "{}", "[]"):
        assert "index.json does not say which files hold the weights" in read(index=index)
    assert "pytorch_model.bin holds a list" in read(pickled=[1])


def test_the_tokenizer_of_the_run_may_be_given_too(root):
    """That in the export adds [CLS] and [SEP] to a text, which changes no sample."""
    given = f"tokenizer.path={root}/runs/bert/tokenizer"
    run(load_config(root / "bert.yaml", ["name=given", f"model.init_from={root}/bert-exported", given]), resume=False)
    assert (root / "runs" / "given" / "metrics.jsonl").is_file()


def test_two_places_for_weights_or_tokenizer_are_refused(root):
    with pytest.raises(ConfigError) as error:
        load_config(root / "bert.yaml", ["model.init_from=a/b", "load.path=runs/x", "tokenizer.type=bytes"])
    assert "model.init_from: got 'a/b', but load.path 'runs/x' gives the weights too" in str(error.value)
    assert "tokenizer.type: got 'bytes', but the tokenizer of model.init_from is used" in str(error.value)


def test_a_hub_id_without_a_network_is_refused(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model.init_from=some/model: .* the Hugging Face hub gave no model"):
        find_folder("some/model")


def test_weights_of_transformers_are_read_from_safetensors_and_pickles(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(vocab_size=90, max_position_embeddings=26, **SIZES)
    model = transformers.RobertaForMaskedLM(config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tmp_path / "one" / "config.json", pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    one, *others = (from_folder(tmp_path / name) for name in ("one", "parts", "pickled"))
    assert one.model.max_position_embeddings == 24 and one.tokenizer is None
    for other in others:
        assert other.weights.keys() == one.weights.keys()
        assert all(torch.equal(other.weights[name], one.weights[name]) for name in one.weights)


TODAYS = [("modernbert", True), *((name, tied) for name in ("llama", "mistral", "qwen3") for tied in (False, True))]


@pytest.mark.parametrize(("name", "tied"), TODAYS)
@torch.inference_mode()
def test_todays_models_are_read_as_save_pretrained_writes_them(name, tied, tmp_path):
    pytest.importorskip("transformers")
    from helpers.hf_swap import build, inputs, logits_of

    model = build(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    found = from_folder(tmp_path)
    assert found.left_out == () and found.model.tie_word_embeddings is tied
    given = inputs("left")
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    ours = found.build()
    hidden = ours.encode(ids, attention_mask=mask)
    logits = ours.mlm_logits(hidden) if name == "modernbert" else ours.logits(hidden)
    theirs = logits_of(model(ids, attention_mask=mask.long()))
    torch.testing.assert_close(logits[mask], theirs[mask], rtol=0, atol=1e-5)


def test_a_pickle_that_holds_code_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 90, **SIZES}))
    torch.save({"weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could run any code"):
        from_folder(tmp_path)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file was executed')",)


def test_rows_that_fill_the_vocabulary_up_take_little_of_the_probability():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 8, generator=generator)
    weight[:, 0] -= 5  # all logits of a hidden state along the first axis far below 0, as in GPT-2
    hidden = torch.randn(50, 8, generator=generator) + torch.tensor([9.0] + [0.0] * 7)
    padded = with_rows(weight, 128)
    assert torch.equal(padded[:100], weight)
    assert torch.equal(with_rows(weight, 64), weight[:64])
    taken = (hidden @ padded.T).logsumexp(-1) - (hidden @ weight.T).logsumexp(-1)
    assert taken.max() <= torch.log(torch.tensor(1.28)) + 1e-5
    assert with_rows(torch.arange(4.0), 6).tolist() == [0, 1, 2, 3, 1.5, 1.5]
