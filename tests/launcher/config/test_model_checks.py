"""What no model can have, or no one needs, is refused by key, value, rule and remedy."""

import pytest

MINIMAL = "training: {max_steps: 10, train_batch_size: 8}\n"
FP8 = "training: {max_steps: 10, train_batch_size: 8, precision: fp8}\n"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("num_key_value_heads: 5", "model.num_key_value_heads: got 5, must divide model.num_attention_heads 12"),
        ("num_key_value_heads: 24", "model.num_key_value_heads: got 24, must divide model.num_attention_heads 12"),
        (
            "head_dim: 63, position_embedding: rope",
            "model.head_dim: got 63, but model.position_embedding rope turns columns of a head in pairs; choose an even",
        ),
        (
            "hidden_size: 36, position_embedding: rope",
            "model.num_attention_heads: got 12, which with model.hidden_size 36 makes heads of 3 columns, but",
        ),
        (
            "rope_theta: 5e5",
            "model.rope_theta: got 500000.0, but model.position_embedding learned has no angles; set rope",
        ),
        ("local_rope_theta: 1e4", "model.local_rope_theta: got 10000.0, but model.position_embedding learned has no"),
        (
            "local_rope_theta: 1e4, position_embedding: rope",
            "model.local_rope_theta: got 10000.0, but without model.sliding_window no layer is local; set it, or remove",
        ),
        (
            "position_embedding: rope, pre_layer_norm: false",
            "model.position_embedding: got 'rope', but no post-LN model has it; set learned, or model.pre_layer_norm true",
        ),
        (
            "norm: rms_norm, norm_bias: false, pre_layer_norm: false",
            "model.norm: got 'rms_norm', but no post-LN model has it; set layer_norm, or model.pre_layer_norm true",
        ),
        ("norm: rms_norm", "model.norm_bias: got true, but model.norm rms_norm has none; set false"),
        (
            "global_attn_every_n_layers: 3",
            "model.global_attn_every_n_layers: got 3, but without model.sliding_window all layers are global; set it",
        ),
        (
            "sliding_window: 128, global_attn_every_n_layers: 1",
            "model.global_attn_every_n_layers: got 1, but then no layer of model.num_hidden_layers 12 is local; set",
        ),
        (
            "sliding_window: 128, global_attn_every_n_layers: 3, num_hidden_layers: 1",
            "model.global_attn_every_n_layers: got 3, but then no layer of model.num_hidden_layers 1 is local; set",
        ),
        (
            "sliding_window: 512",
            "model.sliding_window: got 512, must be less than model.max_position_embeddings 512, or it hides nothing; set "
            "null for attention over all tokens",
        ),
        (
            "sliding_window: 9000000000000000000",
            "model.sliding_window: got 9000000000000000000, must be less than model.",
        ),
        (
            "gated_mlp: true, hidden_act: relu2",
            "model.hidden_act: got 'relu2', but no model gates the square of ReLU; set silu or a gelu, or model.gated_mlp",
        ),
        (
            "tie_word_embeddings: false",
            "model.tie_word_embeddings: got false, but the head of model.type bert always is the word embedding; set true",
        ),
    ],
)
def test_an_impossible_model_is_refused(problems, model, message):
    [problem] = problems(f"model: {{{model}}}\n{MINIMAL}")
    assert problem.partition(": ")[2].startswith(message), problem


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num_key_value_heads", ("0", "-1", "2.5", "true")),
        ("head_dim", ("0", "-64", "many")),
        ("sliding_window", ("0", "1", "-128")),
        ("global_attn_every_n_layers", ("0", "-3")),
        ("rope_theta", ("0", "0.99", "-1.0", ".inf", ".nan", "null")),
        ("local_rope_theta", ("1e-300", ".inf")),
        ("norm", ("batch_norm", "null")),
        ("hidden_act", ("swiglu",)),
        ("position_embedding", ("alibi", "null")),
    ],
)
def test_a_value_that_no_key_can_have_is_refused(problems, key, values):
    for value in values:
        [problem] = problems(f"model: {{{key}: {value}}}\n{MINIMAL}")
        assert f"model.{key}: " in problem


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "hidden_size: 64, num_attention_heads: 3, head_dim: 24, intermediate_size: 64",
            "model.head_dim: got 24, which makes 72 columns of all model.num_attention_heads 3, but the matrix products of",
        ),
        (
            "hidden_size: 64, num_attention_heads: 8, num_key_value_heads: 4, head_dim: 2, intermediate_size: 64",
            None,
        ),
        (
            "hidden_size: 48, num_attention_heads: 12, num_key_value_heads: 3, intermediate_size: 64",
            "model.num_key_value_heads: got 3, which with heads of 4 columns makes 24 of keys and values in a process, but the",
        ),
    ],
)
def test_products_in_fp8_need_whole_tiles_of_each_part(load, problems, model, message):
    text = f"model: {{{model}}}\n{FP8}"
    if message is None:
        load(text)
        return
    [problem] = problems(text)
    assert problem.partition(": ")[2].startswith(message), problem


@pytest.mark.parametrize(
    ("tensor", "head_dim", "rule"),
    [
        (1, 6, None),
        (2, 6, None),
        (4, 6, None),
        (12, 6, None),
        (3, 6, "must divide model.num_key_value_heads 4, or be a multiple of it"),
        (6, 6, "must divide model.num_key_value_heads 4, or be a multiple of it"),
        (12, 5, "must divide the 20 rows of all model.num_key_value_heads 4, which the processes store in parts"),
    ],
)
def test_key_heads_are_divided_or_shared_by_the_processes_of_a_replica(load, problems, tensor, head_dim, rule):
    heads = f"num_attention_heads: 12, num_key_value_heads: 4, head_dim: {head_dim}"
    text = f"model: {{{heads}}}\nparallel: {{tensor: {tensor}}}\n{MINIMAL}"
    if rule is None:
        load(text, world_size=tensor)
        return
    [problem] = problems(text, world_size=tensor)
    assert problem.partition(": ")[2] == f"parallel.tensor: got {tensor}, {rule}"


@pytest.mark.parametrize(
    "text",
    [
        "model: {norm: rms_norm, norm_bias: false, hidden_act: silu, gated_mlp: true, position_embedding: rope}",
        "model: {head_dim: 32, num_attention_heads: 7, qk_norm: true}",
        "model: {head_dim: 63, sliding_window: 511}",
        "model: {sliding_window: 3, global_attn_every_n_layers: 100, position_embedding: rope, local_rope_theta: 2}",
        "model: {num_hidden_layers: 9000000000000000000, sliding_window: 2, global_attn_every_n_layers: 2}",
        "model: {position_embedding: rope, sliding_window: 2, rope_theta: 1}\nlayer: {cuda_graph: true}",
        "model: {type: gpt, tie_word_embeddings: false, num_key_value_heads: 1}\nobjective: {type: clm}",
        "model: {pre_layer_norm: false, gated_mlp: true, norm_bias: false, mlp_bias: false, attention_bias: false}",
    ],
)
def test_a_possible_model_is_accepted(load, text):
    load(f"{text}\n{MINIMAL}")
