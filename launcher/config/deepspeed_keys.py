"""The keys that DeepSpeed 0.19 reads, section by section, and the kinds of their values. No torch import.

DeepSpeed ignores an unknown key of the first level in silence, and refuses a wrong one below it with a traceback, long after
the run has begun (deepspeed/runtime/config.py and the classes it imports).
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

OUR_SPLITTING = "the section parallel decides what processes share"
OUR_METRICS = "the section logging decides where losses are written, and DeepSpeed gets none of them"
REFUSED_KEYS = {
    "scheduler": "the section schedule decides the learning rate",
    "torch_autocast": "training.precision decides the precision",
    "managed_gradient_accumulation": "the training loop leaves gradient accumulation to DeepSpeed",
    "data_efficiency": "the section data decides which samples are drawn",
    "autotuning": "the batch sizes of the section training are not searched for",
    "hybrid_engine": "it is for generation, which a pretraining run does not do",
    "weight_quantization": "training.precision decides the precision",
    "compile": "the layers have kernels of their own, and the engine is not compiled",
    "datastates_ckpt": "the section checkpoint decides how checkpoints are written",
    "pipeline": OUR_SPLITTING,
    "tensor_parallel": OUR_SPLITTING,
    "expert_parallel": OUR_SPLITTING,
    "sequence_parallel_size": OUR_SPLITTING,
}
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
REMOVED_KEYS = frozenset(
    """amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients""".split()  # noqa: SIM905
)
# The keys of each section by the kind of their values. What our own sections decide is compared with them elsewhere.
_KEYS: dict[str, dict[str, str]] = {
    "": {
        "ours": "gradient_accumulation_steps gradient_clipping train_batch_size train_micro_batch_size_per_gpu",
        "section": "activation_checkpointing aio bf16 checkpoint comms_logger data_types flops_profiler fp16 optimizer timers "
        "zero_optimization " + " ".join(MONITORS),
        "flag": "dataloader_drop_last disable_allgather disable_python_gc dump_state memory_breakdown prescale_gradients "
        "use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
        "whole": "steps_per_print vocabulary_size",
        "number": "gradient_predivide_factor",
        "text": "gradient_allreduce_op",
        "level": "log_level",
        "dtype": "communication_data_type seq_parallel_communication_data_type",
    },
    "activation_checkpointing": {
        "flag": "partition_activations contiguous_memory_optimization cpu_checkpointing profile "
        "synchronize_checkpoint_boundary",
        "whole": "number_checkpoints",
    },
    "aio": {"flag": "single_submit overlap_events use_gds", "whole": "block_size queue_depth intra_op_parallelism"},
    "bf16": {
        "flag": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    },
    "checkpoint": {
        "flag": "load_universal use_node_local_storage checkpoint_serialization",
        "text": "tag_validation",
        "section": "parallel_write writer",
    },
    "checkpoint.parallel_write": {"flag": "pipeline_stage"},
    "comms_logger": {"flag": "enabled prof_all verbose debug", "list": "prof_ops"},
    "data_types": {"dtype": "grad_accum_dtype param_dtype buffer_dtype", "list": "keep_in_fp32_modules"},
    "flops_profiler": {
        "flag": "enabled detailed",
        "whole": "profile_step top_modules",
        "number": "recompute_fwd_factor",
        "depth": "module_depth",
        "text": "output_file",
    },
    "fp16": {
        "flag": "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
        "whole": "initial_scale_power loss_scale_window hysteresis min_loss_scale",
        "number": "loss_scale",
    },
    "optimizer": {"ours": "type params", "flag": "legacy_fusion"},
    "timers": {"section": "throughput"},
    "timers.throughput": {"flag": "enabled synchronized"},
    "zero_optimization": {
        "ours": "stage",
        "section": "offload_param offload_optimizer zenflow leaf_module",
        "flag": "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm "
        "compute_grad_norm load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save "
        "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_quantized_weights "
        "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint "
        "override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory "
        "cpu_offload cpu_offload_param cpu_offload_use_pin_memory",
        "whole": "reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
        "stage3_max_reuse_distance stage3_module_granularity_threshold zero_hpz_partition_size",
    },
    "zero_optimization.leaf_module": {"list": "classes names name_suffixes"},
    "zero_optimization.offload_optimizer": {
        "device": "device",
        "text": "nvme_path",
        "flag": "pin_memory pipeline_read pipeline_write fast_init super_offload",
        "whole": "buffer_count",
        "number": "ratio cpuadam_cores_perc",
    },
    "zero_optimization.offload_param": {
        "device": "device",
        "text": "nvme_path",
        "flag": "pin_memory",
        "whole": "buffer_count buffer_size max_in_cpu",
    },
}
SECTIONS = {
    section: {name: kind for kind, names in kinds.items() for name in names.split()} for section, kinds in _KEYS.items()
}
KNOWN_KEYS = SECTIONS[""].keys() | REFUSED_KEYS.keys()
_AUTO = ("fp16", "bf16", "zero_optimization")  # sections in which DeepSpeed takes "auto" for its default
_DTYPES = ("fp32", "fp16", "bf16")
_DEVICES = ("none", "cpu", "nvme")
_LEVELS = ("debug", "info", "warning", "error", "critical")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _is_whole(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "section": (lambda value: isinstance(value, Mapping), "a mapping"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "whole": (_is_whole, "a whole number of at least 0"),
    "depth": (lambda value: value == -1 or _is_whole(value), "a whole number, or -1 for all"),
    "number": (_is_number, "a number of at least 0"),
    "text": (lambda value: isinstance(value, str), "text"),
    "list": (lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of names"),
    "dtype": (lambda value: value in _DTYPES, " or ".join(_DTYPES)),
    "device": (lambda value: value in _DEVICES, " or ".join(_DEVICES)),
    "level": (lambda value: value in _LEVELS, " or ".join(_LEVELS)),
}


def key_faults(given: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path of each key that DeepSpeed or this project does not take, and what is wrong with it."""
    known = SECTIONS[section]
    for key, value in given.items():
        path = f"{section}.{key}" if section else key
        if not section and key in REMOVED_KEYS:
            yield path, "DeepSpeed has removed this feature; remove the key"
        elif not section and key in REFUSED_KEYS:
            off = value is None or value is False or (isinstance(value, dict) and value.get("enabled") is False)
            if not off:
                yield path, f"is not used: {REFUSED_KEYS[key]}; remove the key"
        elif key not in known:
            near = difflib.get_close_matches(key, KNOWN_KEYS if not section else known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else f"; {section} has {', '.join(known)}" if section else ""
            yield path, f"unknown DeepSpeed key{meant}"
        else:
            yield from _value_faults(path, value, known[key])


def _value_faults(path: str, value: Any, kind: str) -> Iterator[tuple[str, str]]:
    section = path.partition(".")[0]
    absent = value is None and (kind == "section" or section == "zero_optimization")
    if kind == "ours" or absent or (value == "auto" and section in _AUTO and "." in path):
        return
    fits, rule = _RULES[kind]
    if not fits(value):
        yield path, f"got {show(value)}, must be {rule}"
    elif path in MONITORS:
        if value.get("enabled", False) is not False:
            yield path, f"is not used: {OUR_METRICS}; remove the key"
    elif kind == "section" and path in SECTIONS:
        yield from key_faults(value, path)


def show(value: Any) -> str:
    """Return a value as JSON has it, text in quotes."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
