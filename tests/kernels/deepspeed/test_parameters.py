"""The parameters of DeepSpeed's layer: names, start, initial values, state dicts, and the way to BERT's names and back."""

import copy

import pytest
import torch
from helpers.deepspeed_door import config, layer, perturbed
from torch import nn
from torch.func import functional_call

from xformer_train.kernels.deepspeed.bert_state_dict import from_bert_state_dict, to_bert_state_dict
from xformer_train.kernels.deepspeed.layer import DeepSpeedTransformerLayer

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


def random_initial():
    H, F = 24, 96
    weights = [torch.randn(s) for s in [(H, H)] * 4 + [(H,), (F, H), (H, F), (H,)]]
    biases = [torch.randn(s) for s in [(H,)] * 5 + [(F,), (H,), (H,)]]
    return weights, biases


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
