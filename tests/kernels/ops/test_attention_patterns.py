"""Attention with shared key heads, rotary embedding and windows, against plain torch in fp64."""

import itertools
import math

import pytest
import torch
from helpers.exactness import allowed_error
from saved_activations import count_saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from xformer_train.kernels.ops.attention import attention as attention_module
from xformer_train.kernels.ops.attention.attention import AttentionMask, attention
from xformer_train.kernels.ops.attention.blocks import window_blocks
from xformer_train.kernels.ops.attention.rotary import rotary_table
from xformer_train.kernels.ops.dropout import keep_mask, keep_mask_of_block, keep_scale

SEED, SITE, HEADS = torch.tensor(1234), 3, 6
BATCH = 2


def turned(x, table):
    """x (B, S, heads, D) as complex numbers, times those of the angles."""
    cos, sin = table[: x.shape[1], None].double().chunk(2, -1)
    y = torch.complex(*x.double().chunk(2, -1)) * torch.complex(cos, sin)
    return torch.cat([y.real, y.imag], -1)


def explicit(qkv, visible, bias, p, *, key_heads, rotary, window):
    """(B, S, N * D) of qkv (B, S, N + 2G, D), each head by itself; visible: (B or 1, S, S) bool."""
    size, dim = qkv.shape[1], qkv.shape[-1]
    q, k, v = qkv.split([qkv.shape[2] - 2 * key_heads, key_heads, key_heads], 2)
    if rotary is not None:
        q, k = turned(q, rotary).to(q.dtype), turned(k, rotary).to(k.dtype)
    if window is not None:
        visible = visible & ((torch.arange(size)[:, None] - torch.arange(size)).abs() <= window)
    kept = keep_mask(torch.Size([len(qkv), q.shape[2], size, size]), p, SEED, SITE).to(qkv.dtype) * keep_scale(p)
    heads = []
    for head in range(q.shape[2]):
        shared = head * key_heads // q.shape[2]
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(dim)
        if bias is not None:
            scores = scores + bias[:, min(head, bias.shape[1] - 1)]
        probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
        heads.append((probabilities * kept[:, head]) @ v[:, :, shared])
    return torch.cat(heads, -1)


def mask_and_visible(kind, size):
    """AttentionMask, (B or 1, S, S) bool."""
    order = torch.ones(1, size, size, dtype=torch.bool).tril()
    real = torch.arange(size) < torch.tensor([[size], [(size + 1) // 2]])
    segments = (torch.arange(size) // 4 + torch.arange(BATCH)[:, None]).int()
    return {
        "full": (AttentionMask(), order | True),
        "causal": (AttentionMask(causal=True), order),
        "padding": (AttentionMask(key_mask=real), real[:, None] & order | real[:, None]),
        "segments": (
            AttentionMask(causal=True, segment_ids=segments),
            order & (segments[:, :, None] == segments[:, None]),
        ),
        "bias": (AttentionMask(bias=torch.randn(1, HEADS, size, size, dtype=torch.float64)), order | True),
    }[kind]


def with_gradient(function, qkv, dout):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


KINDS = ["full", "causal", "padding", "segments", "bias"]
SIZES = list(itertools.product([7, 33, 130], [None, 1, 5, 64]))
# so that all meet: 6 or 16 or 80 columns of a head, 1, 2, 3 or 6 key heads
CASES = [(*sizes, (6, 16, 80)[i % 3], (1, 2, 3, 6)[i % 4], KINDS[i % 5]) for i, sizes in enumerate(SIZES * 5)]


@pytest.mark.parametrize(("p", "recompute"), [(0.0, "nothing"), (0.3, "nothing"), (0.3, "dropout"), (0.3, "core")])
@pytest.mark.parametrize(("size", "window", "dim", "key_heads", "kind"), CASES)
def test_attention_of_today_equals_each_head_by_itself(size, window, dim, key_heads, kind, p, recompute):
    torch.manual_seed(size)
    mask, visible = mask_and_visible(kind, size)
    options = {"key_heads": key_heads, "window": window, "rotary": rotary_table(size + 3, dim, 100.0)}
    qkv = torch.randn(BATCH, size, HEADS + 2 * key_heads, dim, dtype=torch.float64)
    sees = visible & ((torch.arange(size)[:, None] - torch.arange(size)).abs() <= (size if window is None else window))
    dout = torch.randn(BATCH, size, HEADS * dim, dtype=torch.float64) * sees.any(-1)[..., None]  # blind ones: any value
    seed = SEED if p else None
    out, dqkv = with_gradient(lambda x: attention(x, mask, p, seed, SITE, recompute=recompute, **options), qkv, dout)
    expected = with_gradient(lambda x: explicit(x, visible, mask.bias, p, **options), qkv, dout)
    torch.testing.assert_close(out * sees.any(-1)[..., None], expected[0] * sees.any(-1)[..., None])
    torch.testing.assert_close(dqkv, expected[1])


@pytest.mark.parametrize("key_heads", [1, 2, None])
@pytest.mark.parametrize("window", [None, 2, 70])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_of_attention_with_windows_rotary_and_key_heads(key_heads, window, p):
    size = 5 if window != 70 else 73
    shape = (1, size, 3, 2, 2) if key_heads is None else (1, size, 2 + 2 * key_heads, 2)
    qkv = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    options = {"key_heads": key_heads, "rotary": rotary_table(size, 2, 10.0), "window": window, "recompute": "core"}
    mask = AttentionMask(causal=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, mask, p, SEED, SITE, **options), (qkv,), fast_mode=size > 5)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("window", [None, 5])
def test_three_of_n_heads_are_as_many_key_heads_and_strides_change_nothing(p, window):
    size, dim = 130, 16
    qkv, dout = torch.randn(BATCH, size, 3, HEADS, dim), torch.randn(BATCH, size, HEADS * dim)
    mask, rotary = AttentionMask(causal=True), rotary_table(size, dim, 100.0)

    def attended(x, key_heads):
        return with_gradient(
            lambda x: attention(x, mask, p, SEED, SITE, key_heads=key_heads, rotary=rotary, window=window), x, dout
        )

    out, dqkv = attended(qkv, None)
    strided = qkv.permute(3, 1, 4, 2, 0).contiguous().permute(4, 1, 3, 0, 2)
    for x, key_heads in ((strided, None), (qkv.flatten(2, 3), HEADS), (strided.flatten(2, 3), HEADS)):
        other_out, other_dqkv = attended(x, key_heads)
        torch.testing.assert_close(other_out, out)
        torch.testing.assert_close(other_dqkv.view_as(dqkv), dqkv)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("recompute", ["nothing", "dropout", "core"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_packed_rows_of_today_equal_padded_ones_under_the_same_dropout(p, recompute, causal):
    lengths, size, key_heads = torch.tensor([4, 0, 150, 70, 1]), 150, 2
    real = torch.arange(size) < lengths[:, None]
    borders = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    qkv = torch.randn(5, size, HEADS + 2 * key_heads, 6, dtype=torch.float64)
    dout = torch.randn(5, size, HEADS * 6, dtype=torch.float64) * real[..., None]
    options = {"key_heads": key_heads, "rotary": rotary_table(size, 6, 100.0), "recompute": recompute}
    for window in (None, 9):

        def attended(x, dy, mask, window=window):
            return with_gradient(lambda x: attention(x, mask, p, SEED, SITE, window=window, **options), x, dy)

        padded = attended(qkv, dout, AttentionMask(causal=causal, key_mask=real))
        packed_mask = AttentionMask(causal=causal, cu_seqlens=borders, max_length=size)
        packed = attended(qkv[real], dout[real], packed_mask)
        for one, other in zip(padded, packed, strict=True):
            torch.testing.assert_close(one[real], other)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_window_that_reaches_every_token_is_no_window(p, causal):
    qkv, mask = torch.randn(BATCH, 9, 3, 2, 4), AttentionMask(causal=causal)
    whole = attention(qkv, mask, p, SEED, SITE)
    for window in (8, 9, 1000):
        assert torch.equal(attention(qkv, mask, p, SEED, SITE, window=window), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("p", "window"), [(0.0, None), (0.0, 20), (0.3, 20), (0.3, None)])
def test_attention_of_today_is_as_exact_as_plain_torch_in_its_dtype(p, window, dtype):
    size, dim, key_heads = 130, 16, 2
    qkv = torch.randn(BATCH, size, HEADS + 2 * key_heads, dim).to(dtype)
    dout = torch.randn(BATCH, size, HEADS * dim).to(dtype)
    options = {"key_heads": key_heads, "rotary": rotary_table(size, dim, 100.0), "window": window}
    mask, visible = mask_and_visible("causal", size)
    ours = with_gradient(lambda x: attention(x, mask, p, SEED, SITE, **options), qkv, dout)
    torchs = with_gradient(lambda x: explicit(x, visible, None, p, **options), qkv, dout)
    exact = with_gradient(lambda x: explicit(x, visible, None, p, **options), qkv.double(), dout.double())
    for one, same_dtype, other in zip(ours, torchs, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= allowed_error(same_dtype, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_order_alone_gives_the_bits_of_a_bias_and_needs_none_in_torchs_attention(dtype):
    for size, dim in ((7, 6), (130, 16), (257, 80)):
        qkv, dout = torch.randn(BATCH, size, 3, 2, dim, dtype=dtype), torch.randn(BATCH, size, 2 * dim).to(dtype)
        ordered, mask = AttentionMask(causal=True), AttentionMask(causal=True)
        biased = AttentionMask(bias=mask.additive(size, qkv))
        one, other = (
            with_gradient(lambda x, m=m: attention(x, m, 0.0, None, SITE), qkv, dout) for m in (ordered, biased)
        )
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert bool(ordered._made) == (dtype == torch.bfloat16)  # whose products add one


@pytest.mark.parametrize("columns", [16, 18])
@pytest.mark.parametrize("size", [16, 13, 14, 15])
def test_a_block_of_a_keep_mask_is_drawn_without_the_rest(size, columns):
    shape = torch.Size((3, size, columns))
    for p in (0.0, 0.3):
        whole = keep_mask(shape, p, SEED, SITE)
        for rows, keys in (
            (slice(0, size), slice(0, columns)),
            (slice(3, 8), slice(5, 11)),
            (slice(2, 3), slice(9, 10)),
        ):
            assert torch.equal(keep_mask_of_block(shape, rows, keys, p, SEED, SITE), whole[:, rows, keys])


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operator gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


LONG, WINDOW, DIM = 1024, 24, 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["segments", "packed", "bias per key"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_with_a_window_no_tensor_holds_all_scores(p, kind, causal):
    qkv = torch.randn(1, LONG, 4, DIM, requires_grad=True)
    mask = AttentionMask(causal=causal, segment_ids=(torch.arange(LONG) // 100)[None].int())
    if kind == "packed":
        mask, qkv = AttentionMask(causal=causal, cu_seqlens=torch.tensor([0, LONG]).int(), max_length=LONG), qkv[0]
    elif kind == "bias per key":
        mask = AttentionMask(bias=torch.randn(1, 1, 1, LONG))
    with Largest() as largest:
        out = attention(qkv, mask, p, SEED, SITE, key_heads=1, rotary=rotary_table(LONG, DIM, 1e4), window=WINDOW)
        out.sum().backward()
    assert largest.elements <= 2 * LONG * (64 + 2 * WINDOW)


@pytest.mark.parametrize(
    ("p", "recompute", "kept"), [(0.0, "nothing", 0), (0.3, "core", 0), (0.3, "dropout", 1), (0.3, "nothing", 2)]
)
def test_what_a_window_keeps_is_proportional_to_it(p, recompute, kept):
    """Beside qkv, with the rows of a head together, one or two numbers for each score of a block or none."""
    qkv, rotary = torch.randn(1, LONG, 6, DIM, requires_grad=True), rotary_table(LONG, DIM, 1e4)
    mask, keys = AttentionMask(causal=True), window_blocks(LONG, WINDOW, causal=True).keys
    assert keys == 64 + WINDOW
    options = {"key_heads": 1, "rotary": rotary, "window": WINDOW, "recompute": recompute}
    shared = [rotary, SEED, mask.additive(LONG, qkv, WINDOW)]
    counted = count_saved_bytes(lambda: attention(qkv, mask, p, SEED if p else None, SITE, **options), shared)
    assert counted == qkv.nbytes + kept * 4 * LONG * keys * 4


@pytest.mark.parametrize("rotary", [None, rotary_table(33, 16, 1e4)], ids=["as it is", "turned"])
@pytest.mark.parametrize("key_heads", [None, 2])
def test_without_dropout_and_window_attention_keeps_the_projection_once(rotary, key_heads):
    """And a number for each row and head; what is turned takes the place of what it was made of."""
    qkv = torch.randn(
        BATCH, 33, *((3, HEADS) if key_heads is None else (HEADS + 2 * key_heads,)), 16, requires_grad=True
    )
    options = {"key_heads": key_heads, "rotary": rotary}
    apart = [] if rotary is None else [rotary]
    counted = count_saved_bytes(lambda: attention(qkv, AttentionMask(causal=True), 0.0, None, SITE, **options), apart)
    assert counted == qkv.nbytes + BATCH * HEADS * 33 * 4


@pytest.mark.parametrize(("size", "numbers"), [(512, 0), (513, 1)])
def test_turned_heads_in_bf16_keep_no_log_sum_exp_up_to_512_tokens_where_products_are_faster(size, numbers):
    qkv, rotary = torch.randn(1, size, 4, 2, dtype=torch.bfloat16, requires_grad=True), rotary_table(size, 2, 1e4)
    mask = AttentionMask(causal=True)
    apart = [rotary, mask.additive(size, qkv)]
    counted = count_saved_bytes(lambda: attention(qkv, mask, 0.0, None, SITE, key_heads=1, rotary=rotary), apart)
    assert counted == qkv.nbytes + numbers * 2 * size * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_heads": 4}, r"key_heads=4 does not divide the 2 query heads of qkv \(2, 7, 10, 6\)"),
        ({"key_heads": 3}, r"key_heads=3 does not divide the 4 query heads"),
        ({"key_heads": 5}, r"key_heads=5 does not divide the 0 query heads"),
        ({"key_heads": 0}, r"key_heads=0 does not divide"),
        ({"key_heads": 2, "rotary": rotary_table(6, 6, 1e4)}, r"rotary is torch.float32 \(6, 6\); .* L at least 7"),
        (
            {"key_heads": 2, "rotary": rotary_table(7, 4, 1e4)},
            r"rotary is torch.float32 \(7, 4\); it must be float32 \(L, 6\)",
        ),
        (
            {"key_heads": 2, "rotary": rotary_table(7, 6, 1e4).double()},
            r"rotary is torch.float64 .* make it with rotary_table",
        ),
        ({"key_heads": 2, "window": -1}, r"window=-1 is below 0"),
        ({}, r"qkv is \(2, 7, 10, 6\); it must be .* else \(B, S, 3, N, D\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.randn(2, 7, 10, 6), AttentionMask(), 0.0, None, SITE, **options)


def test_heads_with_an_odd_number_of_columns_cannot_turn():
    with pytest.raises(ValueError, match="dim=5 is not positive and even"):
        rotary_table(7, 5, 1e4)
    with pytest.raises(ValueError, match="heads have D=5 columns; rotary turns pairs of columns"):
        attention(torch.randn(2, 7, 3, 2, 5), AttentionMask(), 0.0, None, SITE, rotary=torch.zeros(7, 5))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_of_today_compiles_into_one_graph(packed, window, p):
    """aot_eager runs the traced graph with the same kernels."""
    rotary, seed = rotary_table(70, 4, 1e4), SEED if p else None
    shape = (81, 8, 4) if packed else (2, 70, 8, 4)
    borders = torch.tensor([0, 70, 81]).int() if packed else None

    def attended(qkv):
        mask = AttentionMask(causal=True, cu_seqlens=borders, max_length=70 if packed else None)
        return attention(qkv, mask, p, seed, SITE, key_heads=2, rotary=rotary, window=window)

    qkv, dout = torch.randn(shape), torch.randn(*shape[:-2], 16)
    one = with_gradient(attended, qkv, dout)
    other = with_gradient(torch.compile(attended, fullgraph=True, backend="aot_eager"), qkv, dout)
    torch.testing.assert_close(one, other)


def test_rotary_angles_are_those_of_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=48, num_attention_heads=6, head_dim=8, rope_theta=160000.0)
    cos, sin = modeling.LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(8192)[None])
    ours = rotary_table(8192, 8, 160000.0)
    assert torch.equal(ours, torch.cat([cos[0, :, :4], sin[0, :, :4]], -1))


def test_rotary_scores_depend_on_distances_alone():
    table = rotary_table(300, 8, 100.0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    near = [
        (turned(q.expand(1, 300, 1, 8), table)[0, i] * turned(k.expand(1, 300, 1, 8), table)[0, i - 7]).sum()
        for i in (7, 299)
    ]
    torch.testing.assert_close(*near, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_that_hides_nothing_adds_nothing(causal, dtype):
    """Batches of BERT always have a key_mask, those of GPT always segment_ids."""
    qkv = torch.randn(BATCH, 7, 3, HEADS, 4).to(dtype)
    plain = AttentionMask(causal=causal)
    whole = AttentionMask(
        causal=causal, key_mask=torch.ones(BATCH, 7, dtype=torch.bool), segment_ids=torch.full((BATCH, 7), 5)
    )
    assert whole.only_causal == causal
    assert (whole.additive(7, qkv) is None) == (not causal)
    assert torch.equal(attention(qkv, whole, 0.0, None, SITE), attention(qkv, plain, 0.0, None, SITE))
    one_hidden = torch.arange(7) < torch.tensor([[7], [6]])
    assert AttentionMask(causal=causal, key_mask=one_hidden).additive(7, qkv).shape[0] == BATCH


@pytest.mark.parametrize("causal", [False, True])
def test_products_and_torchs_attention_agree_in_bf16_on_both_sides_of_the_length_between_them(causal, monkeypatch):
    qkv, dout = torch.randn(BATCH, 9, 3, HEADS, 4).bfloat16(), torch.randn(BATCH, 9, 4 * HEADS).bfloat16()
    mask, results = AttentionMask(causal=causal), []
    for most in (9, 8):
        monkeypatch.setattr(attention_module, "_LONGEST_BF16_PRODUCTS", most)
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, mask, 0.0, None, SITE)
        out.backward(dout)
        assert ("AttentionByProducts" in type(out.grad_fn).__name__) == (most == 9)
        results.append((out, leaf.grad))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
