"""Generation with a key-value cache: a text in pieces, with the keys of earlier pieces, gives what the whole text gives."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from xformer_train.kernels import te

HIDDEN, FFN, HEADS, HEAD_DIM = 24, 40, 4, 6
S, B = 9, 3
ANGLES = te.RotaryPositionEmbedding(HEAD_DIM)(16)  # more positions than tokens, as generation has them
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}  # the order of sums differs

LAYERS = {
    "gpt": {},
    "fused gpt, batch first": {"fuse_qkv_params": True, "attn_input_format": "bshd"},
    "groups": {"num_gqa_groups": 2, "fuse_qkv_params": True},
    "post-LN": {"output_layernorm": True, "apply_residual_connection_post_layernorm": True, "kv_channels": HEAD_DIM},
    "llama": {
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "bias": False,
        "num_gqa_groups": 1,
        "attn_input_format": "bshd",
    },
    "t5": {"layer_type": "decoder"},
}
ROTARY = {"llama", "groups"}


class Decoder(nn.Module):
    """x: (B, S, H), whatever the layers' format."""

    def __init__(self, name, dtype=torch.float64, layers=2, **options):
        super().__init__()
        self.options = LAYERS[name] | options
        self.layers = nn.ModuleList(
            te.TransformerLayer(HIDDEN, FFN, HEADS, layer_number=1 + i, params_dtype=dtype, **self.options)
            for i in range(layers)
        )
        with torch.no_grad():
            for parameter in self.parameters():  # large enough for attention to matter
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        self.encoded = torch.randn(4, B, HIDDEN, dtype=dtype) if "layer_type" in self.options else None
        self.extra = {"rotary_pos_emb": ANGLES} if name in ROTARY else {}
        self.eval()

    def forward(self, x, mask=None, inference_params=None):
        swapped = self.options.get("attn_input_format", "sbhd") == "sbhd"
        x = x.transpose(0, 1) if swapped else x
        for layer in self.layers:
            x = layer(x, mask, self.encoded, inference_params=inference_params, **self.extra)
        return x.transpose(0, 1) if swapped else x


def in_pieces(model, x, pieces, params, masks=None):
    """The outputs of a text of which each forward pass gets as many tokens as pieces says; masks: of the whole text."""
    outputs = []
    for piece in x.split(pieces, 1):
        start = params.sequence_len_offset
        end = start + piece.shape[1]
        mask = None if masks is None else masks[:, :, start % masks.shape[2] : end, :end]
        outputs.append(model(piece, mask, params))
        params.sequence_len_offset = end
    return torch.cat(outputs, 1)


def text(dtype=torch.float64):
    return torch.randn(B, S, HIDDEN, dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("pieces", [[5, 1, 1, 1, 1], [1] * S, [4, 3, 2]], ids=["prefill", "from nothing", "chunks"])
@pytest.mark.parametrize("name", LAYERS)
def test_pieces_equal_the_whole(name, pieces, dtype):
    model, x = Decoder(name, dtype), text(dtype)
    ours = in_pieces(model, x, pieces, te.InferenceParams(B, S))
    torch.testing.assert_close(ours, model(x), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("whole_mask", [False, True], ids=["padding in front", "a mask of queries and keys"])
def test_masks_reach_over_the_cache(name, whole_mask):
    """Prompts of several lengths are padded in front; a padded query sees nothing, which must not spread."""
    model, x = Decoder(name, self_attn_mask_type="padding_causal"), text()
    hidden = torch.arange(S) < torch.tensor([0, 3, 1])[:, None]
    mask = hidden[:, None, None].expand(-1, 1, S if whole_mask else 1, -1).clone()
    if whole_mask:
        mask[:, :, 6, 4] = True  # of one query alone
    masks = mask if whole_mask else mask.expand(-1, 1, S, -1)
    ours = in_pieces(model, x, [5, 1, 3], te.InferenceParams(B, S), masks)
    torch.testing.assert_close(ours, model(x, mask), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_parts_of_a_batch_have_places_of_their_own():
    model, x = Decoder("groups"), text()
    params = te.InferenceParams(max_batch_size=4, max_sequence_length=12)
    firsts = []
    for params.batch_size_offset, part in ((1, x[:1]), (2, x[1:])):
        firsts.append(model(part[:, :4], None, params))
    params.batch_size_offset, params.sequence_len_offset = 1, 4
    ours = torch.cat([torch.cat(firsts), in_pieces(model, x[:, 4:], [1, 4], params)], 1)
    torch.testing.assert_close(ours, model(x), atol=1e-10, rtol=1e-10)
    keys, values = params.key_value_memory_dict[2]
    assert keys.shape == values.shape == (12, 4, 2, HEAD_DIM)  # a group once


@torch.no_grad()
def test_beams_take_the_past_of_others():
    model, x = Decoder("gpt"), text()
    params, beams = te.InferenceParams(B, S), torch.tensor([2, 0, 0])
    in_pieces(model, x[:, :6], [5, 1], params)
    params.swap_key_value_dict(beams)
    past = x[beams]
    past[:, 6:] = x[:, 6:]
    ours = in_pieces(model, past[:, 6:], [1, 1, 1], params)
    torch.testing.assert_close(ours, model(past)[:, 6:], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_another_text_follows_in_the_same_memory():
    model = Decoder("gpt")
    params = te.InferenceParams(B, S)
    in_pieces(model, text(), [5, 4], params)
    kept = params.key_value_memory_dict[1][0]
    x = text()
    params.sequence_len_offset = 0
    ours = in_pieces(model, x, [3, 1, 5], params)
    torch.testing.assert_close(ours, model(x), atol=1e-10, rtol=1e-10)
    assert params.key_value_memory_dict[1][0] is kept


def test_any_object_with_the_attributes_and_every_way_to_turn_gradients_off():
    """A cache that is begun in inference mode goes on without it."""
    model, x = Decoder("gpt"), text()
    params = SimpleNamespace(
        max_batch_size=B, max_sequence_length=S, sequence_len_offset=0, batch_size_offset=0, key_value_memory_dict={}
    )
    with torch.inference_mode():
        first = in_pieces(model, x[:, :5], [5], params)
    with torch.no_grad():
        ours = torch.cat([first, in_pieces(model, x[:, 5:], [1, 3], params)], 1)
        torch.testing.assert_close(ours, model(x), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_refused_pass_leaves_the_cache_as_it_was():
    model, x = Decoder("gpt"), text()
    params = te.InferenceParams(B, S)
    first = in_pieces(model, x[:, :5], [5], params)
    with pytest.raises(ValueError, match="attention_mask is"):
        model(x[:, 5:6], torch.zeros(B, 1, 1, 1, dtype=torch.bool), params)  # of the new token alone
    ours = torch.cat([first, in_pieces(model, x[:, 5:], [1] * 4, params)], 1)
    torch.testing.assert_close(ours, model(x), atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("recipe", [te.DelayedScaling(), te.Float8CurrentScaling()], ids=["delayed", "current"])
def test_bf16_autocast_and_fp8(recipe):
    """bf16 has 8 bits, FP8 4, its scales are of the tokens at hand, and each piece rounds anew: near, no more."""
    layer = te.TransformerLayer(32, 64, 4, layer_number=1).eval()
    x = torch.randn(S, B, 32)
    expected, params = layer(x), te.InferenceParams(B, S)
    with torch.autocast("cpu", torch.bfloat16), te.fp8_autocast(fp8_recipe=recipe):
        outputs = []
        for token in x:
            outputs.append(layer(token[None], is_first_microbatch=not outputs, inference_params=params))
            params.sequence_len_offset += 1
    keys, _ = params.key_value_memory_dict[1]
    assert keys.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(outputs).float(), expected, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_compiled_without_a_graph_break():
    torch.compiler.reset()
    model, x = Decoder("llama", layers=1), text()[:, :6]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = in_pieces(compiled, x, [4, 1, 1], te.InferenceParams(B, S))
    torch.testing.assert_close(ours, model(x), atol=1e-10, rtol=1e-10)


def layer(*, training=False, **options):
    options = {"layer_number": 1} | options
    return te.TransformerLayer(8, 16, 2, **options).train(training)


def call(module, x=None, **attributes):
    params = te.InferenceParams(2, 6)
    for name, value in attributes.items():
        setattr(params, name, value)
    return module(torch.randn(5, 2, 8) if x is None else x, inference_params=params)


def of_another_layer():
    return {1: (torch.zeros(6, 2, 1, 4), torch.zeros(6, 2, 1, 4))}


@torch.no_grad()
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: te.InferenceParams(2, 0), "max_sequence_length=0"),
        (lambda: te.InferenceParams(-1, 4), "max_batch_size=-1"),
        (lambda: call(layer(layer_number=None)), "layer_number is None"),
        (lambda: call(layer(training=True)), r"training=True .* call eval\(\)"),
        (lambda: torch.enable_grad()(call)(layer()), r"gradients on; .* torch.no_grad\(\)"),
        (lambda: call(layer(), torch.randn(7, 2, 8)), "sequence_len_offset=0 and 7 tokens .* max_sequence_length=6"),
        (lambda: call(layer(), sequence_len_offset=2), "sequence_len_offset=2 and 5 tokens .* max_sequence_length=6"),
        (lambda: call(layer(), sequence_len_offset=-1), "sequence_len_offset=-1"),
        (lambda: call(layer(), batch_size_offset=1), "batch_size_offset=1 and 2 sequences .* max_batch_size=2"),
        (lambda: call(layer(), sequence_len_offset=1), "layer_number=1 has no keys in the cache"),
        (
            lambda: call(layer(), key_value_memory_dict=of_another_layer()),
            r"\(6, 2, 1, 4\) .* keys need .* \(6, 2, 2, 4\)",
        ),
        (lambda: layer()(torch.randn(5, 2, 8), inference_params={}), "has no max_batch_size, .* te.InferenceParams"),
        (
            lambda: layer(attn_input_format="thd")(
                torch.randn(5, 8), cu_seqlens_q=torch.tensor([0, 5], dtype=torch.int32), inference_params=object()
            ),
            "'thd'",
        ),
        (
            lambda: call(layer(tp_size=2, set_parallel_mode=True, sequence_parallel=True)),
            "sequence_parallel=True",
        ),
        (lambda: te.InferenceParams(2, 4).swap_key_value_dict([0]), "batch_indices has 1 numbers"),
    ],
)
def test_wrong_use_is_one_clear_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
