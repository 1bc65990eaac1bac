"""Wrong use of te.TransformerLayer."""

import pytest
import torch

from xformer_train.kernels import te


def build(**options):
    return te.TransformerLayer(**{"hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2} | options)


def packed(borders, **of_keys):
    of_keys = {name: torch.tensor(value, dtype=torch.int32) for name, value in of_keys.items()}
    return build(attn_input_format="thd")(X[:, 0], cu_seqlens_q=torch.tensor(borders, dtype=torch.int32), **of_keys)


X = torch.randn(5, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(num_attention_heads=3), "hidden_size=8 is not divisible by num_attention_heads=3"),
        (lambda: build(num_gqa_groups=3), "num_gqa_groups=3"),
        (lambda: build(hidden_dropout=1.0), "hidden_dropout=1.0"),
        (lambda: build(drop_path_rate=1.5), "drop_path_rate=1.5"),
        (lambda: build(self_attn_mask_type="diagonal"), "self_attn_mask_type='diagonal'"),
        (lambda: build(attn_input_format="hbsd"), "attn_input_format='hbsd'"),
        (lambda: build(layer_type="both"), "layer_type='both'"),
        (lambda: build(attn_input_format="thd", layer_type="decoder"), "this version"),
        (lambda: build(fuse_wgrad_accumulation=True), "fuse_qkv_params=True"),
        (lambda: build(tp_size=2), "set_parallel_mode=True"),
        (
            lambda: build(tp_size=3, num_attention_heads=4, set_parallel_mode=True),
            "num_attention_heads=4 is not divisible",
        ),
        (lambda: build(sequence_parallel=True), "sequence_parallel=True"),
        (
            lambda: build(tp_size=2, set_parallel_mode=True, sequence_parallel=True, attn_input_format="bshd"),
            "'sbhd' alone",
        ),
        (lambda: build(tp_size=2, set_parallel_mode=True)(X), "set_tensor_parallel_group"),
        (lambda: build()(X[0]), "'sbhd' has 3 dims"),
        (lambda: build()(X[..., :7]), "hidden_size=8"),
        (lambda: build()(X.bfloat16()), "the parameters are torch.float32"),
        (lambda: build()(X, torch.zeros(2, 1, 1, 5)), "must be bool"),
        (lambda: build()(X, torch.zeros(2, 5, dtype=torch.bool)), r"\(B or 1, 1, Sq or 1, Sk\)"),
        (lambda: build()(X, torch.zeros(2, 1, 1, 4, dtype=torch.bool)), "B=2, Sq=5, Sk=5"),
        (lambda: build(self_attn_mask_type="no_mask")(X, torch.zeros(2, 1, 1, 5, dtype=torch.bool)), "'no_mask'"),
        (lambda: build(self_attn_mask_type="arbitrary")(X), "'arbitrary'"),
        (lambda: build()(X, inference_params=object()), "inference_params"),
        (lambda: build()(X, None, X), "layer_type='encoder'"),
        (lambda: build(layer_type="decoder")(X), "encoder_output is missing"),
        (lambda: build(layer_type="decoder")(X, None, X[:, :1]), "equally many"),
        (
            lambda: build(layer_type="decoder")(X, None, X, enc_dec_attn_mask_type="causal"),
            "enc_dec_attn_mask_type='causal'",
        ),
        (lambda: build(attn_input_format="thd")(X[0]), "cu_seqlens_q"),
        (lambda: packed([0, 3, 4]), "cu_seqlens_q ends with 4, hidden_states has 5 rows"),
        (lambda: packed([0, 3, 5], cu_seqlens_kv=[0, 2, 5]), "cu_seqlens_kv differs from cu_seqlens_q"),
        (lambda: packed([0, 3, 5], cu_seqlens_kv=[0, 5]), "cu_seqlens_kv differs from cu_seqlens_q"),
        (lambda: build()(X, cu_seqlens_kv=torch.tensor([0, 5], dtype=torch.int32)), "cu_seqlens_kv"),
        (lambda: packed([0, 3, 6]), "cu_seqlens_q ends with 6, hidden_states has 5 rows"),
        (lambda: build()(X, cu_seqlens_q=torch.tensor([0, 5], dtype=torch.int32)), "attn_input_format='thd'"),
        (lambda: build()(X, rotary_pos_emb=torch.zeros(4, 1, 1, 4)), "rotary_pos_emb"),
    ],
)
def test_wrong_use_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="window_size"):
        build(window_size=(2, 2))
