"""Masks of transformers' layers, turned into those of the fused layer."""

import pytest
import torch

from xformer_train.recipes.policies.swapping.masks import LayerMasks


def seen_by(mask, size=4):
    """(B, S, S) bool: which query sees which key; made of what attention adds to the scores."""
    bias = mask.additive(size, torch.zeros(()))
    return None if bias is None else (bias == 0).expand(-1, -1, size, size)[:, 0]


class Config:
    def __init__(self, attention):
        self._attn_implementation = attention


def test_masks_are_told_apart_by_what_they_say():
    x = torch.zeros(2, 4, 6)
    keys = torch.tensor([[True] * 4, [False, True, True, True]])
    order = torch.ones(4, 4, dtype=torch.bool).tril()
    everyone = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    masks = LayerMasks(Config("sdpa"), causal=True)

    def fields(given, masks=masks, **rest):
        mask, window = masks.convert(given, x, **rest)
        assert window is None
        return mask.causal, mask.key_mask is not None, mask.bias is not None, mask.segment_ids is not None

    # (causal, key_mask, bias, segment_ids): a causal mask is made without S * S numbers, whatever form it came in.
    assert fields(None) == (True, False, False, False)
    assert fields(everyone & order) == (True, False, False, False)
    assert fields(everyone) == (False, False, False, False)
    assert fields(keys[:, None, None] & order) == (True, True, False, False)
    assert fields(keys[:, None, None].expand(2, 1, 4, 4)) == (False, True, False, False)
    assert fields(torch.zeros(2, 1, 4, 4).masked_fill(~order, torch.finfo().min)) == (True, False, False, False)
    assert fields(torch.zeros(2, 1, 4, 4).masked_fill(~order, -1e4)) == (
        False,
        False,
        True,
        False,
    )  # a bias, by its size
    assert fields(torch.full((2, 1, 4, 4), 0.5)) == (False, False, True, False)
    assert fields(everyone & order.flip(0)) == (False, False, True, False)
    mask, _ = masks.convert(torch.full((1, 1, 4, 4), -torch.inf).masked_fill(order, 0.0) + 0, x)
    assert torch.equal(seen_by(mask)[0], order)

    eager = LayerMasks(Config("eager"), causal=True)
    assert fields(None, eager) == (False, False, False, False)  # stock layers then add nothing
    flash = LayerMasks(Config("flash_attention_2"), causal=True)
    assert fields(None, flash) == (True, False, False, False)
    assert torch.equal(seen_by(flash.convert(keys.long(), x)[0]), keys[:, None] & order)
    encoder = LayerMasks(Config("flash_attention_2"), causal=False)
    assert fields(None, encoder) == (False, False, False, False)
    assert torch.equal(seen_by(encoder.convert(keys, x)[0]), keys[:, None].expand(2, 4, 4))
    packed, _ = flash.convert(None, x[:1], torch.tensor([[0, 1, 0, 1]]))
    assert torch.equal(seen_by(packed)[0], order & ~(torch.arange(4)[:, None].ge(2) & torch.arange(4).lt(2)))

    given = keys[:, None, None].expand(2, 1, 4, 4).contiguous()
    first = masks.convert(given, x)
    assert masks.convert(given, x) is first  # for all layers
    given[:, :, :, 2] = False
    assert not masks.convert(given, x)[0].key_mask[:, 2].any()  # not what it was before


def test_a_window_is_told_from_a_mask_of_four_dims_and_by_flash_attention():
    x, places = torch.zeros(2, 5, 6), torch.arange(5)
    keys = torch.tensor([[True] * 5, [False, False, True, True, True]])
    near = (places[:, None] - places).abs() <= 1
    order = places[:, None] >= places

    def found(given, implementation="sdpa", causal=False, window=1):
        mask, own = LayerMasks(Config(implementation), causal).convert(given, x, None, window)
        return mask.causal, mask.key_mask is not None, mask.bias is not None, own

    for seen, kind in (
        (near, (False, 1)),
        (near & order, (True, 1)),
        (order, (True, None)),
        (near | True, (False, None)),
    ):
        causal, window = kind
        assert found(seen[None, None]) == (causal, False, False, window)
        assert found(keys[:, None, None] & seen) == (causal, True, False, window)
        assert found(torch.zeros(1, 1, 5, 5).masked_fill(~seen, torch.finfo().min), "eager") == (
            causal,
            False,
            False,
            window,
        )
    assert found(near[None, None], window=2) == (False, False, True, None)  # another window's: a bias
    assert found(near[None, None], window=None) == (False, False, True, None)
    # transformers leaves the mask out where it hides nothing, and flash attention takes windows for itself
    assert found(None) == (False, False, False, None)
    assert found(None, "flash_attention_2") == (False, False, False, 1)
    assert found(keys.long(), "flash_attention_2", causal=True) == (True, True, False, 1)


def test_masks_over_a_cache_are_those_of_stock_attention():
    q = torch.zeros(1, 3, 2, 5)
    order = torch.tensor([[True, True, True, False], [True, True, True, True]])
    keys = torch.tensor([[False, True, True, True]])
    flash = LayerMasks(Config("flash_attention_2"), causal=True)
    assert torch.equal(flash.over_cache(None, q, 4)[0, 0], order)
    assert torch.equal(flash.over_cache(keys, q, 4)[0, 0], order & keys)
    assert flash.over_cache(None, q[:, :, :1], 4) is None  # one query sees all
    sdpa = LayerMasks(Config("sdpa"), causal=True)
    assert torch.equal(sdpa.over_cache(None, q, 4)[0, 0], torch.ones(2, 4, dtype=torch.bool).tril())
    assert sdpa.over_cache(order[None, None], q, 4).dtype == torch.bool
    assert LayerMasks(Config("eager"), causal=True).over_cache(None, q, 4) is None
    near = torch.tensor([[False, True, True, False], [False, False, True, True]])
    assert torch.equal(flash.over_cache(None, q, 4, 1)[0, 0], near)
    assert torch.equal(flash.over_cache(None, q[:, :, :1], 4, 1)[0, 0], near[1:])
    assert sdpa.over_cache(None, q[:, :, :1], 4, 1) is None  # the cache ends where the window does
    with pytest.raises(ValueError, match=r"attention_mask is torch.bool \(1, 1, 2, 4\) for 1 x 2 tokens and 5 keys"):
        sdpa.over_cache(order[None, None], q, 5)


def test_a_mask_for_all_rows_serves_batches_of_any_size():
    keys = torch.tensor([False, True, True, True])[None, None, None]
    masks = LayerMasks(Config("sdpa"), causal=False)
    for rows in (1, 3, 2):
        mask, _ = found = masks.convert(keys, torch.zeros(rows, 4, 6))
        assert mask.key_mask.shape == (rows, 4)
        assert masks.convert(keys, torch.zeros(rows, 4, 6)) is found  # once for all layers
