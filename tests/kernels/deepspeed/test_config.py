"""DeepSpeed's config of the layer: its defaults, how it is filled, what it refuses, what of it reaches the layer."""

import copy
import dataclasses
import json
import math

import pytest
from helpers.deepspeed_door import SMALL, config, layer

from xformer_train.kernels.deepspeed.config import DeepSpeedTransformerConfig
from xformer_train.kernels.deepspeed.layer import DeepSpeedTransformerLayer


def test_every_default_is_deepspeeds():
    fresh = DeepSpeedTransformerConfig()
    on = {"pre_layer_norm", "adjust_init_range", "training", "is_grad_enabled"}
    off = {
        "fp16",
        "normalize_invertible",
        "gelu_checkpoint",
        "attn_dropout_checkpoint",
        "stochastic_mode",
        "return_tuple",
        "test_gemm",
    }
    unset = {"batch_size", "hidden_size", "intermediate_size", "heads", "attn_dropout_ratio", "hidden_dropout_ratio"}
    unset |= {"num_hidden_layers", "initializer_range", "local_rank", "seed", "max_seq_length", "layer_id"}
    expected = (
        dict.fromkeys(on, True) | dict.fromkeys(off, False) | dict.fromkeys(unset, -1) | {"layer_norm_eps": 1e-12}
    )
    assert {name: getattr(fresh, name) for name in fresh.__dataclass_fields__} == expected


def test_positional_arguments_come_in_deepspeeds_order():
    given = DeepSpeedTransformerConfig(8, 24, 40, 3, 0.1, 0.2, 2, 0.02, 1e-5, -1, 7, True, False)
    assert (given.heads, given.hidden_dropout_ratio, given.seed, given.pre_layer_norm) == (3, 0.2, 7, False)


def test_intermediate_size_is_four_times_the_hidden_size_of_the_moment_unless_given():
    filled = DeepSpeedTransformerConfig()
    assert filled.intermediate_size == -1
    filled.hidden_size = 24
    assert filled.intermediate_size == 96
    filled.hidden_size = 32
    assert filled.intermediate_size == copy.deepcopy(filled).intermediate_size == 128
    filled.intermediate_size = 40
    assert filled.intermediate_size == 40
    assert DeepSpeedTransformerConfig.from_dict({"hidden_size": 24}).intermediate_size == 96
    assert layer(intermediate_size=0).inter_w.shape == (96, 24)


def test_a_config_can_be_filled_attribute_by_attribute():
    filled = DeepSpeedTransformerConfig()
    for name, value in SMALL.items():
        setattr(filled, name, value)
    assert filled == config()
    DeepSpeedTransformerLayer(filled)
    with pytest.raises(AttributeError, match="did you mean gelu_checkpoint"):
        filled.gelu_checkpont = True


def test_a_json_file_is_read_as_utf_8_and_equals_its_dict(tmp_path):
    path = tmp_path / "größe.json"
    path.write_text(json.dumps({**SMALL, "pre_layer_norm": False}), encoding="utf-8")
    assert DeepSpeedTransformerConfig.from_json_file(path) == config(pre_layer_norm=False)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="one object"):
        DeepSpeedTransformerConfig.from_json_file(path)


def test_from_dict_refuses_an_unknown_key_and_names_the_nearest():
    with pytest.raises(ValueError, match=r"hiden_size=24.*did you mean hidden_size"):
        DeepSpeedTransformerConfig.from_dict({"hiden_size": 24})
    with pytest.raises(ValueError, match="no parameter xyz; remove it"):
        DeepSpeedTransformerConfig.from_dict({"xyz": 1})


@pytest.mark.parametrize("name", SMALL)
def test_a_layer_refuses_a_config_in_which_something_it_needs_is_not_set(name):
    with pytest.raises(ValueError, match=f"^{name}=-1 is .*set "):
        layer(**{name: -1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "hidden_size=24 is not divisible by heads=5"),
        ({"attn_dropout_ratio": 1.0}, r"attn_dropout_ratio=1.0 .* \[0, 1\)"),
        ({"hidden_dropout_ratio": math.nan}, "hidden_dropout_ratio=nan"),
        ({"initializer_range": math.inf}, "initializer_range=inf"),
        ({"hidden_size": "24"}, "hidden_size='24' is of type str; give it as int"),
        ({"hidden_size": 24.0}, "hidden_size=24.0 is of type float; give it as int"),
        ({"fp16": "false"}, "fp16='false' is of type str; give it as bool"),
        ({"heads": "3"}, "heads='3' is of type str"),
        ({"seed": 2**63}, r"seed=9223372036854775808 does not fit .* below 2\*\*63"),
        ({"seed": True}, "seed=True is of type bool; give it as int"),
        ({"intermediate_size": None}, "intermediate_size=None is of type NoneType"),
    ],
)
def test_impossible_values_are_refused_by_their_deepspeed_name(change, message):
    with pytest.raises(ValueError, match=message):
        layer(**change)


@pytest.mark.parametrize(
    "flag", ["normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "stochastic_mode", "pre_layer_norm"]
)
@pytest.mark.parametrize("value", [True, False])
def test_each_flag_reaches_the_core(flag, value):
    core, other = layer(**{flag: value}).config, layer(**{flag: not value}).config
    assert getattr(core, flag) is value
    assert {name for name, setting in vars(core).items() if setting != vars(other)[name]} == {flag}


def test_the_number_of_layers_is_needed_only_to_adjust_the_start():
    layer(adjust_init_range=False, num_hidden_layers=-1)


def test_attributes_that_programs_set_there_are_taken_and_change_nothing():
    """As the unit tests of DeepSpeed's kernels build a config."""
    config = DeepSpeedTransformerConfig()
    assert (config.layer_id, config.test_gemm, config.is_grad_enabled) == (-1, False, True)
    config.layer_id, config.test_gemm, config.is_grad_enabled = None, True, False
    config.hidden_size, config.heads, config.num_hidden_layers, config.initializer_range = 24, 3, 2, 0.02
    config.attn_dropout_ratio = config.hidden_dropout_ratio = 0.0
    made = DeepSpeedTransformerLayer(7, config)
    assert made.layer_id == made.deepspeed_config.layer_id == 7
    assert config.layer_id is None
    with pytest.raises(ValueError, match="test_gemm=1 is of type int"):
        DeepSpeedTransformerLayer(dataclasses.replace(config, test_gemm=1))
