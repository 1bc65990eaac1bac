"""Exported runs: transformers loads them and computes, fills masks and generates as the run itself does."""

import json
import shutil

import pytest
import torch
from distributed.workers.runs import runs_worker
from helpers.runs import BERT, GPT, LLAMA, MODERNBERT, write_config
from helpers.spawn import free_port, run_processes
from typer.testing import CliRunner

from xformer_train.launcher.checkpoint.files import read_file
from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.processes.topology import quiet
from xformer_train.launcher.trained_models import model_card
from xformer_train.launcher.trained_models.export import export
from xformer_train.launcher.trained_models.pretrained import from_checkpoint, from_folder, open_pretrained
from xformer_train.launcher.trained_models.sampling import Sampling, fill_mask, sample

transformers = pytest.importorskip("transformers")
PLAIN = "model.qk_norm=false"
GPTS = ("gpt", "shared_gpt", "qwen3", "llama", "mistral", "shared_qwen3")
MODERN = ("modern", "shared_modern")
SHARED = ["parallel.tensor=2", "deepspeed.zero_optimization.stage=2", "model.intermediate_size=32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Short runs with rates high enough that the models say something: of one process, two replicas, two sharers."""
    quiet(debug=False)
    folder = tmp_path_factory.mktemp("runs")
    common = {
        "optimizer__lr": 0.02,
        "training__micro_batch_size": None,
        "training__max_steps": 8,
        "schedule__total_steps": None,
        "data__validation_fraction": 0.2,
        "tokenizer__type": "auto",
        "tokenizer__vocab_size": 300,
    }
    bert = write_config(folder, BERT, **common, name="bert")
    gpt = write_config(folder, GPT, **common, name="gpt")
    modern = write_config(folder, MODERNBERT, **common, name="modern")
    llama = write_config(folder, LLAMA, **common, name="llama")
    alone = [
        (bert, ["name=bert", "checkpoint.save_every_steps=4"], False, free_port()),
        (bert, ["name=post", "model.pre_layer_norm=false"], False, free_port()),
        (bert, ["name=tanh", "model.hidden_act=gelu_tanh", "training.max_steps=2"], False, free_port()),
        (gpt, ["name=gpt"], False, free_port()),
        (gpt, ["name=bf16", "training.precision=bf16"], False, free_port()),
        (modern, ["name=modern"], False, free_port()),
        (llama, ["name=qwen3"], False, free_port()),
        (llama, ["name=llama", PLAIN, "model.tie_word_embeddings=true"], False, free_port()),
        (llama, ["name=mistral", PLAIN, "model.sliding_window=8"], False, free_port()),
        (modern, ["name=modern_sop", "objective.sentence_task=sop", "training.max_steps=2"], False, free_port()),
    ]
    together = [
        (bert, ["name=zero3", "deepspeed.zero_optimization.stage=3"], False, free_port()),
        (gpt, ["name=bf16_zero2", "training.precision=bf16", SHARED[1]], False, free_port()),
        (bert, ["name=shared", "model.pre_layer_norm=false", *SHARED], False, free_port()),
        (gpt, ["name=shared_gpt", *SHARED], False, free_port()),
        (modern, ["name=shared_modern", *SHARED], False, free_port()),
        (llama, ["name=shared_qwen3", *SHARED], False, free_port()),
    ]
    for world_size, runs in ((1, alone), (2, together)):
        printed = run_processes(runs_worker, world_size, world_size, runs)[0]
        failed = [text for text in printed if "finished" not in text]
        assert not failed, "\n".join(failed)
    return folder / "runs"


def newest(run):
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory):
    """A function: the folder of a run's export, and what its checkpoint holds."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def exported(name):
        if name not in done:
            export(newest(root / name), folder / name, force=False)
            done[name] = folder / name, from_checkpoint(newest(root / name))
        return done[name]

    return exported


@pytest.mark.parametrize("name", ["bert", "post", "zero3", "shared", *MODERN])
@torch.inference_mode()
def test_a_bert_gives_its_logits_in_transformers(exported, name):
    folder, trained = exported(name)
    model, tokenizer = trained.build(), transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["te ti ta", "dis"], ["so", "on and on"], padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    assert not mask.all() and len(tokenizer) < trained.model.vocab_size
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder)(**batch).logits
    assert ("token_type_ids" in batch) is (name not in MODERN)
    ours = model.mlm_logits(model.encode(batch["input_ids"], batch.get("token_type_ids"), mask))[..., : len(tokenizer)]
    torch.testing.assert_close(theirs[mask], ours[mask], rtol=0, atol=1e-5)  # fp32, another order of sums


@pytest.mark.parametrize("name", GPTS)
@torch.inference_mode()
def test_a_gpt_gives_its_logits_in_transformers(exported, name):
    folder, trained = exported(name)
    model, tokenizer = trained.build(), transformers.AutoTokenizer.from_pretrained(folder)
    texts = (
        ["some text to read", "more"] if "gpt" not in name else ["some text to read"]
    )  # whose positions count padding
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    mask = batch["attention_mask"].bool()
    assert mask.all() == ("gpt" in name) and mask[:, -1].all()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(**batch).logits
    ours = model.logits(model.encode(batch["input_ids"], attention_mask=mask))[..., : len(tokenizer)]
    torch.testing.assert_close(theirs[mask], ours[mask], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_rotary_bert_with_a_sentence_task_keeps_its_token_types(root):
    trained = from_checkpoint(newest(root / "modern_sop"))
    model, ids = trained.build(), torch.full((1, 7), 9)
    alone, second = (model.mlm_logits(model.encode(ids, torch.full_like(ids, kind))) for kind in (0, 1))
    assert not torch.allclose(alone, second)
    assert fill_mask(model, trained.tokenizer, "a [MASK]", 2)


CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "modern": "ModernBertForMaskedLM",
}


@pytest.mark.parametrize("name", CLASSES)
def test_todays_models_are_loaded_as_their_class_whole_and_in_silence(exported, name, caplog):
    folder, trained = exported(name)
    auto = transformers.AutoModelForMaskedLM if name == "modern" else transformers.AutoModelForCausalLM
    transformers.logging.enable_propagation()
    with caplog.at_level("WARNING"):
        model, told = auto.from_pretrained(folder, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    transformers.logging.disable_propagation()
    assert type(model).__name__ == CLASSES[name] and not any(told.values()), told
    assert not caplog.records, caplog.text
    assert tokenizer("te ti ta")["input_ids"][-1] < trained.tokenizer.vocab_size == model.config.vocab_size
    card = (folder / "README.md").read_text()
    assert f"`{CLASSES[name]}`" in card and "rotary positions" in card
    assert ("a window of 8 tokens but in one of 2 layers" in card) is (name == "modern")
    assert ("a window of 8 tokens |" in card) is (name == "mistral")


@pytest.mark.parametrize("name", ["bert", "post", "shared", "modern"])
@pytest.mark.parametrize("text", ["ta [MASK] tot.", "[MASK]"])
def test_the_fill_mask_pipeline_finds_what_ours_finds(exported, name, text):
    folder, trained = exported(name)
    theirs = transformers.pipeline("fill-mask", model=str(folder), top_k=5)(text)
    (ours,) = fill_mask(trained.build(), trained.tokenizer, text, 5)
    assert [row["token"] for row in theirs] == [candidate.id for candidate in ours]
    assert [row["score"] for row in theirs] == pytest.approx([candidate.probability for candidate in ours], rel=1e-4)
    again, _ = open_pretrained(folder, None)
    (exported_ones,) = fill_mask(again.build(), again.tokenizer, text, 5)
    assert [candidate.id for candidate in exported_ones] == [candidate.id for candidate in ours]


@pytest.mark.parametrize("name", GPTS)
def test_generate_says_what_our_sampler_says(exported, name):
    folder, trained = exported(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("the first", return_tensors="pt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
        **batch, max_new_tokens=25, do_sample=False
    )
    ours = sample(trained.build(), trained.tokenizer, "the first", Sampling(max_new_tokens=25, greedy=True))
    assert tokenizer.decode(theirs[0], skip_special_tokens=True) == ours
    assert len(ours) > len("the first")


@pytest.mark.parametrize("labels", [1, 2, 3])
@pytest.mark.parametrize("name", ["bert", "post", "gpt", "modern", "llama"])
def test_an_export_is_fine_tuned_from_text_with_any_number_of_labels(exported, name, labels, tmp_path):
    folder, trained = exported(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    batch = tokenizer(["te ti ta", "some", "word " * 99], padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (3, 32) and tokenizer.model_max_length == 32  # as it was trained
    targets = torch.zeros(3) if labels == 1 else torch.zeros(3, dtype=torch.long)
    model(**batch, labels=targets).loss.backward()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (found,) = transformers.pipeline("text-classification", model=str(tmp_path))("te ti ta")
    assert found["label"].startswith("LABEL_")
    again = from_folder(tmp_path)
    assert not any(weight.startswith("sentence_classifier") for weight in again.weights)
    assert any("score" in weight or "classifier" in weight for weight in again.left_out)
    assert again.tokenizer.equals(trained.tokenizer)


@pytest.mark.parametrize("name", ["gpt", "llama", "mistral", "qwen3"])
def test_generate_goes_on_from_each_text_of_a_batch_as_from_it_alone(exported, name):
    folder, _ = exported(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def go_on(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        said = model.generate(**batch, max_new_tokens=9, do_sample=False)
        return tokenizer.batch_decode(said, skip_special_tokens=True)

    texts = ["the first", "a", "some text to read and more"]
    assert go_on(texts) == [go_on([text])[0] for text in texts]


def test_the_card_says_what_the_run_recorded(exported, root):
    folder, _ = exported("shared")
    card = (folder / "README.md").read_text()
    metrics = [json.loads(line) for line in (root / "shared" / "metrics.jsonl").read_text().splitlines()]
    last = next(row["loss"] for row in reversed(metrics) if "loss" in row)
    assert "`BertForPreTraining`" in card and "checkpoint `step00000008` of run `shared`" in card
    for fact in (
        f"training loss | {last:.4f} (mlm ",
        "held-out loss | ",
        "steps | 8, 64 samples",
        "processes | 2, parallel.tensor 2, ZeRO stage 2, fp32",
        "sentences: nsp",
        "started from | new weights",
        "torch " + torch.__version__,
        "pre_layer_norm: false",
        str(root.parent / "text.txt"),
    ):
        assert fact in card


@pytest.mark.parametrize("name", ["bf16", "bf16_zero2"])
def test_the_weights_that_the_optimizer_steps_are_exported(exported, root, name):
    folder, trained = exported(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    words = model.transformer.wte.weight
    rounded = read_file(newest(root / name) / "mp_rank_00_model_states.pt")["module"]["word_embeddings.weight"]
    assert (words.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(words.bfloat16(), rounded[: len(words)]) and not torch.equal(words.bfloat16().float(), words)
    assert all(weight.dtype == torch.float32 for weight in trained.weights.values())


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_any_checkpoint_of_a_run_is_exported_and_no_folder_overwritten(root, tmp_path):
    target = tmp_path / "models" / "early"
    result = invoke("export", "--run", root / "bert", "--id", "step00000004", "--to", target)
    assert result.exit_code == 0, result.output
    assert "step00000004 is now" in result.output and "a RobertaPreLayerNormForMaskedLM" in result.output
    assert "steps | 4, 32 samples" in (target / "README.md").read_text()
    (target / "notes").write_text("mine")
    result = invoke("export", "--run", root / "bert", "--to", target)
    assert result.exit_code == 1 and "holds files already" in result.output
    assert "steps | 4" in (target / "README.md").read_text()
    assert invoke("export", "--run", root / "bert", "--to", target, "--force").exit_code == 0
    assert "steps | 8" in (target / "README.md").read_text()
    assert (target / "notes").read_text() == "mine"
    assert [path.name for path in target.parent.iterdir()] == ["early"]


def test_what_cannot_be_exported_leaves_nothing(root, tmp_path):
    target = tmp_path / "out"
    for arguments, message in (
        ((root / "bert", "--id", "nix"), "--id=nix fits no checkpoint"),
        ((root / "nix",), "is not a folder"),
        ((root / "modern_sop",), "closest is modernbert: objective.sentence_task is sop, and there are no token types"),
        ((root / "tanh",), "no architecture of transformers computes a pre-LN BERT with model.hidden_act=gelu_tanh"),
    ):
        result = invoke("export", "--run", *arguments, "--to", target)
        assert result.exit_code == 1 and message in result.output, result.output
    (tmp_path / "file").write_text("")
    assert "is a file" in invoke("export", "--run", root / "bert", "--to", tmp_path / "file").output
    result = invoke("export", "--run", root / "bert", "--to", tmp_path / "file" / "below")
    assert result.exit_code == 1 and f"cannot write --to={tmp_path}/file/below: " in result.output, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_was_killed_while_it_logged_is_exported(root, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(root / "post", copy)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    result = invoke("export", "--run", copy, "--to", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "training loss | " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"packages": 3}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_beside_the_checkpoint_is_left_out_of_the_card(tmp_path, capsys, text):
    (tmp_path / "env.json").write_bytes(text)
    assert model_card._if_whole(tmp_path / "env.json", model_card._versions) == []
    assert f"warning: {tmp_path}/env.json cannot be read" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": "x"}\n' + text + b"\n")
    assert model_card._if_whole(tmp_path / "metrics.jsonl", lambda path: model_card._losses(path, 2)) == []
    assert f"warning: {tmp_path}/metrics.jsonl cannot be read" in capsys.readouterr().err


def test_a_checkpoint_speaks_in_one_line(root, exported):
    folder, _ = exported("gpt")
    texts = {
        invoke("sample", "--run", place, "--prompt", "the", "--max-new-tokens", 9, "--seed", 3).stdout
        for place in (root / "gpt", newest(root / "gpt"), folder)
    }
    assert len(texts) == 1 and texts.pop().startswith("the")
    result = invoke("fill-mask", "--run", root / "post", "a [MASK] and [MASK]", "--top-k", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert (lines[0], lines[3], len(lines)) == ("mask 1", "mask 2", 6)
    assert "bert, 2 layers, hidden size 16" in result.stderr


def test_the_wrong_question_is_refused(root, exported):
    folder, _ = exported("gpt")
    for arguments, message in (
        (("sample", "--run", root / "bert", "--prompt", "a"), "is a bert, and this command needs a gpt"),
        (("fill-mask", "--run", folder, "a [MASK]"), "is a gpt, and this command needs a bert"),
        (("fill-mask", "--run", root / "bert", "a word"), "has no [MASK]"),
        (("fill-mask", "--run", root / "bert", "[MASK]" * 70), "the text has 72 tokens, the model takes 64"),
        (("sample", "--run", root / "gpt", "--prompt", ""), "--prompt is empty"),
        (("sample", "--run", folder, "--id", "step1", "--prompt", "a"), "has no checkpoints; remove --id"),
        (("sample", "--run", root, "--prompt", "a"), "holds no complete checkpoint"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1 and message in result.output, result.output
