"""The DeepSpeed engine of a run and the few numbers the loop reads from it, right for every ZeRO stage and precision."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ...kernels.errors import UserError
from ...kernels.parallel.sharding import is_sharded
from ..config.batch import BatchPlan
from ..processes.topology import Topology
from .fp32_gradients import forget_skipped_sums, same_optimizer_at_stage_1, sum_in_fp32, with_fp32_sums
from .slices import SteppedInSlices, slices_of


def check_deepspeed_config(ds_config: dict[str, Any], topology: Topology) -> None:
    """Raise UserError if DeepSpeed refuses a JSON of its own, before anything has been prepared for a run."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    mpu = _parallel_unit(topology) if topology.tensor_parallel > 1 else None
    try:
        DeepSpeedConfig(copy.deepcopy(ds_config), mpu)
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:  # a pydantic.ValidationError is a ValueError
        said = " ".join(str(error).split())
        text = f"deepspeed: DeepSpeed refuses these settings ({said}); correct the section deepspeed"
        raise UserError(text) from error


def build_engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], topology: Topology
) -> Any:
    """Return a `deepspeed.DeepSpeedEngine` around `model`, moved to this process's device, that steps `optimizer`.

    Replicas have the weights of the first one afterwards, and no step is taken.
    ds_config: contents of a DeepSpeed JSON, without an optimizer or scheduler of its own.
    """
    import deepspeed  # here, as its import must come after `topology.quiet`

    stage = zero_stage(ds_config)
    ds_config = with_fp32_sums(ds_config, stage)
    clipping = float(ds_config.get("gradient_clipping", 0.0))
    if stage == 0:
        # At stage 0 DeepSpeed reports no norm in fp32, and in fp16 one that holds the loss scale: `_clip_before_step`
        # measures and clips the unscaled gradient instead.
        ds_config = {**ds_config, "gradient_clipping": 0.0}
    parameters = [param for group in optimizer.param_groups for param in group["params"]]
    sharded = [is_sharded(param) for param in parameters]
    with _no_steps(optimizer), same_optimizer_at_stage_1():
        engine, *_ = deepspeed.initialize(
            model=model.to(topology.device),
            optimizer=optimizer,
            config=ds_config,
            mpu=_parallel_unit(topology) if topology.tensor_parallel > 1 else None,
        )
    if stage == 0:
        _clip_before_step(engine, optimizer, clipping, sharded, topology.tensor_group)
        if topology.num_replicas == 1:
            # Its all-reduce among one copies every gradient into a buffer and back, for nothing.
            engine.enable_backward_allreduce = False
        if engine.optimizer is optimizer:
            # DeepSpeed's own looks through all modules for the parameters, every step.
            engine.zero_grad = optimizer.zero_grad
    elif stage < 3:
        forget_skipped_sums(engine.optimizer)
    if isinstance(optimizer, SteppedInSlices):
        slices = slices_of(engine, {id(param): place for place, param in enumerate(parameters)})
        optimizer.divide(slices, topology, replicated=stage == 0)
    return engine


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed JSON."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def grad_norm(engine: Any) -> float | None:
    """Return the 2-norm of the last step's whole gradient, unscaled and before clipping.

    It is inf if the gradient overflowed, and None before any step.
    """
    if step_was_skipped(engine):
        return math.inf
    norm = engine.stage0_grad_norm if engine.zero_optimization_stage() == 0 else engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def loss_scale(engine: Any) -> float | None:
    """Return the factor on the loss under fp16, None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def step_was_skipped(engine: Any) -> bool:
    """Return whether the last step left weights and moments as they were, because the gradient was not finite.

    This does not wait for the device: DeepSpeed has read the norm already, and at stage 0 `_clip_before_step` has.
    """
    return bool(getattr(engine.optimizer, "overflow", False))


def skipped_steps(engine: Any) -> int:
    """Return the number of steps of the whole run that left the weights as they were, as their gradient was not finite."""
    return int(engine.skipped_steps)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Make `lr` the learning rate of every parameter group from the next step on, times the `lr_factor` of a group with one."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def set_batch(engine: Any, batch: BatchPlan) -> None:
    """Make `batch` that of the next step on. Call it between two steps."""
    if (engine.train_micro_batch_size_per_gpu(), engine.train_batch_size()) == (
        batch.micro_batch_size,
        batch.train_batch_size,
    ):
        return
    engine.set_train_micro_batch_size(batch.micro_batch_size)
    engine.set_train_batch_size(batch.train_batch_size)
    engine.micro_steps = 0  # a step ends where the micro-batches since are a multiple of those of a step
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.gradient_accumulation_steps = batch.gradient_accumulation_steps


def _parallel_unit(topology: Topology) -> SimpleNamespace:
    """Return the groups of a run as DeepSpeed asks for them, its `mpu`."""
    ranks = range(topology.tensor_rank, topology.world_size, topology.tensor_parallel)
    return SimpleNamespace(
        get_model_parallel_rank=lambda: topology.tensor_rank,
        get_model_parallel_world_size=lambda: topology.tensor_parallel,
        get_model_parallel_group=lambda: topology.tensor_group,
        get_data_parallel_rank=lambda: topology.replica,
        get_data_parallel_world_size=lambda: topology.num_replicas,
        get_data_parallel_group=lambda: topology.data_group,
        get_data_parallel_group_ranks=lambda: list(ranks),
    )


@contextmanager
def _no_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let `optimizer.step()` do nothing while inside.

    The bf16 and fp16 wrappers of stage 0 step once with zero gradients when they are made. That would decay the weights,
    fill the moments and count a step before training begins.
    """
    optimizer.step = lambda *args, **kwargs: None  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del optimizer.step  # uncovers the method of the class


def _clip_before_step(
    engine: Any, optimizer: torch.optim.Optimizer, max_norm: float, sharded: list[bool], group: ProcessGroup | None
) -> None:
    """Let every step of `optimizer` note the gradient norm first and scale the gradient down to `max_norm` (0: leave it).

    In fp32 and bf16 also leave the step out if the norm is not finite, for which the host waits: in fp16 DeepSpeed does that.
    sharded: for each parameter, by position, whether the processes of `group` hold parts of it.
    """
    engine.stage0_grad_norm = None

    def clip() -> Tensor:
        parameters = [param for group in optimizer.param_groups for param in group["params"]]
        gradients = [(p.grad, part) for p, part in zip(parameters, sharded, strict=True) if p.grad is not None]
        if group is None:
            norm = get_total_norm([gradient for gradient, _ in gradients])
        else:
            square = get_total_norm([gradient for gradient, part in gradients if part]).square()
            dist.all_reduce(square, group=group)
            norm = (square + get_total_norm([gradient for gradient, part in gradients if not part]).square()).sqrt()
        if max_norm > 0:
            clip_grads_with_norm_(parameters, max_norm, norm)
        engine.stage0_grad_norm = norm
        return norm

    step = optimizer.step

    def step_if_finite() -> None:
        engine.optimizer.overflow = not bool(clip().isfinite())  # by which DeepSpeed counts skipped steps
        if not engine.optimizer.overflow:
            step()

    if engine.optimizer is optimizer:
        optimizer.step = step_if_finite  # type: ignore[assignment, method-assign]
    elif engine.bfloat16_enabled():
        sum_in_fp32(engine.optimizer, step_if_finite)
    else:
        optimizer.register_step_pre_hook(lambda stepping, args, kwargs: (clip(), None)[1])
