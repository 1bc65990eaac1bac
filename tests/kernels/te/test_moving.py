"""What programs that were written for Transformer Engine and Megatron hand to its modules and look for on them."""

from contextlib import contextmanager

import pytest
import torch

from xformer_train.kernels import te

RECIPE = pytest.mark.parametrize("recipe", [None, te.Float8CurrentScaling()], ids=["high precision", "fp8"])


@RECIPE
@pytest.mark.parametrize("build", [te.Linear, te.LayerNormLinear, te.LayerNormMLP])
def test_megatrons_hooks_run_and_learn_that_main_grad_has_the_gradient(build, recipe):
    fused, plain = build(16, 16, fuse_wgrad_accumulation=True), build(16, 16)
    plain.load_state_dict(fused.state_dict())
    met = []
    weights = {name: parameter for name, parameter in fused.named_parameters() if parameter.ndim == 2}
    for name, weight in weights.items():
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False

        def hook(parameter, name=name):
            met.append((name, parameter.grad_added_to_main_grad))
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(hook)
    for x in torch.randn(2, 5, 2, 16):
        for module in (fused, plain):
            with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
                y = module(x)
            y.square().sum().backward()
    assert sorted(met) == sorted([(name, True) for name in weights] * 2)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.main_grad, plain.get_parameter(name).grad)


def test_a_weight_that_is_not_watched_keeps_no_gradient():
    module = te.Linear(16, 16, fuse_wgrad_accumulation=True)
    module.weight.main_grad = torch.zeros(16, 16)
    module(torch.randn(3, 16)).sum().backward()
    assert module.weight.grad is None and not hasattr(module.weight, "grad_added_to_main_grad")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_parameters_have_transformer_engines_order(bias, norm):
    """Optimizers keep their state by position."""
    module = te.LayerNormLinear(8, 8, bias=bias, normalization=norm)
    names = ["layer_norm_weight", *(["layer_norm_bias"] if norm == "LayerNorm" else []), "weight"]
    assert [name for name, _ in module.named_parameters()] == names + (["bias"] if bias else [])
    mlp = [name for name, _ in te.LayerNormMLP(8, 8).named_parameters()]
    assert mlp == ["layer_norm_weight", "layer_norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]


@pytest.mark.parametrize("core", ["core_attention", "core_attention.fused_attention"])
def test_fp8_states_of_attention_in_checkpoints_are_skipped(core):
    layer = te.TransformerLayer(8, 16, 2, layer_type="decoder")
    state = layer.state_dict()
    for half in ("self_attention", "inter_attention"):
        state[f"{half}.{core}._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    layer.load_state_dict(state)


class MegatronTracker:
    """Its interface: no device, no active state."""

    def __init__(self):
        self.states = {"model-parallel-rng": torch.Generator().manual_seed(7).get_state()}

    def get_states(self):
        return dict(self.states)

    def set_states(self, states):
        self.states = states

    @contextmanager
    def fork(self, name="model-parallel-rng"):
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def test_a_tracker_without_a_device_serves_a_layer_and_a_checkpoint():
    tracker = MegatronTracker()
    layer = te.TransformerLayer(8, 16, 2, get_rng_state_tracker=lambda: tracker)
    x, found = torch.randn(5, 2, 8), []
    for run in (layer, lambda x: te.checkpoint(layer, x, get_rng_state_tracker=lambda: tracker)):
        tracker.states = MegatronTracker().states
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        found.append((y, leaf.grad, tracker.states["model-parallel-rng"]))
    assert all(map(torch.equal, *found))
    assert not torch.equal(tracker.states["model-parallel-rng"], MegatronTracker().states["model-parallel-rng"])


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_a_mask_of_two_dims_holds_for_all_samples(layout):
    mask = torch.rand(5, 5).round().bool()
    mask[2] = True  # sees nothing
    layer = te.TransformerLayer(8, 16, 2, self_attn_mask_type="arbitrary", attn_input_format=layout).eval()
    x = torch.randn((5, 3, 8) if layout == "sbhd" else (3, 5, 8))
    assert torch.equal(layer(x, mask), layer(x, mask[None, None]))
    causal = te.TransformerLayer(8, 16, 2, attn_input_format=layout).eval()
    assert torch.equal(causal(x, torch.ones(5, 5).triu(1).bool(), self_attn_mask_type="arbitrary"), causal(x))
    decoder = te.TransformerLayer(8, 16, 2, layer_type="decoder", attn_input_format=layout).eval()
    memory, hidden = torch.randn((4, 3, 8) if layout == "sbhd" else (3, 4, 8)), torch.rand(5, 4).round().bool()
    results = [decoder(x, None, memory, hidden_keys) for hidden_keys in (hidden, hidden[None, None])]
    assert torch.equal(*results)
