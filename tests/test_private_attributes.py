"""What we use of other libraries that they do not document: it may go with any version, and then fails here by its name.

An entry of USES says where a name lives and which of our folders use it. `a.b.c` is found by importing; `a.b:Name` is in the
module `a.b`, `a.b:Class.name` in the class or its objects; `a.b:*.name` is put on any object by the code of that module; `|`
stands between places of different versions.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
STAGE_0 = "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"
STAGE_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
STAGE_3_PARAMETER = "deepspeed.runtime.zero.partition_parameters:*"
SCALER = "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler"
SCALE_CONFIG = "deepspeed.runtime.fp16.loss_scaler:LossScaleConfig"
FRAGMENT = "deepspeed.utils.tensor_fragment"
WRITER = "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine"

USES = {
    f"{ENGINE}._copy_recovery_script": "launcher/checkpoint",
    f"{ENGINE}._get_all_ckpt_names": "launcher/checkpoint",
    f"{ENGINE}._get_ckpt_name": "launcher/checkpoint",
    f"{ENGINE}.basic_optimizer": "launcher/checkpoint launcher/optim launcher/training",
    f"{ENGINE}._do_optimizer_sanity_check": "launcher/optim",
    f"{ENGINE}.bfloat16_enabled": "launcher/checkpoint launcher/optim",
    f"{ENGINE}.checkpoint_engine": "launcher/checkpoint",
    f"{ENGINE}.enable_backward_allreduce": "launcher/optim",
    f"{ENGINE}.zero_grad": "launcher/optim",
    f"{ENGINE}.fp16_enabled": "launcher/checkpoint launcher/optim",
    f"{ENGINE}.global_samples": "launcher/checkpoint",
    f"{ENGINE}.global_steps": "launcher/checkpoint",
    f"{ENGINE}.load_universal_checkpoint": "launcher/checkpoint",
    f"{ENGINE}.micro_steps": "launcher/optim",
    f"{ENGINE}.mp_world_size": "launcher/checkpoint",
    f"{ENGINE}.skipped_steps": "launcher/checkpoint launcher/optim",
    f"{ENGINE}.world_size": "launcher/checkpoint",
    f"{ENGINE}.zero_optimization_stage": "launcher/checkpoint launcher/optim",
    f"{STAGE_0}.clip_grad": "launcher/checkpoint",
    f"{STAGE_0}.fp16_groups": "launcher/optim",
    f"{STAGE_0}.fp32_groups": "launcher/optim",
    f"{STAGE_0}.loss_scale": "launcher/optim",
    f"{STAGE_0}.loss_scale_config": "launcher/checkpoint",
    f"{STAGE_0}.overflow": "launcher/optim",
    f"{STAGE_2}.all_grad_tensors": "launcher/optim",
    f"{STAGE_2}.averaged_gradients": "launcher/optim",
    f"{STAGE_2}.bit16_groups": "launcher/optim",
    f"{STAGE_2}.reset_cpu_buffers": "launcher/optim",
    f"{STAGE_2}.gradient_accumulation_steps": "launcher/optim",
    f"{STAGE_2}.single_partition_of_fp32_groups": "launcher/optim",
    f"{STAGE_3}.checkpoint_event_epilogue": "launcher/optim",
    f"{STAGE_3}.checkpoint_event_prologue": "launcher/optim",
    f"{STAGE_3}.fp16_groups": "launcher/optim",
    f"{STAGE_3}.fp32_partitioned_groups_flat": "launcher/optim",
    **{f"{zero}.{name}": "launcher/checkpoint" for zero in (STAGE_2, STAGE_3) for name in ("clip_grad", "loss_scaler")},
    **{f"{zero}.{name}": "launcher/optim" for zero in (STAGE_2, STAGE_3) for name in ("loss_scale", "overflow")},
    f"{STAGE_3_PARAMETER}.ds_id": "recipes/policies",
    f"{STAGE_3_PARAMETER}.ds_numel": "launcher/optim launcher/training",
    f"{STAGE_3_PARAMETER}.ds_process_group": "launcher/optim",
    f"{STAGE_3_PARAMETER}.ds_shape": "launcher/checkpoint",
    f"{STAGE_3_PARAMETER}.ds_tensor": "launcher/checkpoint launcher/optim",
    f"{STAGE_3_PARAMETER}.partition_numel": "launcher/optim",
    **{
        f"{holder}.{name}": "launcher/checkpoint"
        for holder in (SCALER, SCALE_CONFIG)
        for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        if (holder, name) != (SCALE_CONFIG, "cur_hysteresis")
    },
    f"{FRAGMENT}:fragment_address": "launcher/checkpoint",
    "deepspeed.utils.mixed_precision_linkage:*._hp_mapping": "launcher/optim",
    f"{FRAGMENT}:tensor_fragment.get_hp_fragment_address": "launcher/optim",
    f"{FRAGMENT}:tensor_fragment.lp_fragment_address": "launcher/optim",
    f"{FRAGMENT}:fragment_address.numel": "launcher/optim",
    f"{FRAGMENT}:fragment_address.start": "launcher/optim",
    f"{WRITER}.TorchCheckpointEngine": "launcher/checkpoint",
    f"{WRITER}:TorchCheckpointEngine.load": "launcher/checkpoint",
    f"{WRITER}:TorchCheckpointEngine.makedirs": "launcher/checkpoint",
    f"{WRITER}:TorchCheckpointEngine.save": "launcher/checkpoint",
    "deepspeed.comm.destroy_process_group": "launcher/processes",
    "deepspeed.ops.transformer:DeepSpeedTransformerConfig": "scripts/bench",
    "deepspeed.ops.transformer:DeepSpeedTransformerLayer": "scripts/bench",
    "deepspeed.ops.__compatible_ops__": "launcher/processes",
    "deepspeed.runtime.zero.utils.ZeRORuntimeException": "launcher/checkpoint",
    "deepspeed.runtime.constants.BFLOAT16": "launcher/optim",
    "deepspeed.runtime.engine.DeepSpeedEngine": "launcher/optim",
    "deepspeed.runtime.zero.config.ZERO_OPTIMIZATION": "launcher/optim",
    "deepspeed.runtime.config.DeepSpeedConfig": "launcher/optim",
    "deepspeed.runtime.config.DeepSpeedConfigError": "launcher/optim",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": "launcher/checkpoint",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": "launcher/checkpoint",
    "deepspeed.runtime.zero.config.ZeroStageEnum": "launcher/checkpoint",
    "torch._C._current_graph_task_id": "kernels/fp8",
    "torch._foreach_add_": "launcher/optim",
    "torch._foreach_addcmul_": "launcher/optim",
    "torch._foreach_copy_": "launcher/optim",
    "torch._foreach_div": "launcher/optim",
    "torch._foreach_div_": "launcher/optim",
    "torch._foreach_lerp": "launcher/optim",
    "torch._foreach_lerp_": "launcher/optim",
    "torch._foreach_mul_": "launcher/optim",
    "torch._foreach_norm": "launcher/optim",
    "torch._foreach_sqrt": "launcher/optim",
    "torch._scaled_mm": "kernels/fp8",
    "torch._softmax_backward_data": "kernels/ops",
    "torch.autograd.Variable._execution_engine": "kernels/ops",
    "torch.autograd.Variable._execution_engine.queue_callback": "kernels/ops",
    "torch.cuda._sleep": "scripts/bench",
    "torch.distributed.distributed_c10d.default_pg_nccl_timeout": "launcher/processes",
    "torch.distributed.distributed_c10d.default_pg_timeout": "launcher/processes",
    "torch.nn.Module._apply": "kernels/layers",
    "torch.nn.Module._load_from_state_dict": "kernels/te recipes/policies",
    "torch.nn:Module._backward_hooks": "kernels/layers",
    "torch.nn:Module._backward_pre_hooks": "kernels/layers",
    "torch.nn:Module._forward_hooks": "kernels/layers recipes/policies",
    "torch.nn:Module._forward_pre_hooks": "kernels/layers recipes/policies",
    "torch.nn:Module._modules": "kernels/layers recipes/policies",
    "torch.nn:Module._parameters": "kernels/parallel kernels/te recipes/policies",
    "torch.ops.aten._log_softmax_backward_data": "kernels/ops",
    "torch.ops.aten._unsafe_view": "kernels/ops",
    "torch.ops.mkldnn._linear_pointwise": "kernels/ops",
    "torch.Tensor._post_accumulate_grad_hooks": "kernels/ops",
    "torch.Tensor._version": "kernels/fp8 kernels/te recipes/policies",
    "torch.UntypedStorage._cdata": "scripts/bench",
    "torch.utils._pytree.TreeSpec": "kernels/te",
    "torch.utils._pytree.tree_flatten": "kernels/te",
    "torch.utils._pytree.tree_leaves": "recipes/policies",
    "torch.utils._pytree.tree_map": "recipes/policies",
    "torch.utils._pytree.tree_unflatten": "kernels/te",
    "datasets:Dataset._fingerprint": "recipes/data",
    "transformers.PretrainedConfig._attn_implementation": "recipes/policies",
    "typer._click.core:Context._protected_args | click.core:Context._protected_args": "launcher/commands",
}
# Of transformers 5 alone; before it no hooks collect outputs.
CAPTURE = "transformers.utils.output_capturing:*._output_capturing_hooks_installed"
# Private in name only: Python documents them.
PYTHON = {"_asdict", "_fields", "_replace", "_exit", "_current_frames"}
OURS_ON_OTHERS = {"_fused_layer_mask", "stage0_grad_norm"}
# What DeepSpeed documents of its engine.
ENGINE_API = {"backward", "eval", "load_checkpoint", "module", "optimizer", "save_checkpoint", "step", "train"}
ENGINE_API |= {"get_global_grad_norm", "set_train_batch_size", "set_train_micro_batch_size"}
ENGINE_API |= {"train_batch_size", "train_micro_batch_size_per_gpu"}
# Variables that hold objects of DeepSpeed, and the folder in which they do.
VARIABLES = {"engine": "launcher", "optimizer": "launcher/optim/slices.py", "mapping": "launcher/optim/slices.py"}
OPTIMIZER_API = {"param_groups"}


def is_there(place):
    """Whether one of the alternatives of an entry exists."""
    return any(_exists(one.strip()) for one in place.split("|"))


def _exists(place):
    if ":" not in place:
        return _attribute(place)
    module_name, _, path = place.partition(":")
    holder, _, name = path.partition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return False
    if holder == "*":
        return name in _assigned(inspect.getsource(module))
    if not name or not hasattr(module, holder):
        return hasattr(module, holder)
    classes = [cls for cls in getattr(module, holder).__mro__ if cls is not object]
    if any(name in vars(cls) or name in vars(cls).get("__annotations__", {}) for cls in classes):
        return True
    return any(name in _assigned(inspect.getsource(cls)) for cls in classes if cls.__module__ != "builtins")


def _attribute(place):
    parts = place.split(".")
    found = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[: depth + 1]))
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


def _assigned(source):
    """Attributes that a piece of source assigns, and those it defines as methods or fields."""
    tree = ast.parse(inspect.cleandoc(source) if source.startswith(" ") else source)
    names = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and len(node.args) > 1:
            names.add(getattr(node.args[1], "value", None))
    return names


@pytest.mark.parametrize("place", USES)
def test_the_installed_version_has(place):
    package = place.replace(":", ".").split(".")[0]
    pytest.importorskip(package)
    assert is_there(place), f"{place} is gone; {USES[place]} use it"


@pytest.mark.parametrize(
    "place",
    [
        "torch._gone",
        "torch.gone.name",
        "torch.nn:Gone",
        "torch.nn:Module._gone",
        "torch.gone:Module.name",
        "torch.nn.modules.module:*._gone",
        "torch._gone | torch.nn:Module._gone",
    ],
)
def test_a_name_that_is_gone_is_found_out(place):
    assert not is_there(place)


def test_the_installed_transformers_marks_modules_whose_outputs_it_collects():
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert is_there(CAPTURE), f"{CAPTURE} is gone; recipes/policies use it"


def _sources():
    for room in ("kernels", "recipes", "launcher", "scripts"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def _own_names():
    """Every name that our source defines."""
    names = set()
    for _, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and "self" in ast.unparse(node):
                names.add(node.attr)
    return names


def _last(place):
    """The name at the end of an entry."""
    return place.split("|")[0].strip().replace(":", ".").split(".")[-1]


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


def _uses(path, tree):
    """Names that one file uses of objects of others: private ones, and any of what VARIABLES hold."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if _is_private(node.attr):
                yield node.attr
            holder = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
            if holder in VARIABLES and path.startswith(VARIABLES[holder]):
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = getattr(node.args[1], "value", "")
            if isinstance(name, str) and (_is_private(name) or name.startswith("ds_")):
                yield name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            inside = node.module.startswith("deepspeed.") or any(map(_is_private, node.module.split(".")))
            yield from (alias.name for alias in node.names if inside or _is_private(alias.name))


def test_no_other_name_is_used_that_a_library_does_not_document():
    """A new one belongs into USES, where a version without it is noticed."""
    listed = {_last(place) for place in (*USES, CAPTURE)} | PYTHON | OURS_ON_OTHERS | {"_C"}
    own = _own_names()
    for path, tree in _sources():
        used = set(_uses(path, tree))
        new = used - listed - {name for name in own if _is_private(name)} - ENGINE_API - OPTIMIZER_API
        assert not new, f"{path} uses {sorted(new)}"


def test_each_folder_that_is_named_still_uses_the_name():
    text = {}
    for path, _ in _sources():
        folder = "/".join(path.split("/")[:2])
        text[folder] = text.get(folder, "") + (ROOT / path).read_text(encoding="utf-8")
    for place, folders in USES.items():
        name = _last(place)
        unused = [folder for folder in folders.split() if name not in text[folder]]
        assert not unused, f"{unused} use {place} no more; take it out of USES"
