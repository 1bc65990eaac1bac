"""What a layer keeps for backward: the formula against what autograd holds, to the byte.

Triton's path is checked on a CPU with the attention kernel's place taken by a function that allocates what the kernel
allocates, since the autograd function around it decides what is kept; and on a GPU with the kernel itself.
"""

import dataclasses
import itertools
import math
import sys
import types

import pytest
import torch
from saved_activations import count_saved_bytes, saved_activations
from torch.profiler import ProfilerActivity, profile

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, TransformerLayer
from xformer_train.kernels.ops.attention import attention

BATCH, LENGTH = 3, 7
CONFIG = LayerConfig(hidden_size=24, num_attention_heads=3, intermediate_size=40)
FLAGS = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "stochastic_mode")
PLACEMENTS = pytest.mark.parametrize("pre_layer_norm", [True, False], ids=["pre", "post"])
CHOICES_OF_FLAGS = pytest.mark.parametrize(
    "flags",
    [dict(zip(FLAGS, values, strict=True)) for values in itertools.product([False, True], repeat=len(FLAGS))],
    ids=lambda flags: "+".join(name for name in FLAGS if flags[name]) or "none",
)
DROPOUTS = pytest.mark.parametrize(
    "dropouts",
    [(0.0, 0.0), (0.2, 0.2), (0.2, 0.0), (0.0, 0.2)],
    ids=lambda p: f"hidden{p[0]}-attention{p[1]}",
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


NO_BIAS = {"norm_bias": False, "attention_bias": False, "mlp_bias": False}
GATED = dataclasses.replace(CONFIG, gated_mlp=True, rope_theta=1e4, **NO_BIAS)
LLAMA = dataclasses.replace(GATED, norm="rms_norm", hidden_act="silu", num_attention_heads=6, num_key_value_heads=2)
MODERN = {
    "modernbert": GATED,
    "modernbert's first": dataclasses.replace(GATED, norm_before_attention=False),
    "modernbert, local": dataclasses.replace(GATED, attention_window=3),
    "llama": LLAMA,
    "mistral": dataclasses.replace(LLAMA, attention_window=5, head_dim=6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=10),
    "post-LN, RMSNorm, no positions": dataclasses.replace(LLAMA, pre_layer_norm=False, rope_theta=None),
    "a window over the length": dataclasses.replace(GATED, attention_window=200),
}
LONG = 67  # two blocks of a window
LONG_BORDERS = torch.tensor([0, LONG, 100], dtype=torch.int32)


def config_of(pre_layer_norm, flags, dropouts=(0.2, 0.2)):
    hidden, attention_probs = dropouts
    return dataclasses.replace(
        CONFIG,
        pre_layer_norm=pre_layer_norm,
        hidden_dropout_prob=hidden,
        attention_probs_dropout_prob=attention_probs,
        **flags,
    )


def stack_of(config, depth, dtype, device="cpu"):
    with torch.device(device):
        return torch.nn.ModuleList(TransformerLayer(config) for _ in range(depth)).to(dtype)


def run(stack, hidden, mask=None):
    for layer in stack:
        hidden = layer(hidden, mask)
    return hidden


def counted(stack, x, mask=None):
    return count_saved_bytes(lambda: run(stack, x, mask), stack.parameters())


def input_of(dtype, shape=(BATCH, LENGTH, 24)):
    return torch.randn(shape).to(dtype).requires_grad_()


def formula(config, dtype, **options):
    return sum(saved_activations(config, BATCH, LENGTH, dtype, **{"triton_attention": False, **options}).values())


@DTYPES
@DROPOUTS
@CHOICES_OF_FLAGS
@PLACEMENTS
def test_a_layer_and_a_stack_keep_what_the_formula_says(pre_layer_norm, flags, dropouts, dtype):
    config = config_of(pre_layer_norm, flags, dropouts)
    expected = formula(config, dtype)
    stack, x = stack_of(config, 3, dtype), input_of(dtype)
    assert counted(stack[:1], x) == expected
    assert counted(stack, x) == 3 * expected
    assert counted(stack.eval(), x) == 3 * formula(config, dtype, training=False)


@DROPOUTS
@pytest.mark.parametrize("flags", [{}, dict.fromkeys(FLAGS, True)], ids=["no flags", "all flags"])
@PLACEMENTS
@pytest.mark.parametrize("choice", ["selective", "full"])
def test_a_stack_with_activation_checkpointing_keeps_what_the_formula_says(choice, pre_layer_norm, flags, dropouts):
    config = config_of(pre_layer_norm, flags, dropouts)
    stack, x = LayerStack(config, 3, activation_checkpointing=choice), input_of(torch.float32)
    expected = formula(config, torch.float32, activation_checkpointing=choice)
    assert count_saved_bytes(lambda: stack(x, AttentionMask()), stack.parameters()) == 3 * expected
    assert expected <= formula(config, torch.float32)


@pytest.mark.usefixtures("attention_of_triton")
@pytest.mark.parametrize("choice", ["selective", "full"])
def test_activation_checkpointing_on_the_path_of_triton(choice):
    """Selective changes nothing there."""
    config, x = config_of(True, {}), input_of(torch.float32)
    options = {"triton_attention": True, "activation_checkpointing": choice}
    stack = LayerStack(config, 3, activation_checkpointing=choice)
    counted = count_saved_bytes(lambda: stack(x, AttentionMask()), stack.parameters())
    assert counted == 3 * formula(config, torch.float32, **options)
    kept_less = counted < 3 * formula(config, torch.float32, triton_attention=True)
    assert kept_less == (choice == "full")


@pytest.mark.parametrize("choice", ["selective", "full"])
def test_of_a_packed_batch_activation_checkpointing_keeps_tokens_only(choice):
    config = config_of(True, {}, (0.2, 0.2))
    mask = AttentionMask(cu_seqlens=torch.tensor([0, 7, 9, 14], dtype=torch.int32), max_length=LENGTH)
    shallow, deep = (LayerStack(config, depth, activation_checkpointing=choice) for depth in (1, 3))
    x = input_of(torch.float32, (14, 24))
    one, three = (count_saved_bytes(lambda s=s: s(x, mask), s.parameters()) for s in (shallow, deep))
    assert three - one == 2 * formula(config, torch.float32, tokens=14, activation_checkpointing=choice)


@pytest.fixture
def attention_of_triton(monkeypatch):
    """On a CPU, _TritonAttention runs with a stand-in for the kernel's launch function."""

    def forward(qkv, key_heads):
        tokens, heads, size = qkv.shape[:-3], *qkv.shape[-2:]
        if key_heads is not None:
            tokens, heads = qkv.shape[:-2], heads - 2 * key_heads
        rows = math.ceil(tokens.numel() / 16) * 16
        return qkv.new_empty((*tokens, heads * size)), qkv.new_empty((heads, rows), dtype=torch.float32)

    monkeypatch.setattr(attention, "uses_triton", lambda *_: True)
    monkeypatch.setitem(
        sys.modules,
        attention.__package__ + ".attention_triton",
        types.SimpleNamespace(forward=forward, Options=lambda *arguments: arguments[-3]),
    )


@pytest.mark.usefixtures("attention_of_triton")
@DTYPES
@DROPOUTS
@CHOICES_OF_FLAGS
@PLACEMENTS
def test_the_path_of_triton_keeps_what_the_formula_says(pre_layer_norm, flags, dropouts, dtype):
    config = config_of(pre_layer_norm, flags, dropouts)
    stack, x = stack_of(config, 3, dtype), input_of(dtype)
    assert counted(stack, x) == 3 * formula(config, dtype, triton_attention=True)


def counted_of_two(stack, x, mask):
    """What two layers keep, without what the mask makes for all."""
    return counted(stack, x, mask) - counted(stack[:1], x, mask)


MODERN_FLAGS = pytest.mark.parametrize("flags", [{}, dict.fromkeys(FLAGS, True)], ids=["no flags", "all flags"])
KINDS = pytest.mark.parametrize("kind", MODERN.values(), ids=MODERN)


@pytest.mark.filterwarnings("error:normalize_invertible")
@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
@MODERN_FLAGS
@KINDS
def test_layers_of_today_keep_what_the_formula_says(kind, flags, p, dtype, causal):
    config = dataclasses.replace(kind, hidden_dropout_prob=p, attention_probs_dropout_prob=p, **flags)
    stack = stack_of(config, 3, dtype)
    options = {"triton_attention": False, "causal": causal}
    padded = AttentionMask(causal=causal, key_mask=torch.arange(LONG) < torch.tensor([[LONG], [33]]))
    expected = sum(saved_activations(config, 2, LONG, dtype, **options).values())
    assert counted_of_two(stack, input_of(dtype, (2, LONG, 24)), padded) == 2 * expected
    packed = AttentionMask(causal=causal, cu_seqlens=LONG_BORDERS, max_length=LONG)
    expected = sum(saved_activations(config, 2, LONG, dtype, tokens=100, **options).values())
    assert counted_of_two(stack, input_of(dtype, (100, 24)), packed) == 2 * expected


@KINDS
@pytest.mark.parametrize("choice", ["selective", "full"])
def test_layers_of_today_keep_less_with_activation_checkpointing(choice, kind):
    config = dataclasses.replace(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.2)
    shallow, deep = (LayerStack(config, depth, activation_checkpointing=choice) for depth in (1, 3))
    mask, x = AttentionMask(causal=True), input_of(torch.float32, (2, LONG, 24))
    options = {"triton_attention": False, "causal": True, "activation_checkpointing": choice}
    one, three = (count_saved_bytes(lambda s=s: s(x, mask), s.parameters()) for s in (shallow, deep))
    assert three - one == 2 * sum(saved_activations(config, 2, LONG, torch.float32, **options).values())


@pytest.mark.usefixtures("attention_of_triton")
@DTYPES
@MODERN_FLAGS
@KINDS
def test_layers_of_today_keep_what_the_formula_says_on_the_path_of_triton(kind, flags, dtype):
    config = dataclasses.replace(kind, **flags)
    stack, x = stack_of(config, 3, dtype), input_of(dtype, (2, LONG, 24))
    expected = sum(saved_activations(config, 2, LONG, dtype, triton_attention=True).values())
    assert counted_of_two(stack, x, AttentionMask()) == 2 * expected


def test_what_a_window_keeps_grows_with_the_length_and_not_with_its_square():
    config = dataclasses.replace(GATED, attention_window=3)
    short, long = (
        saved_activations(config, 1, length, torch.float32, triton_attention=False)["probabilities"]
        for length in (1024, 8192)
    )
    assert long == 8 * short


MASKS = {
    "padding": AttentionMask(key_mask=torch.arange(LENGTH) < torch.tensor([[7], [2], [5]])),
    "causal": AttentionMask(causal=True),
}


@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (0.2, 0.2)], ids=["p=0", "p>0"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_is_kept_once_for_all_layers(mask, dropouts):
    """So two layers more, in a stack that has one, keep twice the formula."""
    config = config_of(True, {}, dropouts)
    stack, x = stack_of(config, 3, torch.float32), input_of(torch.float32)
    assert counted(stack, x, mask) - counted(stack[:1], x, mask) == 2 * formula(config, torch.float32)


@DROPOUTS
def test_a_packed_batch_keeps_its_tokens_only_but_for_padded_attention(dropouts):
    config = config_of(True, {}, dropouts)
    mask = AttentionMask(cu_seqlens=torch.tensor([0, 7, 9, 14], dtype=torch.int32), max_length=LENGTH)
    stack, x = stack_of(config, 3, torch.float32), input_of(torch.float32, (14, 24))
    per_layer = formula(config, torch.float32, tokens=14)
    assert counted(stack, x, mask) - counted(stack[:1], x, mask) == 2 * per_layer


@pytest.mark.usefixtures("attention_of_triton")
def test_a_packed_batch_keeps_its_tokens_only_on_the_path_of_triton():
    config = config_of(True, {})
    mask = AttentionMask(cu_seqlens=torch.tensor([0, 7, 9, 14], dtype=torch.int32), max_length=LENGTH)
    stack, x = stack_of(config, 3, torch.float32), input_of(torch.float32, (14, 24))
    per_layer = formula(config, torch.float32, tokens=14, triton_attention=True)
    assert counted(stack, x, mask) - counted(stack[:1], x, mask) == 2 * per_layer


@CHOICES_OF_FLAGS
@PLACEMENTS
def test_nothing_is_kept_behind_autograds_back(pre_layer_norm, flags):
    """Hooks do not see what a function keeps in attributes of its own, so here the allocator's events are added up."""
    config = config_of(pre_layer_norm, flags)
    layer, x = TransformerLayer(config), input_of(torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = layer(x)
    events = profiler.profiler.kineto_results.events()
    left = sum(event.nbytes() for event in events if event.name() == "[memory]")  # negative where memory was freed
    kept = saved_activations(config, BATCH, LENGTH, torch.float32, triton_attention=False)
    made_before = kept.get("input", 0)  # x
    assert left == sum(kept.values()) - made_before + y.nbytes


@PLACEMENTS
def test_each_memory_flag_drops_the_tensors_it_names(pre_layer_norm):
    base = saved_activations(config_of(pre_layer_norm, {}), BATCH, LENGTH, torch.float32, triton_attention=False)

    def dropped(flag, triton_attention=False):
        config = config_of(pre_layer_norm, {flag: True})
        kept = saved_activations(config, BATCH, LENGTH, torch.float32, triton_attention=triton_attention)
        return base.keys() - kept.keys() - ({"probabilities", "dropped_probabilities"} if triton_attention else set())

    norm_inputs = {"attention_residual", "input" if pre_layer_norm else "mlp_residual"}
    assert dropped("normalize_invertible") == {*norm_inputs, "norm_mean"}
    assert dropped("gelu_checkpoint") == {"gelu_output"}
    assert dropped("attn_dropout_checkpoint") == {"dropped_probabilities"}
    assert dropped("attn_dropout_checkpoint", triton_attention=True) == set()


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@GPU
@DTYPES
@DROPOUTS
@CHOICES_OF_FLAGS
@PLACEMENTS
def test_on_a_gpu_a_stack_keeps_what_the_formula_says(pre_layer_norm, flags, dropouts, dtype):
    config = config_of(pre_layer_norm, flags, dropouts)
    stack, x = stack_of(config, 3, dtype, "cuda"), input_of(dtype).detach().cuda().requires_grad_()
    assert counted(stack, x) == 3 * formula(config, dtype, triton_attention=True)


def peak_bytes(stack, x):
    """Most bytes allocated during forward and backward, above those allocated before; gradients exist before."""
    run(stack, x).sum().backward()  # makes the gradients, compiles the kernels, lets cuBLAS take its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(stack, x).sum().backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@GPU
@CHOICES_OF_FLAGS
@PLACEMENTS
def test_on_a_gpu_the_peak_grows_by_the_formula_with_every_layer(pre_layer_norm, flags):
    """The peak stands in the backward of the last layer, when all layers' tensors are held: its own work cancels out.

    The allocator counts more than was asked: blocks are rounded up to 512 bytes, and one of at least 1 MiB may be left up to
    1 MiB larger than needed, because so small a rest is not split off.
    """
    batch, length = 64, 128
    flags_config = config_of(pre_layer_norm, flags, (0.1, 0.1))
    config = dataclasses.replace(flags_config, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)
    x = torch.randn(batch, length, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    stacks = [stack_of(config, depth, torch.bfloat16, "cuda") for depth in (2, 6)]
    shallow, deep = (peak_bytes(stack, x) for stack in stacks)
    kept = saved_activations(config, batch, length, torch.bfloat16, triton_attention=True)
    added = deep - shallow
    # qkv is 3, gelu_* 4 times as large as the others, and every one of them is a single block
    slack = sum(2**20 if count >= 2**20 else 2 * 512 for count in kept.values())  # mean and rstd: two blocks each
    assert 4 * sum(kept.values()) <= added <= 4 * (sum(kept.values()) + slack)
