import re
from pathlib import Path

import pytest

from xformer_train.launcher.config.batch import solve_batch
from xformer_train.launcher.config.deepspeed import deepspeed_config
from xformer_train.launcher.config.deepspeed_keys import KNOWN_KEYS, REFUSED_KEYS, REMOVED_KEYS, SECTIONS
from xformer_train.launcher.config.file import ConfigError
from xformer_train.launcher.config.schema import RunConfig

LAMB = {"type": "lamb", "lr": 2e-3, "max_coeff": 0.3, "min_coeff": 0.01, "bias_correction": False}


def run_config(deepspeed=None, optimizer=None, **training):
    return RunConfig.model_validate(
        {
            "deepspeed": deepspeed,
            "optimizer": optimizer or {},
            "training": {"max_steps": 1, "train_batch_size": 32, "micro_batch_size": 4, **training},
        }
    )


def built(config, precision="fp32", origins=None):
    return deepspeed_config(config, solve_batch(config.training, 2), precision, origins)


def problems(config, precision="fp32", origins=None):
    with pytest.raises(ConfigError) as error:
        built(config, precision, origins)
    return error.value.problems


def test_our_sections_fill_the_json():
    result = built(run_config(gradient_clipping=0.5))
    assert result["train_batch_size"] == 32
    assert result["train_micro_batch_size_per_gpu"] == 4
    assert result["gradient_accumulation_steps"] == 4
    assert result["gradient_clipping"] == 0.5
    assert result["zero_allow_untested_optimizer"] is True
    assert result["zero_force_ds_cpu_optimizer"] is False
    assert result["steps_per_print"] > 10**9
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & result.keys()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_gradients_of_bf16_weights_add_up_in_fp32_alone(precision):
    (problem,) = problems(run_config({"data_types": {"grad_accum_dtype": "bf16"}}), precision)
    assert "data_types.grad_accum_dtype: got" in problem and "make them equal" in problem
    built(run_config({"data_types": {"grad_accum_dtype": "fp32"}}), precision)


def test_precision_becomes_its_block_and_keeps_the_settings_beside_it():
    assert built(run_config(), "bf16")["bf16"] == {"enabled": True}
    given = {"fp16": {"enabled": "auto", "loss_scale": 128}, "bf16": {"enabled": "auto"}}
    result = built(run_config(given), "fp16")
    assert result["fp16"] == {"enabled": True, "loss_scale": 128}
    assert "bf16" not in result
    assert "fp16" not in built(run_config(given), "fp32")


def test_the_given_config_is_left_as_it_was():
    given = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": "auto"}, "optimizer": {"type": "auto"}}
    config = run_config(given)
    result = built(config, "fp16")
    result["zero_optimization"]["stage"] = 3
    assert config.deepspeed == {
        "zero_optimization": {"stage": 1},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "auto"},
    }


def test_other_keys_pass_through():
    given = {
        "zero_optimization": {"stage": 2},
        "communication_data_type": "fp32",
        "data_efficiency": {"enabled": False},
    }
    result = built(run_config(given))
    assert result["zero_optimization"] == {"stage": 2}
    assert result["communication_data_type"] == "fp32"


def test_equal_and_auto_values_are_accepted():
    given = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1,
        "optimizer": {
            "type": "Lamb",
            "params": {"lr": 2e-3, "betas": [0.9, 0.999], "eps": "auto", "max_coeff": 0.3, "bias_correction": False},
        },
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
    }
    assert built(run_config(given, LAMB), "bf16")["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("name", ["Adam", "AdamW", "adamw"])
def test_deepspeeds_adam_is_our_adamw(name):
    built(run_config({"optimizer": {"type": name, "params": {"torch_adam": True, "adam_w_mode": True}}}))


@pytest.mark.parametrize(
    "given,optimizer,text",
    [
        (
            {"train_batch_size": 64},
            None,
            "got 64, but training.train_batch_size is 32; make them equal, or remove it here",
        ),
        ({"train_micro_batch_size_per_gpu": 8}, None, "got 8, but training.micro_batch_size is 4"),
        ({"gradient_accumulation_steps": 1}, None, "got 1, but training.gradient_accumulation_steps is 4"),
        ({"gradient_clipping": 0.5}, None, "got 0.5, but training.gradient_clipping is 1.0"),
        ({"gradient_clipping": True}, None, "got true, but training.gradient_clipping is 1.0"),
        ({"fp16": {"enabled": True}}, None, "got true, but training.precision auto (here fp32), for which it is false"),
        ({"optimizer": {"type": "Lamb"}}, None, "got 'Lamb', but optimizer.type is adamw"),
        ({"optimizer": {"type": "OneBitAdam"}}, None, "got 'OneBitAdam', but optimizer.type is adamw"),
        ({"optimizer": {"params": {"lr": 1}}}, None, "got 1, but optimizer.lr is 0.0001"),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.98]}}},
            None,
            "got [0.9, 0.98], but optimizer.betas is [0.9, 0.999]",
        ),
        (
            {"optimizer": {"params": {"bias_correction": True}}},
            LAMB,
            "got true, but optimizer.bias_correction is false",
        ),
        ({"optimizer": {"params": {"max_coeff": 10}}}, LAMB, "got 10, but optimizer.max_coeff is 0.3"),
        ({"optimizer": {"params": {"max_grad_norm": 1}}}, None, "set training.gradient_clipping instead"),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, None, "decays weights apart from the gradient"),
        ({"optimizer": {"params": {"max_coeff": 1}}}, None, "is not a parameter of optimizer.type adamw"),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            LAMB,
            "not known which parameters a shard holds",
        ),
        ({"zero_optimization": {"stage": 4}}, None, "got 4, must be 0, 1, 2 or 3"),
        ({"zero_optimization": True}, None, "got true, must be a mapping"),
        ({"fp16": True}, None, "got true, must be a mapping"),
        ({"elasticity": {"enabled": True}}, None, "DeepSpeed has removed this feature"),
        ({"scheduler": {"type": "WarmupLR"}}, None, "is not used: the section schedule decides the learning rate"),
        ({"torch_autocast": {"enabled": True}}, None, "is not used: training.precision decides"),
        ({"zero_optimisation": {"stage": 1}}, None, "unknown DeepSpeed key (did you mean zero_optimization?)"),
        ({"xyz": 1}, None, "unknown DeepSpeed key"),
        (
            {"fp16": {"loss_scal": 0}},
            None,
            "deepspeed.fp16.loss_scal: unknown DeepSpeed key (did you mean loss_scale?)",
        ),
        (
            {"aio": {"xyz": 1}},
            None,
            "deepspeed.aio.xyz: unknown DeepSpeed key; aio has single_submit, overlap_events, ",
        ),
        ({"zero_optimization": {"overlap_com": True}}, None, "unknown DeepSpeed key (did you mean overlap_comm?)"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            None,
            "deepspeed.zero_optimization.offload_optimizer.devise: unknown DeepSpeed key (did you mean device?)",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "gpu"}}},
            None,
            "got 'gpu', must be none or cpu or nvme",
        ),
        ({"zero_optimization": {"overlap_comm": "yes"}}, None, "got 'yes', must be true or false"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, None, "got -1, must be a whole number of at least 0"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, None, "got '5e8', must be a whole number of at least 0"),
        ({"zero_optimization": {"leaf_module": {"names": [1]}}}, None, "got [1], must be a list of names"),
        ({"timers": {"throughput": {"enable": True}}}, None, "unknown DeepSpeed key (did you mean enabled?)"),
        ({"timers": []}, None, "got [], must be a mapping"),
        ({"prescale_gradients": "auto"}, None, "got 'auto', must be true or false"),
        ({"communication_data_type": "float"}, None, "got 'float', must be fp32 or fp16 or bf16"),
        ({"gradient_allreduce_op": "sum"}, None, "got 'sum', but a gradient is the mean over the batch"),
        ({"wandb": {"enabled": True}}, None, "is not used: the section logging decides where losses are written"),
        ({"log_level": "loud"}, None, "got 'loud', must be debug or info or warning or error or critical"),
        ({"zero_optimization": {"zenflow": {}}}, None, "is not used: optimizer.type adamw steps the weights"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            None,
            "deepspeed.zero_optimization.offload_param.nvme_path: is missing",
        ),
        ({"csv_monitor": True}, None, "got true, must be a mapping"),
        ({"compile": {"deepcompile": True}}, None, "is not used: the layers have kernels of their own"),
    ],
)
def test_a_contradiction_quotes_both_sides(given, optimizer, text):
    [problem] = problems(run_config(given, optimizer))
    assert text in problem


def test_all_contradictions_are_reported_at_once_with_the_place_they_stand_at():
    config = run_config({"train_batch_size": 64, "gradient_clipping": 2, "xyz": 1})
    found = problems(config, origins={"deepspeed.train_batch_size": "ds.json:3"})
    assert len(found) == 3
    assert [text for text in found if text.startswith("ds.json:3: deepspeed.train_batch_size: got 64")]


def test_known_keys_are_those_that_deepspeed_reads():
    deepspeed = pytest.importorskip("deepspeed")
    folder = Path(deepspeed.__file__).parent
    sources = "".join(path.read_text() for path in folder.rglob("*.py"))
    missing = [key for key in KNOWN_KEYS if not re.search(rf"""['"]{key}['"]""", sources)]
    assert missing == []
    assert REFUSED_KEYS.keys() <= KNOWN_KEYS
    assert not REMOVED_KEYS & KNOWN_KEYS


def test_the_keys_of_a_section_are_those_of_deepspeeds_class():
    pytest.importorskip("deepspeed")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    classes = {
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "fp16": DeepSpeedFP16Config,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    for section, kind in classes.items():
        assert SECTIONS[section].keys() == {field.alias or name for name, field in kind.model_fields.items()}, section


def test_what_deepspeed_takes_for_its_defaults_passes():
    given = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5e8,
            "stage3_prefetch_bucket_size": "auto",
            "offload_param": None,
            "offload_optimizer": {"device": "cpu", "nvme_path": None, "ratio": 1},
            "overlap_comm": None,
        },
        "wandb": {"enabled": False, "project": "a"},
        "tensorboard": {},
        "flops_profiler": {"module_depth": -1},
        "communication_data_type": "bf16",
    }
    result = built(run_config(given))
    assert result["zero_optimization"] == given["zero_optimization"]
    assert not {"wandb", "tensorboard"} & result.keys()


def test_deepspeed_itself_accepts_the_json():
    config_module = pytest.importorskip("deepspeed.runtime.config")
    config = run_config({"zero_optimization": {"stage": 2}, "prescale_gradients": False})
    batch = solve_batch(config.training, 1)
    accepted = config_module.DeepSpeedConfig(deepspeed_config(config, batch, "bf16"))
    assert accepted.bfloat16_config.enabled
    assert accepted.zero_optimization_stage == 2
    assert accepted.gradient_accumulation_steps == 8
