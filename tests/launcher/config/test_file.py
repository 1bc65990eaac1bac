import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from xformer_train.launcher.config.file import parse_value, plain_values, read_tree
from xformer_train.launcher.config.loading import ConfigError, LoadedConfig, dump_config, load_config
from xformer_train.launcher.config.schema import RunConfig

MINIMAL = "training: {max_steps: 10, train_batch_size: 8}\n"


def test_a_minimal_config_has_the_defaults_and_their_origins(load):
    loaded = load(MINIMAL)
    assert isinstance(loaded, LoadedConfig)
    assert loaded.config == RunConfig.model_validate({"training": {"max_steps": 10, "train_batch_size": 8}})
    assert loaded.origins["training.max_steps"] == "run.yaml:1"
    assert loaded.origins["optimizer.betas"] == "default"
    assert loaded.origins["data.sources.0.kind"] == "default"


@pytest.mark.parametrize(
    "text,value",
    [
        ("11e-3", 0.011),
        ("1e-4", 1e-4),
        ("1E+2", 100.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("10", 10),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("'1e5'", "1e5"),
        ("!!str 5", "5"),
        ("[1, a, {b: 1e-3}]", [1, "a", {"b": 1e-3}]),
        ("-.inf", float("-inf")),
        ("+.INF", float("inf")),
        ("9223372036854775807", 2**63 - 1),
        ('"\\ud83d\\ude00"', "😀"),
        ("0b11", "0b11"),
        ("=", "="),
        ("{<<: a}", {"<<": "a"}),
        ("%YAML 1.1\n---\non", "on"),
    ],
)
def test_values_are_read_as_yaml_1_2(text, value):
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", ["[", "!!python/name:os.system", "{a: 1, a: 2}", "a: b: c", "- 1\n--- 2", "!!int abc"])
def test_a_value_that_is_not_yaml_is_refused(text):
    with pytest.raises(ValueError):
        parse_value(text)


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", r"^run.yaml: is empty"),
        (b"# nothing\n", r"^run.yaml: is empty"),
        (b"- 1\n", r"^run.yaml:1: holds a list, where a mapping of sections is wanted$"),
        (b"just text\n", r"^run.yaml:1: holds 'just text' \(text\)"),
        (b"name: caf\xe9\n", r"^run.yaml: byte 0xe9 at position 9 is not UTF-8 text$"),
        (b"name: x\nmodel: {type: [}\n", r"^run.yaml:2: not well-formed YAML: "),
        (b"name: x\n\tseed: 1\n", r"^run.yaml:2: not well-formed YAML: .*'\\t'"),
        (b"name: x\nseed: \x07\n", r"^run.yaml:2: control character 0x07 in the text$"),
        (b"name: x\nseed: 1\nname: y\n", r"^run.yaml:3: name: given twice, first on line 1$"),
        (b"model:\n  type: gpt\n  type: bert\n", r"^run.yaml:3: model.type: given twice, first on line 2$"),
        (b"1: x\n", r"^run.yaml:1: the file: a key must be text, and 1 is not$"),
        (b"seed: &a [*a]\n", r"^run.yaml:1: seed.0: an alias may not contain itself$"),
        (b"seed: !!python/name:os.system x\n", r"^run.yaml:1: seed: .*has no meaning here$"),
        (b"name: x\nmodel: !x {type: bert}\n", r"^run.yaml:2: model: the tag !x has no meaning here$"),
        (b"data: {sources: !!set {a}}\n", r"^run.yaml:1: data.sources: the tag .*:set has no meaning here$"),
        (b"!x\nname: x\n", r"^run.yaml:1: the file: the tag !x has no meaning here$"),
        (b"? [a]\n: 1\n", r"^run.yaml:1: the file: a key must be text, and a list or mapping is not$"),
        (b'seed: 1\nname: "\\ud800"\n', r"^run.yaml:2: name: '\\ud800' holds half of a surrogate pair"),
        (b'"\\udc00": 1\n', r"^run.yaml:1: the file: '\\udc00' holds half of a surrogate pair"),
        (b"name: x\nseed: 9223372036854775808\n", r"^run.yaml:2: seed: got 9223372036854775808, must fit in 64 bits$"),
        (b"seed: -9223372036854775809\n", r"^run.yaml:1: seed: got -9223372036854775809, must fit in 64 bits$"),
        (b"seed: " + b"9" * 4301, r"^run.yaml:1: seed: got a number of 4,301 digits, must fit in 64 bits$"),
        (b"seed: 0x" + b"f" * 5000, r"^run.yaml:1: seed: got a number of 5,002 digits, must fit in 64 bits$"),
        (b"model:\n x: " + b"[" * 10**5, r"^run.yaml:2: nested more than 64 deep$"),
        (b"model:\n" + b"- " * 70 + b"1", r"^run.yaml:2: nested more than 64 deep$"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config("run.yaml")
    [problem] = error.value.problems
    assert re.search(message, problem), problem


def bomb(first, last):
    """YAML whose last key means 9 to the power of the number of keys values."""
    keys = [chr(code) for code in range(ord(first), ord(last) + 1)]
    rows = [f"{keys[0]}: &{keys[0]} [{','.join('x' * 9)}]"]
    rows += [f"{key}: &{key} [{','.join(f'*{before}' for _ in range(9))}]" for before, key in itertools.pairwise(keys)]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    "text,message",
    [
        (bomb("a", "i"), "more than 10,000 values, with its aliases written out"),
        ("k0: &k0 [1]\n" + "".join(f"k{i}: &k{i} [*k{i - 1}]\n" for i in range(1, 500)), "nested more than 64 deep"),
    ],
)
def test_aliases_that_stand_for_too_much_are_refused_at_once(problems, text, message):
    [problem] = problems(text)
    assert re.fullmatch(rf"run.yaml:\d+: {message}.*", problem)


def test_an_alias_is_its_own_copy_of_what_it_stands_for(load):
    text = MINIMAL + "data: {sources: [&a {kind: text, path: x}], validation: [*a]}\n"
    loaded = load(text, ["data.validation.0.path=y"])
    assert [loaded.config.data.sources[0].path, loaded.config.data.validation[0].path] == ["x", "y"]


@pytest.mark.parametrize("name", ["a\nb.yaml", "a\x1b[31m.yaml", "a\udcff.yaml"])
def test_each_problem_is_one_line_that_can_be_printed_whatever_the_path(problems, load, name):
    [problem] = problems(MINIMAL + "sed: 1\n", name=name)
    assert problem.isprintable() and re.match(r"a\\.*\.yaml:2: sed: unknown key \(did you mean seed\?\)$", problem)
    loaded = load(MINIMAL, name=name)
    assert load(dump_config(loaded.config, loaded.origins)).config == loaded.config


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path, text in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=f"{re.escape(str(path))}: {text}"):
            load_config(path)


def test_all_duplicate_keys_of_a_file_are_reported(problems):
    assert len(problems("name: x\nname: y\nseed: 1\nseed: 2\n")) == 2


def test_json_keeps_line_numbers_with_tabs_and_escapes(load):
    text = (
        '{\n\t"name": "r\\u00fcn\\t\\ud83d\\ude00"\n\t,"training":\t{\n\t\t"max_steps": 3,\n\t\t"train_batch_size":8},'
        '\n"optimizer": {"lr": 1e-3, "betas": [0.9,\n0.95]}}'
    )
    tree_path = Path("run.json")
    tree_path.write_text(text)
    tree = read_tree(tree_path)
    assert tree.values == json.loads(text)
    assert tree.lines[("name",)] == 2
    assert tree.lines[("training", "max_steps")] == 4
    assert tree.lines[("optimizer", "betas")] == 6
    assert tree.lines[("optimizer", "betas", 1)] == 7


def test_json_may_have_a_colon_on_the_line_after_its_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text('{"training"\n :\n{"max_steps"\n\t:10},\n"name" : "a\\" : b", "x":"c\\\\"}')
    tree = read_tree(Path("run.json"))
    assert tree.values == {"training": {"max_steps": 10}, "name": 'a" : b', "x": "c\\"}
    assert (tree.lines[("training",)], tree.lines[("training", "max_steps")], tree.lines[("name",)]) == (1, 3, 5)


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"name": "x",\n "seed": 1,\n}', r"run.json:\d: not well-formed JSON"),
        ('{"name": "x",\n "name": "y"}', r"run.json:2: name: given twice, first on line 1"),
        ("name: x", r"run.json:1: not well-formed JSON"),
        ("", r"run.json: is empty"),
        ("[1]", r"run.json:1: holds a list"),
        ('{"a":' + "[" * 10**5 + "]" * 10**5 + "}", r"run.json: nested more than 64 deep"),
        ('{"a":\n' + "[" * 100 + "]" * 100 + "}", r"run.json:2: nested more than 64 deep"),
        ('{"seed":\n' + "9" * 4301 + "}", r"run.json:2: seed: got a number of 4,301 digits, must fit in 64 bits"),
        ('{"name":\n"\\ud83d"}', r"run.json:2: name: '\\ud83d' holds half of a surrogate pair"),
        ('{"a"\n:1,\n"a"\n:2}', r"run.json:3: a: given twice, first on line 1"),
    ],
)
def test_json_faults_have_their_line(problems, text, message):
    [problem] = problems(text, name="run.json")
    assert re.match(message, problem)


def test_the_same_config_in_yaml_and_json_is_equal(load):
    values = {"training": {"max_steps": 3, "micro_batch_size": 4}, "optimizer": {"lr": 11e-3}, "name": "on"}
    assert load(yaml.safe_dump(values)).config == load(json.dumps(values), name="a.json").config


@pytest.mark.parametrize(
    "name", ["1e5", "on", "null", "010", "2024-01-01", "é", "a: b", "# x", "- x", "'", "1_0", "0x1"]
)
def test_dumped_text_reads_back_as_text(load, name):
    loaded = load(
        json.dumps({"name": "x", "load": {"path": name}, "training": {"max_steps": 1, "micro_batch_size": 1}})
    )
    assert load(dump_config(loaded.config)).config == loaded.config


def test_a_dumped_config_loads_back_equal_with_and_without_origins(load):
    text = MINIMAL + (
        "model: {type: gpt, layer_norm_eps: 1e-5}\nobjective: {type: clm}\nseed: 9223372036854775807\n"
        "data: {sources: [{kind: text, path: 'a b.txt', weight: 0.1}, {kind: hf, path: x, weight: 11e-3}], validation: "
        "{kind: builtin}}\ndeepspeed: {zero_optimization: {stage: 0, offload_param: {}}, tensorboard: {enabled: false}}\n"
    )
    loaded = load(text)
    assert load(dump_config(loaded.config)).config == loaded.config
    assert load(dump_config(loaded.config, loaded.origins)).config == loaded.config
    assert re.search(r"^  layer_norm_eps: 1e-05 +# run.yaml:2$", dump_config(loaded.config, loaded.origins), re.M)


def test_plain_values_have_dotted_keys_and_text_for_what_is_not_plain():
    values = {"a": 1, "b": {"c": True, "d": {"e": None}, "f": [1, 2]}, "g": {}, "h": "x"}
    assert plain_values(values) == {"a": 1, "b.c": True, "b.d.e": "null", "b.f": "[1, 2]", "g": "{}", "h": "x"}
