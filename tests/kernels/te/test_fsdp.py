"""A te.TransformerLayer whose parts are wrapped singly by FSDP, which frees their parameters behind each forward pass."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from xformer_train.kernels import te

PARTS = {
    "none": [],
    "halves": ["self_attention", "layernorm_mlp"],
    "projections": ["self_attention.layernorm_qkv", "self_attention.proj", "layernorm_mlp"],
    "cross": ["inter_attention.key_value", "inter_attention", "layernorm"],
}
KINDS = {
    "fused": {"fuse_qkv_params": True},
    "apart": {},
    "decoder": {"layer_type": "decoder", "output_layernorm": True, "fuse_qkv_params": True},
}


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def outcome(layer, x, memory):
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    y = layer(leaf, **memory)
    y.square().sum().backward()
    return y, leaf.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_parts_wrapped_by_fully_shard_give_what_the_layer_gives(mesh, kind, parts):
    torch.manual_seed(0)
    layer, x = te.TransformerLayer(32, 64, 4, **KINDS[kind]), torch.randn(5, 2, 32)
    memory = {"encoder_output": torch.randn(4, 2, 32)} if kind == "decoder" else {}
    plain = copy.deepcopy(layer)
    names = [name for name in PARTS[parts] if name in dict(layer.named_modules())]
    for name in names:
        fully_shard(layer.get_submodule(name), mesh=mesh)
    fully_shard(layer, mesh=mesh)
    for ours, theirs in zip(outcome(layer, x, memory), outcome(plain, x, memory), strict=True):
        assert torch.equal(ours, theirs)
    for (name, ours), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, msg=name)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_wrapped_by_the_first_fsdp_do_too(mesh, kind, original):
    torch.manual_seed(0)
    layer, x = te.TransformerLayer(32, 64, 4, **KINDS[kind]), torch.randn(5, 2, 32)
    memory = {"encoder_output": torch.randn(4, 2, 32)} if kind == "decoder" else {}
    plain = copy.deepcopy(layer)
    kinds = (te.Linear, te.LayerNormLinear, te.LayerNormMLP, te.LayerNorm)
    options = {"use_orig_params": original, "device_id": torch.device("cpu")}
    options["sharding_strategy"] = ShardingStrategy.FULL_SHARD
    wrapped = FullyShardedDataParallel(layer, auto_wrap_policy=lambda module, **_: isinstance(module, kinds), **options)
    for ours, theirs in zip(outcome(wrapped, x, memory), outcome(plain, x, memory), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("build", [te.Linear, te.LayerNormLinear, te.LayerNormMLP])
def test_a_bias_that_is_handed_out_outlives_the_parameters(mesh, build):
    module, x = build(16, 16, return_bias=True), torch.randn(3, 16)
    bias = module.fc2_bias if build is te.LayerNormMLP else module.bias
    torch.nn.init.normal_(bias)
    expected = bias.detach().clone()
    fully_shard(module, mesh=mesh)
    out, handed = module(x)
    assert torch.equal(handed, expected)
    (out + handed).sum().backward()
    name = "fc2_bias" if build is te.LayerNormMLP else "bias"
    assert torch.equal(module.get_parameter(name).grad.full_tensor(), torch.full((16,), 3.0))
