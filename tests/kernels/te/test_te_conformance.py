"""What is left of Transformer Engine's own tests: a resumed training, delayed scaling inside of modules, sanity of odd uses.

Of its option tests some have no subject here: there is no delayed weight gradient and no saved original input, and a
feed-forward half that is computed again is a matter of checkpoints.
"""

import io
import math

import numpy as np
import pytest
import torch
from helpers.conformance import step
from torch import nn

from xformer_train.kernels import te
from xformer_train.kernels.te.rng_tracker import RngStatesTracker, seed_tensor_parallel

HIDDEN, FFN, HEADS = 32, 64, 2
RECIPES = {
    "high precision": None,
    "delayed": te.DelayedScaling(amax_history_len=3, amax_compute_algo="max"),
    "current": te.Float8CurrentScaling(),
}


class Training:
    """A GPT layer with dropout, its optimizer, and every random state that a step draws from."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.tracker = RngStatesTracker("cpu")
        seed_tensor_parallel(5, None, self.tracker)
        self.layer = te.TransformerLayer(
            HIDDEN, FFN, HEADS, fuse_qkv_params=True, drop_path_rate=0.2, get_rng_state_tracker=lambda: self.tracker
        )
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=1e-2)

    def train(self, first, last):
        """The losses of the steps from `first` up to `last`, two micro-batches each."""
        losses = []
        for number in range(first, last):
            self.optimizer.zero_grad()
            for micro in range(2):
                x = torch.randn(7, 3, HIDDEN, generator=torch.Generator().manual_seed(10 * number + micro))
                with te.fp8_autocast(enabled=self.recipe is not None, fp8_recipe=self.recipe):
                    out = self.layer((number + 1) * x, is_first_microbatch=micro == 0)
                loss = (out - x).square().mean()
                loss.backward()
                losses.append(loss.item())
            self.optimizer.step()
        return losses

    def states(self):
        return {
            "layer": self.layer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "tracker": self.tracker.get_states(),
        }

    def load(self, states):
        self.layer.load_state_dict(states["layer"])
        self.optimizer.load_state_dict(states["optimizer"])
        torch.set_rng_state(states["generator"])
        self.tracker.set_states(states["tracker"])


@pytest.mark.parametrize("kind", RECIPES)
def test_a_resumed_training_goes_on_bit_for_bit(kind):
    """Row 9: 3 steps, a file, 3 steps by objects that started elsewhere. Inputs grow, so that stale scales would show."""
    straight = Training(RECIPES[kind])
    expected = straight.train(0, 6)
    before = Training(RECIPES[kind])
    losses = before.train(0, 3)
    file = io.BytesIO()
    torch.save(before.states(), file)
    file.seek(0)
    after = Training(RECIPES[kind])
    after.train(0, 1)
    after.load(torch.load(file, weights_only=True))
    losses += after.train(3, 6)
    assert losses == expected
    for name, value in straight.layer.state_dict().items():
        assert torch.equal(after.layer.state_dict()[name], value), name
    for ours, theirs in zip(after.layer.parameters(), straight.layer.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert any("fp8" in name for name in straight.layer.state_dict()) == (kind == "delayed")


def new_scale(history, scale, algorithm, margin, largest):
    """The scale after a step whose amax is row 0 of the history, in fp32."""
    amax = history[0] if algorithm == "most_recent" else history.max()  # NaN if there is one
    if not (np.isfinite(amax) and amax > 0):
        return scale
    with np.errstate(over="ignore"):
        return min(largest / amax / np.float32(2**margin), np.finfo(np.float32).max)


AMAXES = (3.0, 0.0, 1e-42, math.inf, 0.25, math.nan, 5.0, 7.5, 1e30)
SLOTS = {"input": np.float32(448), "weight": np.float32(448), "grad_output": np.float32(57344)}


@pytest.mark.parametrize("length", [31, 1024])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
def test_delayed_scaling_of_a_module_follows_the_simulation(length, algorithm, margin):
    """Row 14, exact. The history starts full, its largest amaxes the oldest, so that they leave it one by one."""
    recipe = te.DelayedScaling(amax_history_len=length, amax_compute_algo=algorithm, margin=margin)
    module = te.Linear(16, 16, bias=False)
    history = torch.linspace(900, 1, length)[:, None].repeat(1, 3)
    history[0] = 0
    saved = {"scale": torch.tensor([0.5, 2.0, 4.0]), "amax_history": history, "updates": torch.full((3,), length)}
    module.fp8.load_state_dict(saved)
    histories, scales = history.numpy().copy(), saved["scale"].numpy().copy()
    for number in range(20):
        is_first = (None, True, False, False)[number % 4]
        amaxes = {name: AMAXES[(number + 3 * place) % len(AMAXES)] for place, name in enumerate(SLOTS)}
        if is_first is not False:
            nn.init.constant_(module.weight, 0.1 * amaxes["weight"])
            module.weight.data[3, number % 16] = -amaxes["weight"]
        x = torch.zeros(5, 16).index_fill_(0, torch.tensor([2]), amaxes["input"])
        with te.fp8_autocast(fp8_recipe=recipe):
            out = module(x, is_first_microbatch=is_first)
        out.backward(torch.full_like(out, -amaxes["grad_output"]))
        for place, (name, largest) in enumerate(SLOTS.items()):
            if name == "weight" and is_first is False:
                continue  # the kept copy was used: its column stands still
            column = histories[:, place]
            column[0] = amaxes[name]
            scales[place] = new_scale(column, scales[place], algorithm, margin, largest)
            histories[:, place] = np.roll(column, -1)
            histories[0, place] = 0
        state = module.fp8.state_dict()
        assert state["scale"].numpy().tolist() == scales.tolist(), number
        np.testing.assert_array_equal(state["amax_history"].numpy(), histories)


def test_every_product_of_a_layer_keeps_its_weights_column_with_its_kept_weight():
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, fuse_qkv_params=True)
    recipe = te.DelayedScaling(amax_history_len=8)
    for is_first, expected in ((None, 1), (True, 2), (False, 2), (False, 2), (None, 3)):
        with te.fp8_autocast(fp8_recipe=recipe):
            out = layer(torch.randn(7, 3, HIDDEN), is_first_microbatch=is_first)
        out.sum().backward()
        histories = {n: h for n, h in layer.state_dict().items() if n.endswith("amax_history")}
        assert len(histories) == 4
        for name, history in histories.items():
            assert history[:, 1].count_nonzero() == expected, name


T5 = {"layer_type": "decoder", "normalization": "RMSNorm", "bias": False, "layernorm_epsilon": 1e-6}
LAYERS = {
    "gpt": {},
    "fused gpt": {"fuse_qkv_params": True},
    "bert": {
        "output_layernorm": True,
        "apply_residual_connection_post_layernorm": True,
        "self_attn_mask_type": "padding",
        "activation": "gelu_erf",
    },
    "drop_path": {"drop_path_rate": 0.3, "fuse_qkv_params": True},
    "t5": T5 | {"activation": "relu"},
    "t5 v1.1": T5 | {"activation": "geglu", "fuse_qkv_params": True, "kv_channels": 16},
    "groups": {"num_gqa_groups": 1, "fuse_qkv_params": True},
}


def sequence(length, batch, hidden, dtype=torch.float32):
    return torch.randn(length, batch, hidden, dtype=dtype, requires_grad=True)


def build(name, hidden=HIDDEN, ffn=FFN, heads=HEADS, **options):
    return te.TransformerLayer(hidden, ffn, heads, **LAYERS[name] | options)


def call(layer, x, **kwargs):
    """The layer with padding at the end of the second sample, and an encoder's output whose last position is hidden."""
    length, batch = x.shape[:2]
    hidden = torch.zeros(batch, 1, 1, length, dtype=torch.bool)
    hidden[1:2, ..., length // 2 :] = True
    if layer.config.layer_type == "encoder":
        return layer(x, hidden, **kwargs)
    encoded = sequence(5, batch, x.shape[2], x.dtype)
    out = layer(x, hidden, encoded, torch.arange(5).expand(batch, 1, 1, 5) == 4, **kwargs)
    if out.requires_grad and x.numel():
        (gradient,) = torch.autograd.grad(out.sum(), encoded, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient[:4].any()
        assert not gradient[4].any()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_odd_sizes_run_in_training_and_give_every_gradient(name, dtype):
    """Row 16, its weird size: 3 samples of 37 tokens, 3 heads of 23 columns; dropout on."""
    layer, x = build(name, 69, 92, 3, params_dtype=dtype), sequence(37, 3, 69, dtype)
    out = call(layer, x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    out.float().square().mean().backward()
    for key, gradient in {"input": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}.items():
        assert gradient.isfinite().all(), key
        assert gradient.dtype == dtype, key
    with torch.no_grad():
        assert call(layer.eval(), x).isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(0, 3), (7, 0)])
def test_no_tokens(name, recipe, shape):
    layer, x = build(name), sequence(*shape, HIDDEN)
    with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
        out = call(layer, x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("recipe", [None, te.Float8CurrentScaling()], ids=["high precision", "current"])
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_weights_and_an_input_without_gradient_change_no_other_gradient(name, recipe):
    """skip_wgrad and skip_dgrad: what is still asked for comes out the same, bit for bit."""
    layer = build(name, hidden_dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0)

    def gradients(x):
        torch.manual_seed(3)
        layer.zero_grad()
        with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            out = call(layer, x)
        out.square().sum().backward()
        return {"input": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}

    values = torch.randn(7, 3, HIDDEN)
    expected = gradients(values.clone().requires_grad_())
    without_dgrad = gradients(values.clone())
    assert without_dgrad.pop("input") is None
    for key, gradient in without_dgrad.items():
        assert torch.equal(gradient, expected[key]), key
    frozen = {key for key in expected if key.endswith(("weight", "query", "key", "value"))}
    for key in frozen:
        layer.get_parameter(key).requires_grad_(False)
    without_wgrad = gradients(values.clone().requires_grad_())
    for key, gradient in without_wgrad.items():
        assert gradient is None if key in frozen else torch.equal(gradient, expected[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", ["fused gpt", "bert", "t5"])
def test_under_autocast_outputs_have_its_dtype_and_gradients_the_parameters(name, recipe, dtype):
    layer, x = build(name), sequence(7, 3, HIDDEN)
    with torch.autocast("cpu", dtype), te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
        out = call(layer, x)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert {p.grad.dtype for p in layer.parameters()} | {x.grad.dtype} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt", "t5 v1.1"])
def test_casts_change_parameters_and_no_fp8_state(name):
    """From fp32 to half precision and back, more than once, with delayed scaling between."""
    layer, recipe = build(name), te.DelayedScaling(amax_history_len=8)
    for number, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16, torch.float32, torch.bfloat16)):
        before = {n: t.clone() for n, t in layer.state_dict().items() if "fp8" in n}
        layer = layer.to("cpu").to(dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        for key, value in before.items():
            now = layer.state_dict()[key]
            assert now.dtype == value.dtype, key
            assert torch.equal(now, value), key
        with te.fp8_autocast(fp8_recipe=recipe):
            out = call(layer, sequence(7, 3, HIDDEN, dtype))
        out.float().square().mean().backward()
        layer.zero_grad()
        state = layer.state_dict()
        assert {t.dtype for n, t in state.items() if n.endswith(("scale", "amax_history"))} == {torch.float32}
        assert all((t[:2] == number + 1).all() for n, t in state.items() if n.endswith("updates"))


@pytest.mark.parametrize("name", ["gpt", "fused gpt", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_a_model_of_transformers_is_saved_and_loaded(name, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "te-layer"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            wanted = {"params_dtype": torch.get_default_dtype()}  # from_pretrained sets it to its dtype
            self.layer, self.norm = build(name, **wanted), te.LayerNorm(HIDDEN, **wanted)
            self.post_init()

        def _init_weights(self, module):
            """The modules have drawn theirs."""

        def forward(self, x):
            return self.norm(self.layer(x))

    model = Model(Config()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(7, 3, HIDDEN, dtype=dtype)
    expected = step(model, x)
    model.save_pretrained(tmp_path)
    wanted = {"torch_dtype" if transformers.__version__ < "4.56" else "dtype": dtype}
    loaded, report = Model.from_pretrained(tmp_path, **wanted, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = step(loaded.eval(), x)
    assert torch.equal(ours[0], expected[0])
    for key, gradient in expected[1].items():
        assert torch.equal(ours[1][key], gradient), key
    with te.fp8_autocast(fp8_recipe=te.DelayedScaling()):  # what from_pretrained put together has FP8 states that work
        loaded(x).sum().backward()
    loaded.save_pretrained(tmp_path / "fp8")
    again = Model.from_pretrained(tmp_path / "fp8", **wanted)
    assert torch.equal(again.eval()(x), expected[0])
