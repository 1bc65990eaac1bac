"""Gradients of bf16 weights, added up in fp32 over the micro-batches of a step at every ZeRO stage.

In bf16 a sum stops growing once it is 256 times the next term. DeepSpeed adds in fp32 where it shards gradients (stages 2 and
3), if asked; at stage 0 it cannot, and at stage 1 only in an optimizer of its own that shards nothing but the step.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def with_fp32_sums(ds_config: dict[str, Any], stage: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON with the keys by which gradients of bf16 weights add up in fp32, between processes too.

    At stage 0 DeepSpeed has none for micro-batches, and refuses the one of the other stages: see `sum_in_fp32`. A dtype that is
    given for what processes send each other stays.
    """
    if not ds_config.get("bf16", {}).get("enabled"):
        return ds_config
    data_types = {**ds_config.get("data_types", {}), "grad_accum_dtype": "fp32" if stage > 0 else None}
    return {"communication_data_type": "fp32", **ds_config, "data_types": data_types}


def sum_in_fp32(wrapper: Any, step: Callable[[], None]) -> None:
    """Let gradients of the weights of DeepSpeed's bf16 wrapper of stage 0 add up as those of their fp32 copies.

    step: steps the copies by their gradients, or leaves them as they are.
    """
    weights = [weight for group in wrapper.fp16_groups for weight in group]
    copies = [copy for group in wrapper.fp32_groups for copy in group]
    for weight, copy in zip(weights, copies, strict=True):
        weight.register_post_accumulate_grad_hook(functools.partial(_move_gradient, copy))

    def gradients() -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        for copy in copies:
            if copy.grad is None:  # unused in this step, perhaps not so on other processes
                copy.grad = torch.zeros_like(copy)
        return [copy.grad for copy in copies], {}

    @torch.no_grad()
    def step_copies() -> None:
        gradients()
        step()
        torch._foreach_copy_(weights, copies)
        for copy in copies:
            copy.grad = None

    wrapper.get_grads_for_reduction, wrapper.step = gradients, step_copies


@torch.no_grad()
def _move_gradient(copy: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None, "autograd calls this when it is there"
    if copy.grad is None:
        copy.grad = weight.grad.float()
    else:
        copy.grad.add_(weight.grad)
    weight.grad = None


@contextmanager
def same_optimizer_at_stage_1() -> Iterator[None]:
    """Let engines that are made inside take DeepSpeed's optimizer of stages 1 and 2 for fp32 sums at stage 1 too.

    The other one that it takes there reduces whole gradients to every process, and writes other files.
    """
    from deepspeed.runtime.constants import BFLOAT16
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(engine: Any, optimizer: Any) -> Any:
        chosen = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if chosen == BFLOAT16 else chosen

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def forget_skipped_sums(optimizer: Any) -> None:
    """Let DeepSpeed's optimizer of stages 1 and 2, where it offloads, forget the gradients of a step that it leaves out.

    It keeps them at stage 1 in fp32 sums, to which those of the next steps are added, so that every later step is left out.
    """
    reset = optimizer.reset_cpu_buffers

    def reset_with_sums() -> None:
        reset()
        for sums in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            sums.update(dict.fromkeys(sums))

    optimizer.reset_cpu_buffers = reset_with_sums
