"""Models of today's layers against plain PyTorch: losses and every gradient, padded, without padding, and in segments."""

import pytest
import torch
import torch.nn.functional as F

from xformer_train.kernels.ops.choices import IGNORED
from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig

BATCH, LENGTH, VOCABULARY = 3, 17, 53
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 30,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
    "layer_norm_eps": 1e-5,
}
NO_BIAS = {"norm_bias": False, "attention_bias": False, "mlp_bias": False}
LLAMA = {"norm": "rms_norm", "hidden_act": "silu", "gated_mlp": True, "position_embedding": "rope", **NO_BIAS}
MODELS = {
    "modernbert": {
        "type": "bert",
        "gated_mlp": True,
        "position_embedding": "rope",
        "rope_theta": 160000.0,
        "local_rope_theta": 100.0,
        "sliding_window": 6,
        "global_attn_every_n_layers": 3,
        **NO_BIAS,
    },
    "modernbert with sentences": {
        "type": "bert",
        "position_embedding": "rope",
        "sliding_window": 5,
        "norm_bias": False,
    },
    "bert with windows": {"type": "bert", "sliding_window": 4, "hidden_act": "relu2", "global_attn_every_n_layers": 2},
    "llama": {"type": "gpt", "num_key_value_heads": 2, **LLAMA},
    "llama with a head": {"type": "gpt", "num_key_value_heads": 1, "tie_word_embeddings": False, **LLAMA},
    "mistral": {"type": "gpt", "num_key_value_heads": 2, "sliding_window": 5, "rope_theta": 1e6, **LLAMA},
    "qwen3": {"type": "gpt", "num_key_value_heads": 2, "head_dim": 10, "qk_norm": True, **LLAMA},
    "gpt with rope": {"type": "gpt", "position_embedding": "rope", "hidden_act": "gelu_tanh", "mlp_bias": False},
}
TASKS = {"modernbert with sentences": "sop", "bert with windows": "nsp"}


def built(name, **flags):
    """A model of the table in fp64, with no parameter at 0 or 1, where a swapped pair of them would go unseen."""
    torch.manual_seed(0)
    config = ModelConfig(**SIZES, **MODELS[name])
    kind = "mlm" if config.type == "bert" else "clm"
    objective = ObjectiveConfig(type=kind, sentence_task=TASKS.get(name, "none"))
    model = RECIPES[config.type].build_model(config, LayerFlags(**flags), objective, VOCABULARY).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def norm(params, name, x, config):
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if config.norm == "rms_norm" or name.endswith(("q_norm", "k_norm")):
        return F.rms_norm(x, x.shape[-1:], weight, config.layer_norm_eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, config.layer_norm_eps)


def linear(params, name, x):
    return F.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def turned(x, theta):
    """x (B, S, heads, D), each pair (i, i + D/2) as one complex number turned by position / theta^(2 i / D)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1]).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    numbers = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([numbers.real, numbers.imag], -1)


def attended(params, prefix, x, config, local, visible):
    """The output of the heads of one layer, (B, S, N * D); visible: (B, S, S)."""
    queries, keys, width = config.num_attention_heads, config.key_heads, config.head_size
    heads = linear(params, f"{prefix}.qkv", x).unflatten(-1, (queries + 2 * keys, width))
    q, k, v = heads.split([queries, keys, keys], -2)
    if config.qk_norm:
        q, k = (norm(params, f"{prefix}.{part}_norm", heads, config) for part, heads in (("q", q), ("k", k)))
    if config.position_embedding == "rope":
        theta = config.local_rope_theta if local and config.local_rope_theta else config.rope_theta
        q, k = turned(q, theta), turned(k, theta)
    if local:
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        half = config.sliding_window // 2
        near = distance.abs() <= half if config.type == "bert" else distance < config.sliding_window
        visible = visible & near
    k, v = (heads.repeat_interleave(queries // keys, 2) for heads in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / width**0.5
    probabilities = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("bnqk,bknd->bqnd", probabilities, v).flatten(-2)


def acted(x, config):
    functions = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu2": lambda x: F.relu(x).square(),
    }
    return functions[config.hidden_act](x)


def plain_hidden(params, config, ids, types, visible):
    """The last hidden states (B, S, H), written out."""
    x = params["word_embeddings.weight"][ids]
    modern = config.position_embedding == "rope"
    if types is not None:
        x = x + params["token_type_embeddings.weight"][types]
    if not modern:
        x = x + params["position_embeddings.weight"][: ids.shape[1]]
    if config.type == "bert":
        x = norm(params, "embedding_norm", x, config)
    for number in range(config.num_hidden_layers):
        prefix = f"layers.{number}"
        bare = config.type == "bert" and modern and number == 0
        read = x if bare else norm(params, f"{prefix}.attention_norm", x, config)
        every = config.global_attn_every_n_layers
        local = bool(config.sliding_window) and not (every and number % every == 0)
        x = x + linear(params, f"{prefix}.attention_output", attended(params, prefix, read, config, local, visible))
        inner = linear(params, f"{prefix}.intermediate", norm(params, f"{prefix}.mlp_norm", x, config))
        passed, *gates = inner.split(config.intermediate_size, -1)
        inner = acted(passed, config)
        for gate in gates:
            inner = inner * gate
        x = x + linear(params, f"{prefix}.output", inner)
    return norm(params, "final_norm", x, config)


def bert_batch():
    torch.manual_seed(1)
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [1], [9]])
    return {
        "input_ids": torch.randint(0, VOCABULARY, (BATCH, LENGTH)),
        "token_type_ids": torch.randint(0, 2, (BATCH, LENGTH)),
        "attention_mask": real,
        "masked_positions": torch.tensor([0, 16, 17, 34, 41]),
        "masked_labels": torch.tensor([5, IGNORED, 7, 0, VOCABULARY - 1]),
    }


def plain_bert_losses(model, batch, visible):
    params, config = dict(model.named_parameters()), model.config
    types = batch["token_type_ids"] if "token_type_embeddings.weight" in params else None
    hidden = plain_hidden(params, config, batch["input_ids"], types, visible)
    masked = hidden.flatten(0, 1)[batch["masked_positions"]]
    features = norm(params, "mlm_norm", acted(linear(params, "mlm_transform", masked), config), config)
    scores = features @ params["word_embeddings.weight"].T + params["mlm_bias"]
    losses = {"mlm": F.cross_entropy(scores, batch["masked_labels"], reduction="sum", ignore_index=IGNORED)}
    if model.sentence_task != "none":
        pooled = torch.tanh(linear(params, "pooler", hidden[:, 0]))
        scores = linear(params, "sentence_classifier", pooled)
        losses[model.sentence_task] = F.cross_entropy(scores, batch["sentence_labels"], reduction="sum")
    return losses


def assert_same(model, ours, expected):
    # the sentence loss and the table of angles are in fp32, all else in fp64
    rtol = 1e-6 if len(expected) > 1 or model.config.position_embedding == "rope" else 1e-9
    assert ours.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(ours[name].double(), loss, rtol=rtol, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(sum(losses.values()), parameters) for losses in (ours, expected)]
    for name, mine, theirs in zip(names, *gradients, strict=True):
        assert theirs.any(), name
        atol = rtol * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


FLAGS = {
    "plain": {},
    "memory flags": {"normalize_invertible": True, "gelu_checkpoint": True, "attn_dropout_checkpoint": True},
}
BERTS = [name for name, model in MODELS.items() if model["type"] == "bert"]
GPTS = [name for name, model in MODELS.items() if model["type"] == "gpt"]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("name", BERTS)
def test_a_bert_computes_what_plain_pytorch_does(name, unpad, flags):
    model, batch = built(name, **FLAGS[flags]).train(), bert_batch()
    if name in TASKS:
        batch["sentence_labels"] = torch.tensor([0, 1, 1])
    real = batch["attention_mask"]
    expected = plain_bert_losses(model, batch, real[:, None].expand(BATCH, LENGTH, LENGTH))
    places = {"token_positions": real.flatten().nonzero().flatten()} if unpad else {}
    assert_same(model, model(**batch, **places), expected)


def test_a_modernbert_reads_rows_of_several_samples_as_rows_of_their_own():
    """Rotary positions go on at the border of a sample, and only their differences count."""
    model, batch = built("modernbert").train(), bert_batch()
    segments = (torch.arange(LENGTH) >= torch.tensor([[6], [LENGTH], [3]])).int()
    batch["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    alone = plain_bert_losses(model, batch, segments[:, :, None] == segments[:, None])
    positions = torch.arange(LENGTH) - segments * torch.tensor([[6], [LENGTH], [3]])
    assert_same(model, model(**batch, position_ids=positions, segment_ids=segments), alone)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", GPTS)
def test_a_gpt_computes_what_plain_pytorch_does(name, flags):
    model = built(name, **FLAGS[flags]).train()
    torch.manual_seed(1)
    ids, segments = torch.randint(0, VOCABULARY, (BATCH, LENGTH)), torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    segments[1, 5:], segments[2, 1:] = 1, 1
    segments[2, 9:] = 2
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    params = dict(model.named_parameters())
    visible = (segments[:, :, None] == segments[:, None]) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    hidden = plain_hidden(params, model.config, ids, None, visible)
    scores = hidden @ params.get("lm_head.weight", params["word_embeddings.weight"]).T
    losses = {"clm": F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)}
    assert_same(model, model(ids, labels, segment_ids=segments), losses)


@pytest.mark.parametrize(
    ("name", "there", "missing"),
    [
        ("modernbert", {"embedding_norm", "final_norm"}, {"position_embeddings", "token_type_embeddings"}),
        ("modernbert with sentences", {"token_type_embeddings", "pooler"}, {"position_embeddings"}),
        ("bert with windows", {"position_embeddings", "token_type_embeddings"}, set()),
        ("llama", {"final_norm"}, {"position_embeddings", "lm_head"}),
        ("llama with a head", {"lm_head"}, {"position_embeddings"}),
    ],
)
def test_a_model_has_the_parts_that_its_keys_say(name, there, missing):
    parts = {name.split(".")[0] for name, _ in built(name).named_parameters()}
    assert there <= parts
    assert not missing & parts


def test_a_model_without_biases_has_none_but_that_of_its_head():
    assert [name for name, _ in built("modernbert").named_parameters() if "bias" in name] == ["mlm_bias"]
    assert not [name for name, _ in built("llama with a head").named_parameters() if "bias" in name]


def test_the_first_layer_of_a_modernbert_reads_the_norm_of_the_embedding_itself():
    names = [name for name, _ in built("modernbert").named_parameters() if name.endswith("attention_norm.weight")]
    assert names == [f"layers.{number}.attention_norm.weight" for number in (1, 2, 3)]


def test_an_untied_head_starts_as_the_embedding_does():
    torch.manual_seed(0)
    config = ModelConfig(**SIZES, **MODELS["llama with a head"])
    model = RECIPES["gpt"].build_model(config, LayerFlags(), ObjectiveConfig(type="clm"), 4096)
    for part in (model.lm_head, model.word_embeddings):
        assert part.weight.std().item() == pytest.approx(SIZES["initializer_range"], rel=0.02)
    assert not torch.equal(model.lm_head.weight, model.word_embeddings.weight)


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_a_sequence_longer_than_rotary_positions_were_promised_for_is_refused(name):
    with pytest.raises(ValueError, match="31 positions, max_position_embeddings=30"):
        built(name).encode(torch.zeros(1, 31, dtype=torch.int64))


@pytest.mark.parametrize("length", [4, LENGTH])
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_matrices_and_of_the_pairs_in_the_windows(name, length):
    """A product with a matrix takes two operations per token and weight, a pair of tokens four per column of the heads."""
    model = built(name)
    config, window = model.config, model.config.sliding_window
    matrices = sum(weight.numel() for weight in model.layers.parameters() if weight.ndim == 2)
    pairs = 0
    for number in range(config.num_hidden_layers):
        every = config.global_attn_every_n_layers
        if window and not (every and number % every == 0):
            pairs += length * min(length, 2 * (window // 2) + 1 if config.type == "bert" else window)
        else:
            pairs += length * length
    forward = 2 * length * matrices + 4 * pairs * config.num_attention_heads * config.head_size
    assert RECIPES[config.type].flops_per_sample(config, VOCABULARY, length, 0) == 3 * forward
