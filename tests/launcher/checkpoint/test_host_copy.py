"""Copies of state: equal, apart from their source, sharing memory as it did, in buffers that are used again."""

from collections import OrderedDict

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from xformer_train.launcher.checkpoint.host_copy import HostCopies


def test_a_copy_is_equal_and_no_longer_changes_with_its_source():
    weight, step, scaler = torch.randn(3, 4), torch.tensor(5.0), LossScaler(8.0)
    state = {
        "module": OrderedDict(w=weight, b=torch.zeros(0)),
        "steps": [step, (step, 3)],
        "scaler": scaler,
        "none": None,
    }
    copy = HostCopies().copy(state)
    before = weight.clone()
    weight.add_(1)
    step.add_(1)
    scaler.cur_scale = 2.0
    state["module"]["new"] = weight
    assert torch.equal(copy["module"].pop("w"), before)
    assert list(copy["module"]) == ["b"] and copy["module"]["b"].numel() == 0
    assert (copy["steps"][0].item(), copy["steps"][1][0].item(), copy["steps"][1][1]) == (5.0, 5.0, 3)
    assert (copy["scaler"].cur_scale, copy["none"]) == (8.0, None)


def test_attributes_of_a_state_dict_are_copied_too():
    """torch keeps versions of modules in one, which a checkpoint must hold."""
    state = torch.nn.LayerNorm(3).state_dict()
    assert HostCopies().copy(state)._metadata == state._metadata


def test_views_stay_views_of_one_memory():
    flat = torch.arange(12.0)
    state = {"flat": flat, "first": flat[:6].view(2, 3), "columns": flat.view(3, 4).T}
    copy = HostCopies().copy(state)
    for name, tensor in state.items():
        assert torch.equal(copy[name], tensor)
        assert (copy[name].stride(), copy[name].storage_offset()) == (tensor.stride(), tensor.storage_offset())
    copy["flat"][0] = 100
    assert copy["first"][0, 0] == copy["columns"][0, 0] == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_every_dtype_keeps_its_bits(dtype):
    tensor = torch.randint(0, 2, (5, 7)).to(dtype)
    copy = HostCopies().copy([tensor, torch.zeros(0, dtype=dtype), torch.zeros(0)])
    assert copy[0].dtype is dtype and torch.equal(copy[0].view(torch.uint8), tensor.view(torch.uint8))
    assert [empty.dtype for empty in copy[1:]] == [dtype, torch.float32]


def test_parameters_become_tensors_outside_the_graph():
    parameter = torch.nn.Parameter(torch.ones(2))
    copy = HostCopies().copy([parameter, parameter * 2])
    assert not any(tensor.requires_grad for tensor in copy)


def test_the_next_set_uses_the_memory_of_the_last():
    copies = HostCopies()
    copies.begin()
    first = copies.copy([torch.ones(100), torch.ones(100)])
    also = copies.copy(torch.ones(100))
    addresses = {tensor.data_ptr() for tensor in (*first, also)}
    assert len(addresses) == 3
    copies.begin()
    second = copies.copy([torch.zeros(100), torch.zeros(100), torch.zeros(100)])
    assert {tensor.data_ptr() for tensor in second} == addresses
    assert not any(tensor.any() for tensor in second)
