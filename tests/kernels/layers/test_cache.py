"""Layers with a key-value cache: a text in pieces, with the keys of earlier pieces, gives what the whole text gives."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack
from xformer_train.kernels.layers.cache import KeyValueCache
from xformer_train.kernels.ops.attention.cached_attention import cached_attention

BATCH, LENGTH, HIDDEN = 3, 13, 24
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}  # the order of sums differs
GPT = LayerConfig(HIDDEN, 4, 40, hidden_act="gelu_tanh", initializer_range=0.3)
LLAMA = LayerConfig(
    HIDDEN,
    6,
    28,
    hidden_act="silu",
    gated_mlp=True,
    norm="rms_norm",
    norm_bias=False,
    attention_bias=False,
    mlp_bias=False,
    num_key_value_heads=2,
    rope_theta=500.0,
    initializer_range=0.3,
)
MISTRAL = dataclasses.replace(LLAMA, attention_window=3)
CONFIGS = {
    "gpt": GPT,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen3": dataclasses.replace(LLAMA, head_dim=10, qk_norm=True),
    "a window of one token": dataclasses.replace(GPT, attention_window=1),
    "post-LN, relu2, key head each": dataclasses.replace(
        GPT, pre_layer_norm=False, hidden_act="relu2", qk_norm=True, rope_theta=100.0
    ),
    "no norm in front": dataclasses.replace(LLAMA, norm_before_attention=False, num_key_value_heads=1),
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PIECES = {"prompt and tokens": [6, *[1] * 7], "from nothing": [1] * LENGTH, "chunks": [4, 2, 7]}


def two_of(config, dtype=torch.float64):
    return stack_of(config, dataclasses.replace(config, norm_before_attention=True), dtype=dtype)


def stack_of(*configs, dtype=torch.float64, **options):
    """A stack that is not fresh, or a bias of 0 in the wrong place would go unseen."""
    torch.manual_seed(3)
    stack = LayerStack(configs, **options)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stack.to(dtype).eval()


def text(dtype=torch.float64):
    return torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(5))


def in_pieces(stack, x, pieces, cache, key_mask=None):
    """The outputs of a text of which each pass gets as many tokens as pieces says."""
    outputs = []
    for piece in x.split(pieces, 1):
        end = cache.length + piece.shape[1]
        mask = AttentionMask(causal=True, key_mask=None if key_mask is None else key_mask[:, :end])
        outputs.append(stack(piece, mask, cache))
        assert cache.length == end
    return torch.cat(outputs, 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@ALL
def test_pieces_equal_the_whole(config, pieces, dtype):
    stack, x = two_of(config, dtype), text(dtype)
    ours = in_pieces(stack, x, pieces, KeyValueCache(LENGTH + 4))
    whole = stack(x, AttentionMask(causal=True))
    torch.testing.assert_close(ours, whole, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@torch.no_grad()
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@ALL
def test_prompts_of_several_lengths_are_padded_in_front(config, pieces):
    stack, x = two_of(config), text()
    tokens = torch.arange(LENGTH) >= torch.tensor([0, 5, 2])[:, None]
    ours = in_pieces(stack, x, pieces, KeyValueCache(LENGTH), tokens)
    whole = stack(x, AttentionMask(causal=True, key_mask=tokens))
    torch.testing.assert_close(ours[tokens], whole[tokens], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_layers_of_one_stack_have_windows_and_angles_of_their_own():
    local = dataclasses.replace(MISTRAL, rope_theta=20.0)
    stack, x = stack_of(LLAMA, local, MISTRAL, LLAMA), text()
    ours = in_pieces(stack, x, [5, 1, 3, 1, 1, 2], KeyValueCache(20))
    torch.testing.assert_close(ours, stack(x, AttentionMask(causal=True)), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_module_with_a_hook_is_called_in_every_step():
    stack, x = stack_of(LLAMA, GPT), text()
    for layer, name in ((stack[0], "qkv"), (stack[1], "output"), (stack[1], "mlp_norm")):
        getattr(layer, name).register_forward_hook(lambda _, args, y: y + 0.1 * y.square())
    ours = in_pieces(stack, x, PIECES["prompt and tokens"], KeyValueCache(LENGTH))
    torch.testing.assert_close(ours, stack(x, AttentionMask(causal=True)), atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("of_norms", [torch.bfloat16, torch.float32], ids=str)
def test_half_precision_stays_half_whatever_the_norms_are_in(config, of_norms):
    stack, x = stack_of(config, config, dtype=torch.bfloat16), text(torch.bfloat16)
    for layer in stack:
        layer.attention_norm.to(of_norms)
        layer.mlp_norm.to(of_norms)
    ours = in_pieces(stack, x, PIECES["prompt and tokens"], KeyValueCache(LENGTH))
    whole = stack(x, AttentionMask(causal=True))
    assert ours.dtype == torch.bfloat16
    assert (ours - whole).norm() < 0.02 * whole.norm()


@torch.no_grad()
def test_fp8_products_are_those_of_a_pass_without_a_cache():
    """A step scales by its own tokens, the whole by all: they are as far from each other as FP8 is from fp32."""
    config = dataclasses.replace(GPT, hidden_size=32, intermediate_size=48)
    stack = stack_of(config, dtype=torch.float32, fp8=True)
    x = torch.randn(1, 16, 32)
    ours = in_pieces(stack, x, [6, *[1] * 10], KeyValueCache(16))
    whole = stack(x, AttentionMask(causal=True))
    error = (ours - whole).norm() / whole.norm()
    assert 1e-4 < error < 0.1


@torch.no_grad()
def test_the_memory_is_that_of_the_key_heads_and_of_the_capacity():
    stack, cache = stack_of(LLAMA, GPT, dtype=torch.bfloat16), KeyValueCache(20)
    stack(text(torch.bfloat16), AttentionMask(causal=True), cache)
    for number, heads, size in ((0, 2, 4), (1, 4, 6)):
        like = torch.zeros(BATCH, 1, heads, size, dtype=torch.bfloat16)
        for memory in cache.memory(number, like):
            assert memory.shape == (BATCH, 20, heads, size) and memory.dtype == torch.bfloat16
            assert memory.untyped_storage().nbytes() == 2 * BATCH * 20 * heads * size


@torch.no_grad()
def test_other_sequences_follow_in_the_same_memory():
    stack, cache, x = stack_of(MISTRAL, LLAMA), KeyValueCache(LENGTH), text()
    with torch.inference_mode():
        in_pieces(stack, x.flip(1), [6, 7], cache)
    kept, _ = cache.memory(0, torch.zeros(BATCH, 1, 2, 4, dtype=x.dtype))
    cache.length = 0
    ours = in_pieces(stack, x, [2, 1, 10], cache)  # memory that was taken in inference mode serves outside of it too
    torch.testing.assert_close(ours, stack(x, AttentionMask(causal=True)), atol=1e-10, rtol=1e-10)
    assert cache.memory(0, torch.zeros(BATCH, 1, 2, 4, dtype=x.dtype))[0] is kept


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (5, 1)])
def test_cached_attention_is_softmax_over_the_keys_of_a_heads_group(queries, heads, groups):
    torch.manual_seed(0)
    q = torch.randn(2, queries, heads, 7, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 9, groups, 7, dtype=torch.float64)
    bias = torch.randn(2, 1, queries, 9, dtype=torch.float64)
    shared = [part[:, :, torch.arange(heads) // (heads // groups)] for part in (keys, values)]
    scores = torch.einsum("bqnd,bknd->bnqk", q, shared[0]) / 7**0.5 + bias
    expected = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), shared[1]).flatten(2)
    torch.testing.assert_close(cached_attention(q, keys, values, bias), expected)


def given(mask=None, cache=None, stack=None, size=5):
    stack = stack_of(GPT) if stack is None else stack
    x = torch.randn(BATCH, size, HIDDEN, dtype=torch.float64)
    mask = AttentionMask(causal=True) if mask is None else mask
    return stack(x, mask, KeyValueCache(9) if cache is None else cache)


def filled():
    cache = KeyValueCache(9)
    given(cache=cache)
    return cache


BAD = {
    "no order": (lambda: given(AttentionMask()), "needs a mask with causal=True"),
    "segments": (lambda: given(AttentionMask(causal=True, segment_ids=torch.zeros(1, 5))), "leave segment_ids out"),
    "a bias": (lambda: given(AttentionMask(causal=True, bias=torch.zeros(1, 1, 1, 5))), "leave bias out"),
    "packed": (
        lambda: given(
            AttentionMask(causal=True, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32), max_length=5), size=5
        ),
        "leave cu_seqlens out",
    ),
    "too many tokens": (
        lambda: given(cache=filled()),
        "5 tokens in the cache and 5 new ones exceed capacity=9; build a larger",
    ),
    "a mask of the new tokens": (
        lambda: given(AttentionMask(causal=True, key_mask=torch.ones(BATCH, 2) > 0), filled(), size=2),
        r"key_mask is \(3, 2\); .* \(B or 1, 7\) with B=3",
    ),
    "another model": (
        lambda: given(cache=filled(), stack=stack_of(LLAMA), size=2),
        r"layer 0 is torch.float64 \(3, 9, 4, 6\) on cpu, new keys need torch.float64 \(3, 9, 2, 4\)",
    ),
    "no room": (lambda: KeyValueCache(0), "capacity=0 is not positive"),
}


@torch.no_grad()
@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_what_no_cache_can_follow_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_training_and_gradients_are_refused():
    with pytest.raises(
        ValueError, match=r"training=False and gradients on; .* call eval\(\) and use torch.no_grad\(\)"
    ):
        given()
    with torch.no_grad(), pytest.raises(ValueError, match="training=True and gradients off"):
        given(stack=stack_of(GPT).train())


@torch.no_grad()
def test_tokens_that_processes_divide_are_refused():
    stack = stack_of(GPT)
    stack.parallel = SimpleNamespace(divides_tokens=True)
    with pytest.raises(ValueError, match="sequence parallelism divides tokens that a cache holds together"):
        given(stack=stack)


@torch.no_grad()
def test_a_pass_that_is_refused_leaves_the_cache_as_it_was():
    stack, cache, x = stack_of(LLAMA), KeyValueCache(LENGTH), text()
    first = in_pieces(stack, x[:, :4], [4], cache)
    with pytest.raises(ValueError, match="exceed capacity"):
        stack(x, AttentionMask(causal=True), cache)
    ours = torch.cat([first, in_pieces(stack, x[:, 4:], [1, 8], cache)], 1)
    torch.testing.assert_close(ours, stack(x, AttentionMask(causal=True)), atol=1e-10, rtol=1e-10)
