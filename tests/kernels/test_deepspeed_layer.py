"""The DeepSpeed door: its config, its parameters, its arguments, and what it refuses."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels import TransformerLayer
from xformer_train.kernels.bert_state_dict import from_bert_state_dict, to_bert_state_dict
from xformer_train.kernels.deepspeed_layer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

SMALL = {
    "hidden_size": 24,
    "heads": 3,
    "attn_dropout_ratio": 0.1,
    "hidden_dropout_ratio": 0.1,
    "num_hidden_layers": 2,
    "initializer_range": 0.02,
}
SHAPES = {
    "attn_qkvw": (72, 24),
    "attn_qkvb": (72,),
    "attn_ow": (24, 24),
    "attn_ob": (24,),
    "attn_nw": (24,),
    "attn_nb": (24,),
    "inter_w": (96, 24),
    "inter_b": (96,),
    "output_w": (24, 96),
    "output_b": (24,),
    "norm_w": (24,),
    "norm_b": (24,),
}
CORE_NAMES = {
    "attn_qkvw": "qkv.weight",
    "attn_qkvb": "qkv.bias",
    "attn_ow": "attention_output.weight",
    "attn_ob": "attention_output.bias",
    "inter_w": "intermediate.weight",
    "inter_b": "intermediate.bias",
    "output_w": "output.weight",
    "output_b": "output.bias",
}
PRE_LN_NAMES = {
    "norm_w": "attention_norm.weight",
    "norm_b": "attention_norm.bias",
    "attn_nw": "mlp_norm.weight",
    "attn_nb": "mlp_norm.bias",
}
POST_LN_NAMES = {
    "attn_nw": "attention_norm.weight",
    "attn_nb": "attention_norm.bias",
    "norm_w": "mlp_norm.weight",
    "norm_b": "mlp_norm.bias",
}


def config(**changes):
    return DeepSpeedTransformerConfig(**{**SMALL, **changes})


def layer(weights_from=3, **changes):
    torch.manual_seed(weights_from)
    return DeepSpeedTransformerLayer(config(**changes))


def perturbed(module):
    """The module with every parameter moved off its start, so that mixing two of them up shows."""
    torch.manual_seed(17)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def random_initial():
    H, F = 24, 96
    weights = [torch.randn(s) for s in [(H, H)] * 4 + [(H,), (F, H), (H, F), (H,)]]
    biases = [torch.randn(s) for s in [(H,)] * 5 + [(F,), (H,), (H,)]]
    return weights, biases


def test_every_default_is_deepspeeds():
    fresh = DeepSpeedTransformerConfig()
    on = {"pre_layer_norm", "adjust_init_range", "training"}
    off = {
        "fp16",
        "normalize_invertible",
        "gelu_checkpoint",
        "attn_dropout_checkpoint",
        "stochastic_mode",
        "return_tuple",
    }
    unset = {"batch_size", "hidden_size", "intermediate_size", "heads", "attn_dropout_ratio", "hidden_dropout_ratio"}
    unset |= {"num_hidden_layers", "initializer_range", "local_rank", "seed", "max_seq_length"}
    expected = (
        dict.fromkeys(on, True) | dict.fromkeys(off, False) | dict.fromkeys(unset, -1) | {"layer_norm_eps": 1e-12}
    )
    assert {name: getattr(fresh, name) for name in fresh.__dataclass_fields__} == expected


def test_positional_arguments_come_in_deepspeeds_order():
    given = DeepSpeedTransformerConfig(8, 24, 40, 3, 0.1, 0.2, 2, 0.02, 1e-5, -1, 7, True, False)
    assert (given.heads, given.hidden_dropout_ratio, given.seed, given.pre_layer_norm) == (3, 0.2, 7, False)


def test_intermediate_size_is_four_times_the_hidden_size_of_the_moment_unless_given():
    filled = DeepSpeedTransformerConfig()
    assert filled.intermediate_size == -1
    filled.hidden_size = 24
    assert filled.intermediate_size == 96
    filled.hidden_size = 32
    assert filled.intermediate_size == copy.deepcopy(filled).intermediate_size == 128
    filled.intermediate_size = 40
    assert filled.intermediate_size == 40
    assert DeepSpeedTransformerConfig.from_dict({"hidden_size": 24}).intermediate_size == 96
    assert layer(intermediate_size=0).inter_w.shape == (96, 24)


def test_a_config_can_be_filled_attribute_by_attribute():
    filled = DeepSpeedTransformerConfig()
    for name, value in SMALL.items():
        setattr(filled, name, value)
    assert filled == config()
    DeepSpeedTransformerLayer(filled)
    with pytest.raises(AttributeError, match="did you mean gelu_checkpoint"):
        filled.gelu_checkpont = True


def test_a_json_file_is_read_as_utf_8_and_equals_its_dict(tmp_path):
    path = tmp_path / "größe.json"
    path.write_text(json.dumps({**SMALL, "pre_layer_norm": False}), encoding="utf-8")
    assert DeepSpeedTransformerConfig.from_json_file(path) == config(pre_layer_norm=False)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="one object"):
        DeepSpeedTransformerConfig.from_json_file(path)


def test_from_dict_refuses_an_unknown_key_and_names_the_nearest():
    with pytest.raises(ValueError, match=r"hiden_size=24.*did you mean hidden_size"):
        DeepSpeedTransformerConfig.from_dict({"hiden_size": 24})
    with pytest.raises(ValueError, match="no parameter xyz; remove it"):
        DeepSpeedTransformerConfig.from_dict({"xyz": 1})


@pytest.mark.parametrize("name", SMALL)
def test_a_layer_refuses_a_config_in_which_something_it_needs_is_not_set(name):
    with pytest.raises(ValueError, match=f"^{name}=-1 is .*set "):
        layer(**{name: -1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "hidden_size=24 is not divisible by heads=5"),
        ({"attn_dropout_ratio": 1.0}, r"attn_dropout_ratio=1.0 .* \[0, 1\)"),
        ({"hidden_dropout_ratio": math.nan}, "hidden_dropout_ratio=nan"),
        ({"initializer_range": math.inf}, "initializer_range=inf"),
        ({"hidden_size": "24"}, "hidden_size='24' is of type str; give it as int"),
        ({"hidden_size": 24.0}, "hidden_size=24.0 is of type float; give it as int"),
        ({"fp16": "false"}, "fp16='false' is of type str; give it as bool"),
        ({"heads": "3"}, "heads='3' is of type str"),
        ({"seed": 2**63}, r"seed=9223372036854775808 does not fit .* below 2\*\*63"),
        ({"seed": True}, "seed=True is of type bool; give it as int"),
        ({"intermediate_size": None}, "intermediate_size=None is of type NoneType"),
    ],
)
def test_impossible_values_are_refused_by_their_deepspeed_name(change, message):
    with pytest.raises(ValueError, match=message):
        layer(**change)


@pytest.mark.parametrize(
    "flag", ["normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "stochastic_mode", "pre_layer_norm"]
)
@pytest.mark.parametrize("value", [True, False])
def test_each_flag_reaches_the_core(flag, value):
    core, other = layer(**{flag: value}).config, layer(**{flag: not value}).config
    assert getattr(core, flag) is value
    assert {name for name, setting in vars(core).items() if setting != vars(other)[name]} == {flag}


def test_the_number_of_layers_is_needed_only_to_adjust_the_start():
    layer(adjust_init_range=False, num_hidden_layers=-1)


def test_parameters_have_deepspeeds_names_and_shapes_and_nothing_else_is_in_the_state():
    made = layer()
    assert {name: tuple(value.shape) for name, value in made.state_dict().items()} == SHAPES
    assert list(dict(made.named_parameters())) == list(SHAPES)
    assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in made.parameters())


@pytest.mark.parametrize("local_rank", [-1, 0, 3])
def test_output_projections_start_smaller_on_every_rank(local_rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = layer(hidden_size=240, num_hidden_layers=8, local_rank=local_rank)
    plain = layer(hidden_size=240, num_hidden_layers=8, adjust_init_range=False)
    for name in ("attn_ow", "output_w"):
        assert getattr(made, name).std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert getattr(plain, name).std().item() == pytest.approx(0.02, rel=0.05)
    assert made.attn_qkvw.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(made.norm_w, torch.ones(240)) and not made.attn_qkvb.any()


def test_local_rank_makes_its_gpu_the_current_one_where_there_are_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    layer(local_rank=2)
    layer()
    assert chosen == [2]


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_the_layer_computes_what_the_core_does_with_the_same_parameters(pre_layer_norm):
    ours = perturbed(layer(pre_layer_norm=pre_layer_norm))
    core = TransformerLayer(ours.config)
    names = CORE_NAMES | (PRE_LN_NAMES if pre_layer_norm else POST_LN_NAMES)
    core.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    x = torch.randn(2, 7, 24)
    results = []
    for module in (ours, core):
        torch.manual_seed(5)
        y = module(x)
        y.square().sum().backward()
        results.append(y)
    assert torch.equal(*results)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, core.get_parameter(names[name]).grad), name


def test_layer_ids_count_from_zero_or_are_what_was_given_and_layers_share_nothing(monkeypatch):
    monkeypatch.setattr(DeepSpeedTransformerLayer, "layer_id", 0)
    shared = config()
    stack = nn.ModuleList(copy.deepcopy(DeepSpeedTransformerLayer(shared)) for _ in range(3))
    assert [made.layer_id for made in stack] == [0, 1, 2]
    assert DeepSpeedTransformerLayer.layer_id == 3
    numbered = nn.ModuleList([copy.deepcopy(DeepSpeedTransformerLayer(i, shared)) for i in (5, 6)])
    assert [made.layer_id for made in numbered] == [5, 6]
    assert shared == config()
    shared.return_tuple = True
    assert torch.is_tensor(stack[0](torch.randn(1, 2, 24)))
    assert len({parameter.data_ptr() for parameter in stack.parameters()}) == 3 * 12


def test_both_forms_of_the_constructor_take_initial_values():
    weights, biases = random_initial()
    first = DeepSpeedTransformerLayer(config(), weights, biases)
    second = DeepSpeedTransformerLayer(4, config(), initial_weights=weights, initial_biases=biases)
    third = DeepSpeedTransformerLayer(layer_id=4, config=config(), initial_weights=weights, initial_biases=biases)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]) and torch.equal(value, third.state_dict()[name])
    assert second.layer_id == third.layer_id == 4


def test_initial_values_are_copied_to_their_places_biases_of_query_key_and_value_included():
    weights, biases = random_initial()
    made = DeepSpeedTransformerLayer(config(), weights, biases)
    for given, kind in ((weights, "w"), (biases, "b")):
        assert torch.equal(getattr(made, "attn_qkv" + kind), torch.cat(given[:3]))
        for value, name in zip(given[3:], ("attn_o", "attn_n", "inter_", "output_", "norm_"), strict=True):
            placed = getattr(made, name + kind)
            assert torch.equal(placed, value)
            assert placed.data_ptr() != value.data_ptr()


def test_one_list_of_initial_values_leaves_the_other_parameters_at_their_start():
    weights, biases = random_initial()
    only_weights = DeepSpeedTransformerLayer(config(), initial_weights=weights)
    assert torch.equal(only_weights.inter_w, weights[5]) and not only_weights.inter_b.any()
    only_biases = DeepSpeedTransformerLayer(config(), initial_biases=biases)
    assert torch.equal(only_biases.inter_b, biases[5]) and torch.equal(only_biases.norm_w, torch.ones(24))
    assert only_biases.state_dict().keys() == SHAPES.keys()


def test_initial_values_that_do_not_fit_are_refused():
    weights, biases = random_initial()
    with pytest.raises(ValueError, match=r"initial_weights\[6\] has shape \(24, 95\)"):
        DeepSpeedTransformerLayer(config(), [*weights[:6], weights[6][:, 1:], weights[7]])
    with pytest.raises(ValueError, match="initial_biases has 7 tensors; give 8"):
        DeepSpeedTransformerLayer(config(), initial_biases=biases[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers_train(dtype):
    made = layer(fp16=True) if dtype == torch.float16 else layer().to(dtype)
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[0.0] * 5, [0.0] * 3 + [torch.finfo(torch.float32).min] * 2])
    y = made(x, mask)
    assert y.dtype == dtype and y.isfinite().all()
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in made.parameters())


def test_a_state_dict_goes_round_and_a_replaced_parameter_is_the_one_computed_with():
    source, target = perturbed(layer().eval()), layer(weights_from=4).eval()
    x = torch.randn(2, 5, 24)
    expected = source(x)
    assert torch.equal(functional_call(target, source.state_dict(), (x,)), expected)
    assert not torch.equal(target(x), expected)
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(x), expected)
    assert torch.equal(copy.deepcopy(source)(x), expected)
    torch.testing.assert_close(source.double()(x.double()).float(), expected)


@pytest.mark.parametrize("fully_masked", [False, True])
def test_the_mask_may_be_four_or_two_dimensional_of_any_float_dtype_and_minus_infinity(fully_masked):
    made = layer().eval()
    x = torch.randn(2, 5, 24)
    padding = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1] if fully_masked else [0, 0, 0, 1, 1]], dtype=torch.bool)
    keep = torch.zeros(2, 5)
    expected = made(x, keep.masked_fill(padding, -1e4).view(2, 1, 1, 5))
    assert torch.equal(made(x, keep.masked_fill(padding, -1e4)), expected)
    assert torch.equal(made(x, keep.double().masked_fill(padding, -1e4)), expected)
    lowest = made(x, keep.masked_fill(padding, -math.inf))
    assert lowest.isfinite().all()
    if not fully_masked:
        torch.testing.assert_close(lowest, expected)
        changed = x.clone()
        changed[1, 3:] += 1
        assert torch.equal(made(changed, keep.masked_fill(padding, -1e4))[1, :3], expected[1, :3])
    assert torch.equal(made(x, keep), made(x))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 1, 5, 5), r"shape \(2, 1, 5, 5\)"),
        (torch.zeros(2, 3, 1, 5), r"shape \(2, 3, 1, 5\)"),
        (torch.zeros(1, 1, 1, 5), r"shape \(1, 1, 1, 5\)"),
        (torch.zeros(2, 1, 1, 6), r"shape \(2, 1, 1, 6\)"),
        (torch.zeros(2, 1, 5), r"shape \(2, 1, 5\)"),
        (torch.zeros(5), r"shape \(5,\)"),
        (torch.ones(2, 5, dtype=torch.bool), "torch.bool"),
        (torch.ones(2, 5, dtype=torch.int64), "torch.int64"),
    ],
)
def test_a_mask_that_is_not_one_additive_value_per_key_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        layer()(torch.randn(2, 5, 24), mask)


def test_no_gradient_flows_into_the_mask():
    mask = torch.zeros(2, 1, 1, 5, requires_grad=True)
    layer()(torch.randn(2, 5, 24), mask).sum().backward()
    assert mask.grad is None


def test_arguments_of_deepspeeds_forward_are_refused_unless_they_have_their_default():
    made, x = layer().eval(), torch.randn(1, 3, 24)
    assert torch.equal(made(x, None, None, None, None, None, None, False, None), made(x))
    for name in ("head_mask", "layer_head_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_value"):
        with pytest.raises(ValueError, match=f"^{name} was given"):
            made(x, **{name: torch.ones(3)})
    with pytest.raises(ValueError, match="output_attentions was given"):
        made(x, output_attentions=True)
    with pytest.raises(ValueError, match="grads was given"):
        made(x, grads=[])


def test_input_beyond_the_configured_sizes_is_refused():
    made = layer(batch_size=2, max_seq_length=5)
    made(torch.randn(1, 5, 24))
    with pytest.raises(ValueError, match=r"\(3, 5, 24\), above batch_size=2"):
        made(torch.randn(3, 5, 24))
    with pytest.raises(ValueError, match=r"\(2, 6, 24\), above max_seq_length=5"):
        made(torch.randn(2, 6, 24))
    with pytest.raises(ValueError, match=r"\(5, 24\); give it as \(B, S, H\)"):
        made(torch.randn(5, 24))


def test_return_tuple_wraps_the_output():
    x = torch.randn(1, 3, 24)
    wrapped = layer(return_tuple=True).eval()(x)
    assert isinstance(wrapped, tuple) and len(wrapped) == 1
    assert torch.equal(wrapped[0], layer().eval()(x))


def test_non_contiguous_input_gives_the_same_output_and_gradients():
    made, dense = layer(), torch.randn(2, 7, 24)
    strided = dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    results = []
    for x in (dense, strided):
        torch.manual_seed(8)
        leaf = x.detach().requires_grad_()
        y = made(leaf, torch.zeros(2, 14)[:, ::2])
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *made.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_training_sets_the_mode_a_layer_starts_in_and_the_module_decides_afterwards():
    x = torch.randn(2, 5, 24)
    made = layer(training=False)
    assert not made.training and torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def dropped_output(seed, torch_seed=1):
    made, x = layer(seed=seed), torch.linspace(-1, 1, 240).view(2, 5, 24)
    torch.manual_seed(torch_seed)
    return made(x)


def test_the_dropout_seed_and_torchs_generator_decide_the_masks_together():
    assert torch.equal(dropped_output(1234), dropped_output(1234))
    assert not torch.equal(dropped_output(1234), dropped_output(1235))
    assert not torch.equal(dropped_output(1234), dropped_output(1234, torch_seed=2))


def test_the_dropout_seed_leaves_initial_weights_and_torchs_generator_alone():
    assert torch.equal(layer().attn_qkvw, layer(seed=1234).attn_qkvw)
    states = []
    for seed in (-1, 1234):
        dropped_output(seed)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_with_a_dropout_seed_reproduces_the_masks(reentrant):
    made = layer(seed=1234)
    x = torch.randn(2, 9, 24, requires_grad=True)
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(made(x).square().sum(), x)
    torch.manual_seed(1)
    checkpoint(made, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(plain, x.grad)


def test_a_model_state_goes_to_bert_names_and_back_exactly():
    model = nn.ModuleDict({"embeddings": nn.Embedding(5, 24), "layer": nn.ModuleList([layer(), layer(weights_from=4)])})
    state = perturbed(model).state_dict()
    bert = to_bert_state_dict(state)
    assert "layer.1.attention.self.key.bias" in bert and "embeddings.weight" in bert
    assert not any("attn_" in name for name in bert)
    assert len({value.untyped_storage().data_ptr() for value in bert.values()}) == len(bert) == 2 * 16 + 1
    back = from_bert_state_dict(bert)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_half_a_layer_or_none_is_refused_in_both_directions():
    state = dict(layer().state_dict())
    bert = to_bert_state_dict(state)
    del state["norm_b"], bert["output.dense.bias"]
    with pytest.raises(ValueError, match="no entry norm_b"):
        to_bert_state_dict(state)
    with pytest.raises(ValueError, match=r"no entry output\.dense\.bias"):
        from_bert_state_dict(bert)
    with pytest.raises(ValueError, match="so no layer"):
        to_bert_state_dict(bert)


def test_transformers_bert_with_converted_weights_computes_the_same():
    transformers = pytest.importorskip("transformers")
    bert_config = transformers.BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=96,
        num_hidden_layers=2,
        vocab_size=11,
        hidden_act="gelu_pytorch_tanh",
        attn_implementation="eager",
    )
    encoder = perturbed(transformers.models.bert.modeling_bert.BertEncoder(bert_config)).eval()
    stack = nn.ModuleList([layer(pre_layer_norm=False), layer(pre_layer_norm=False)]).eval()
    converted = from_bert_state_dict(encoder.state_dict())
    stack.load_state_dict({name.removeprefix("layer."): value for name, value in converted.items()})
    x = torch.randn(2, 7, 24)
    mask = torch.zeros(2, 1, 1, 7)
    mask[1, ..., 4:] = -1e4
    hidden = x
    for made in stack:
        hidden = made(hidden, mask)
    torch.testing.assert_close(hidden, encoder(x, attention_mask=mask).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert to_bert_state_dict(converted).keys() == encoder.state_dict().keys()
