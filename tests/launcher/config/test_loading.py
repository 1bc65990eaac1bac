import itertools
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from xformer_train.launcher.config.loading import dump_config, load_config
from xformer_train.launcher.config.schema import RunConfig

MINIMAL = "training: {max_steps: 10, train_batch_size: 8}\n"
LAYERED = {
    "training.max_steps": (11, 12, 13),
    "schedule.lr_offset": (1e-3, 0.0, 2e-3),
    "schedule.type": ("EE", "LE", "EP"),
    "layer.gelu_checkpoint": (True, False, True),
    "name": ("a", "b", "c"),
    "seed": (1, 2, 0),
}


def nested(values):
    tree: dict = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        holder = tree
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[last] = value
    return tree


@pytest.mark.parametrize("seed", range(8))
def test_the_highest_layer_that_sets_a_key_wins_in_any_mixture(load, seed):
    generator = random.Random(seed)
    combinations = list(itertools.product((False, True), repeat=3))
    chosen = {key: generator.choice(combinations) for key in LAYERED}
    chosen["training.max_steps"] = (True, *chosen["training.max_steps"][1:])
    layers = [{key: LAYERED[key][layer] for key in LAYERED if chosen[key][layer]} for layer in range(3)]
    in_file = nested({**layers[0], "training.micro_batch_size": 1})
    sets = [f"{key}={json.dumps(value)}" for key, value in layers[1].items()]
    generator.shuffle(sets)
    loaded = load(yaml.safe_dump(in_file), sets, layers[2])
    defaults = RunConfig().model_dump()
    for key, present in chosen.items():
        expected, got = defaults, loaded.config.model_dump()
        for part in key.split("."):
            expected, got = expected[part], got[part]
        origin = "default"
        for layer, label in enumerate((r"run\.yaml:\d+", "--set", "--[a-z_]+")):
            if present[layer]:
                expected, origin = LAYERED[key][layer], label
        assert got == expected, key
        assert re.fullmatch(origin, loaded.origins[key]), key


def test_every_leaf_of_the_config_has_an_origin(load):
    loaded = load(MINIMAL + "deepspeed: {zero_optimization: {stage: 1}}\n", ["seed=3"], {"name": "x"})
    assert loaded.origins["seed"] == "--set"
    assert loaded.origins["name"] == "--job_name"
    assert loaded.origins["deepspeed.zero_optimization.stage"] == "run.yaml:2"
    dumped = yaml.safe_load(dump_config(loaded.config))

    def leaves(value, path):
        if isinstance(value, dict) and value:
            return [leaf for key, item in value.items() for leaf in leaves(item, [*path, key])]
        return [".".join(path)]

    without_lists = {key for key in loaded.origins if not key.startswith("data.sources")}
    assert {leaf for leaf in leaves(dumped, []) if leaf != "data.sources"} == without_lists


def test_set_reaches_list_items_of_file_and_default(load):
    loaded = load(
        MINIMAL + "data: {sources: {kind: text, path: a.txt}}\n",
        ["data.sources.0.path=b.txt", "data.validation={kind: text, path: c.txt}", "data.validation.0.path=d.txt"],
    )
    assert loaded.config.data.sources[0].path == "b.txt"
    assert loaded.config.data.validation[0].path == "d.txt"
    assert loaded.origins["data.sources.0.kind"] == "run.yaml:2"
    assert loaded.origins["data.sources.0.path"] == "--set"
    changed = load(MINIMAL, ["data.sources.0.kind=text", "data.sources.0.path=x.txt"])
    assert [source.kind for source in changed.config.data.sources] == ["text"]


def test_set_of_a_section_replaces_the_section(load):
    loaded = load(MINIMAL + "optimizer: {lr: 0.5, eps: 1e-6}\n", ["optimizer={lr: 0.25}"])
    assert (loaded.config.optimizer.lr, loaded.config.optimizer.eps) == (0.25, 1e-8)
    assert loaded.origins["optimizer.lr"] == "--set"
    assert loaded.origins["optimizer.eps"] == "default"


def test_two_exclusive_keys_in_one_layer_are_refused(problems):
    two = {"training.max_steps": 7, "training.max_hours": 2.0}
    text = "training.max_hours: got 2.0, but training.max_steps 7 is given too, and a run has one length; keep one of the two"
    minimal = "training: {num_epochs: 3, train_batch_size: 8}\n"
    assert problems(minimal, (), two) == [f"--max_hours: {text}"]
    assert problems(minimal, [f"{key}={value}" for key, value in two.items()]) == [f"--set: {text}"]


def test_of_two_exclusive_keys_the_higher_layer_wins(load):
    text = "training: {num_epochs: 3, train_batch_size: 8}\nschedule: {warmup_proportion: 0.1}\n"
    loaded = load(text, ["schedule.warmup_steps=5"], {"training.max_steps": 7})
    assert (loaded.config.training.max_steps, loaded.config.training.num_epochs) == (7, None)
    assert (loaded.config.schedule.warmup_steps, loaded.config.schedule.warmup_proportion) == (5, None)
    assert load(text, ["training.max_tokens=4096"]).config.training.num_epochs is None
    kept = load(text, ["schedule.warmup_steps=null"])
    assert kept.config.schedule.warmup_proportion == 0.1


@pytest.mark.parametrize(
    "text,message",
    [
        ("seed", "--set seed: must be KEY=VALUE, such as --set training.max_steps=100"),
        ("=3", "--set =3: must be KEY=VALUE"),
        ("seed=[", "--set: seed: '[' is not a YAML value: "),
        ("optimizer.lrr=1", "--set: optimizer.lrr: unknown key (did you mean lr?)"),
        ("foo.bar=1", "--set: foo: unknown key; a run config has name, output_dir, seed, model"),
        (
            "training.max_steps.x=1",
            "--set: training.max_steps.x: unknown key; training.max_steps is 10, so there is nothing",
        ),
        (
            "data.sources.1.path=x",
            "--set: data.sources.1.path: there is no item 1; the list has 1 (the first is 0); to make it longer, set "
            "data.sources as a whole",
        ),
        (
            "data.validation.0.kind=builtin",
            "--set: data.validation.0.kind: there is no item 0; the list is empty; to make it longer, set data.validation as "
            "a whole",
        ),
        ("seed.x=1", "--set: seed: got a mapping, must be a whole number"),
        ("name=2024", '--set: name: got 2024, must be text; write "2024"'),
        ("optimizer.lr=fast", "--set: optimizer.lr: got 'fast' (text), must be a number"),
    ],
)
def test_a_wrong_set_is_reported(problems, text, message):
    [problem] = problems(MINIMAL, [text])
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "text", ["traning: {max_steps: 10, train_batch_size: 8}", "training: {max_step: 10, train_batch_size: 8}"]
)
def test_what_a_misspelt_key_leaves_unset_is_not_reported_as_missing_too(problems, text):
    [problem] = problems(text)
    assert "did you mean" in problem


def test_a_wrong_flag_is_reported_under_its_name(problems):
    [problem] = problems(MINIMAL, flags={"data.max_seq_length": 4})
    assert problem == "--max_seq_length: data.max_seq_length: got 4, must be at least 8"


@pytest.mark.parametrize(
    "line,message",
    [
        ("optimizer: {max_coef: 1}", "optimizer.max_coef: unknown key (did you mean max_coeff?)"),
        ("optimiser: {lr: 1}", "optimiser: unknown key (did you mean optimizer?)"),
        ("layer: {zzz: 1}", "layer.zzz: unknown key; layer has kernels, stochastic_mode, normalize_invertible"),
        ("data: {sources: [{kind: builtin, pth: x}]}", "data.sources.0.pth: unknown key (did you mean path?)"),
        ("data: {validation: {kind: text, pth: x}}", "data.validation.0.pth: unknown key (did you mean path?)"),
        ("data: {sources: [{path: x}]}", "data.sources.0.kind: is missing; must be 'builtin' or 'text'"),
        ("data: {sources: []}", "data.sources: got an empty list, must be a list of at least 1"),
        ("data: {sources: x.txt}", "data.sources: got 'x.txt' (text), must be a list"),
        ("data: {sources: [x.txt]}", "data.sources.0: got 'x.txt' (text), must be a mapping"),
        ("seed: 1.5", "seed: got 1.5, must be a whole number"),
        ("seed: 1e3", "seed: got 1000.0, must be a whole number; write 1000"),
        ("seed: true", "seed: got true, must be a whole number"),
        ("seed: -1", "seed: got -1, must be at least 0"),
        ("layer: {unpad: 1}", "layer.unpad: got 1, must be true or false"),
        ("layer: {unpad: yes}", "layer.unpad: got 'yes' (text), must be true or false"),
        ("layer: true", "layer: got true, must be a mapping"),
        ("layer:", "layer: got null, must be a mapping"),
        ("optimizer: {lr: '1e-4'}", "optimizer.lr: got '1e-4' (text), must be a number"),
        ("optimizer: {lr: true}", "optimizer.lr: got true, must be a number"),
        ("optimizer: {lr: 0}", "optimizer.lr: got 0, must be greater than 0"),
        ("optimizer: {lr: .inf}", "optimizer.lr: got inf, must be a finite number"),
        ("optimizer: {lr: .nan}", "optimizer.lr: got nan, must be a finite number"),
        (
            "optimizer: {betas: [0.9]}",
            "optimizer.betas: got [0.9], must be a list of 2, such as the default [0.9, 0.999]",
        ),
        ("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas.1: got 1.0, must be less than 1"),
        ("optimizer: {betas: 0.9}", "optimizer.betas: got 0.9, must be a list"),
        ("layer: {kernels: cuda}", "layer.kernels: got 'cuda' (text), must be 'auto' or 'reference'"),
        ("model: {vocab_size: 0}", "model.vocab_size: got 0, must be greater than 0 or 'auto'"),
        ("checkpoint: {keep_last: 0}", "checkpoint.keep_last: got 0, must be greater than 0"),
        ("name: 7", 'name: got 7, must be text; write "7"'),
        ("deepspeed: 7", 'deepspeed: got 7, must be text; write "7" or a mapping'),
    ],
)
def test_a_wrong_value_is_reported_with_line_value_and_rule(problems, line, message):
    [problem] = problems(MINIMAL + line + "\n")
    assert problem.startswith(f"run.yaml:2: {message}"), problem


def test_the_schema_has_words_for_every_rule_of_every_field(problems):
    """Each leaf of the config is given values of every wrong kind; each must come back as a sentence."""
    wrong = [None, True, -1, 2**70, 1.5, float("inf"), "text", [], [[]], {}, {"x": 1}]
    for section, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {None: None})
        for name, value in itertools.product(inner, wrong):
            tree = {section: value if name is None else {name: value}}
            try:
                RunConfig.model_validate(tree)
            except ValidationError:
                # The dump writes floats and text in a form that YAML 1.2 reads back.
                found = problems(json.dumps(tree).replace("Infinity", ".inf"), name="run.yaml")
                assert any(f"{section}{f'.{name}' if name else ''}" in problem for problem in found)


def test_all_problems_come_in_one_report_in_the_order_of_lines(problems):
    text = (
        "name: a/b\nmodel:\n  hidden_size: 130\n  vocab_siz: 3\noptimizer: {lr: fast}\ntraining:\n  train_batch_size: 10\n"
        "  micro_batch_size: 3\n"
    )
    found = problems(text, ["seed=x"])
    assert [problem.split(": ")[:2] for problem in found] == [
        ["--set", "seed"],
        ["run.yaml:1", "name"],
        ["run.yaml:3", "model.hidden_size"],
        ["run.yaml:4", "model.vocab_siz"],
        ["run.yaml:5", "optimizer.lr"],
        ["run.yaml:6", "training.max_steps"],
        ["run.yaml:7", "training.train_batch_size"],
    ]


def test_a_rule_that_reads_a_wrong_value_stays_silent(problems):
    # With hidden_size wrong nothing can be said about its divisibility by the heads.
    [problem] = problems(MINIMAL + "model: {hidden_size: x, num_attention_heads: 5}\n")
    assert "model.hidden_size: got 'x'" in problem


def test_a_deepspeed_file_is_found_beside_the_run_config_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "ds.json").write_text('{\n"communication_data_type": "fp32"}')
    (folder / "run.yaml").write_text(MINIMAL + "deepspeed: ds.json\n")
    loaded = load_config("configs/run.yaml")
    assert loaded.config.deepspeed == {"communication_data_type": "fp32"}
    assert loaded.origins["deepspeed.communication_data_type"] == "configs/ds.json:2"
    Path("ds.json").write_text('{"communication_data_type": "bf16"}')
    assert load_config("configs/run.yaml").config.deepspeed == {"communication_data_type": "fp32"}
    from_command_line = load_config("configs/run.yaml", flags={"deepspeed": "ds.json"})
    assert from_command_line.config.deepspeed == {"communication_data_type": "bf16"}
    (folder / "ds.json").unlink()
    assert load_config("configs/run.yaml").config.deepspeed == {"communication_data_type": "bf16"}


def test_a_fault_in_the_deepspeed_file_names_that_file_and_line(problems):
    Path("ds.json").write_text('{\n  "train_batch_size": 16,\n  "gradient_cliping": 1\n}')
    assert problems(MINIMAL + "deepspeed: ds.json\n") == [
        "ds.json:2: deepspeed.train_batch_size: got 16, but training.train_batch_size is 8; make them equal, or remove it "
        "here",
        "ds.json:3: deepspeed.gradient_cliping: unknown DeepSpeed key (did you mean gradient_clipping?)",
    ]


def test_a_missing_or_broken_deepspeed_file_is_reported_with_the_other_problems(problems):
    first, second = problems(MINIMAL + "deepspeed: none.json\nseed: x\n")
    assert first == "run.yaml:2: deepspeed: no such file: none.json"
    assert second.startswith("run.yaml:3: seed")
    Path("ds.json").write_text("{")
    [problem] = problems(MINIMAL, flags={"deepspeed": "ds.json"})
    assert problem.startswith("ds.json:1: not well-formed JSON")


def test_a_held_out_share_of_zero_leaves_held_out_sources_alone(load):
    text = MINIMAL + "data: {validation: {kind: builtin}}\n"
    assert load(text, ["data.validation_fraction=0.0"]).config.data.validation is not None


def test_set_changes_one_key_of_an_inline_deepspeed_config(load):
    loaded = load(MINIMAL + "deepspeed: {prescale_gradients: false}\n", ["deepspeed.zero_optimization.stage=1"])
    assert loaded.config.deepspeed == {"prescale_gradients": False, "zero_optimization": {"stage": 1}}
    assert loaded.origins["deepspeed.zero_optimization.stage"] == "--set"


def test_what_set_and_flags_give_has_the_limits_of_a_file(problems):
    [by_set] = problems(MINIMAL, ["seed=" + "9" * 4301])
    assert by_set.endswith("is not a YAML value: the value: got a number of 4,301 digits, must fit in 64 bits")
    [by_flag] = problems(MINIMAL, (), {"training.max_steps": 2**63})
    assert by_flag == "--max_steps: training.max_steps: got 9223372036854775808, must fit in 64 bits"
    assert "unknown key" in " ".join(problems(MINIMAL, ["data.sources." + "9" * 4301 + "=1"]))
    assert all(line.isprintable() for line in problems(MINIMAL, ["a\nb", "c\nd=1", "name=\x07"]))


PATHS = ("output_dir", "load.path", "tokenizer.path", "data.cache_dir", "data.sources.0.path", "model.init_from")


@pytest.mark.parametrize("key", PATHS)
def test_a_tilde_is_the_home_folder_in_every_path(load, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    value = load(
        MINIMAL, [f"{key}=~/a/b", *(["data.sources.0.kind=text"] if "sources" in key else [])]
    ).config.model_dump()
    for part in key.split("."):
        value = value[int(part) if part.isdecimal() else part]
    assert value == "/home/me/a/b"


@pytest.mark.parametrize("key", [*PATHS, "deepspeed"])
def test_a_tilde_of_nobody_is_refused_and_not_made_a_folder(problems, key):
    [problem] = problems(
        MINIMAL, [f"{key}=~no-such-user/a", *(["data.sources.0.kind=text"] if "sources" in key else [])]
    )
    assert problem.startswith(
        f"--set: {key}: got '~no-such-user/a' (text), must be a path below the home folder of a user"
    )
    assert "write ./~no-such-user/a for a folder named ~no-such-user" in problem


def test_a_deepspeed_file_may_stand_in_the_home_folder(load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "ds.json").write_text('{"dump_state": true}')
    assert load(MINIMAL + "deepspeed: ~/ds.json").config.deepspeed == {"dump_state": True}
    assert load(MINIMAL, flags={"deepspeed": "~/ds.json"}).config.deepspeed == {"dump_state": True}


@pytest.mark.parametrize(
    "text",
    ['{"train_batch_size": 8, "optimizer": {"type": "Adam"}}', '{"zero_optimization": {}}', '{"elasticity": {}}'],
)
def test_a_deepspeed_json_in_the_place_of_the_run_config_is_told_apart(problems, text):
    [problem] = problems(text, name="ds.json")
    assert (
        problem
        == "ds.json: is a DeepSpeed JSON; give it with --deepspeed_config ds.json, and a run config with --config"
    )


def test_a_run_config_with_a_key_of_deepspeed_at_the_top_is_still_one(problems):
    assert (
        "run.yaml:1: train_batch_size: unknown key; a run config has name"
        in problems("{train_batch_size: 8, seed: 1}")[-1]
    )


def test_a_key_below_a_list_names_the_item(problems):
    [problem] = problems(MINIMAL + "data: {sources: [{kind: builtin}]}", ["data.sources.path=x"])
    expected = "data.sources.path: unknown key; data.sources is a list; write data.sources.0.path for its first item"
    assert problem == f"--set: {expected}"
    [problem] = problems(MINIMAL + "data: {max_seq_length: 64}", ["data.sources.path=x"])
    assert problem.startswith("--set: data.sources.0.kind: is missing; must be 'builtin' or 'text'")
