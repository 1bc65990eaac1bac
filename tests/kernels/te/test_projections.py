"""te.Linear, te.LayerNorm, te.RMSNorm, te.LayerNormLinear and te.LayerNormMLP against plain torch with the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.conformance import assert_same_step, share_parameters, step
from torch import nn

from xformer_train.kernels import te

DTYPES = [torch.float32, torch.bfloat16]
NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
GATED = {"glu": torch.sigmoid, "geglu": "gelu", "qgeglu": "qgelu", "reglu": F.relu, "sreglu": "srelu", "swiglu": F.silu}
PLAIN = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "srelu": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
}


class Mlp(nn.Module):
    def __init__(self, hidden, ffn, *, bias, activation, norm=nn.LayerNorm):
        super().__init__()
        gate = GATED.get(activation)
        self.gate = PLAIN[gate] if isinstance(gate, str) else gate
        self.function = PLAIN.get(activation)
        self.norm = norm(hidden, eps=1e-5)
        self.fc1 = nn.Linear(hidden, ffn if gate is None else 2 * ffn, bias=bias)
        self.fc2 = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x):
        x = self.fc1(self.norm(x))
        if self.gate is None:
            return self.fc2(self.function(x))
        half = x.shape[-1] // 2
        return self.fc2(self.gate(x[..., :half]) * x[..., half:])


def mlp_names(ours):
    names = {"layer_norm": "norm", "fc1": "fc1", "fc2": "fc2"}
    return {n: ".".join((names[n.rsplit("_", 1)[0]], n.rsplit("_", 1)[1])) for n, _ in ours.named_parameters()}


# (atol, rtol) of outputs and of gradients. The table allows fp32 more: 5e-3 to 2e-2 for what one summation order explains.
FP32 = ((1e-5, 1e-5), (1e-4, 1e-5))
BF16 = {
    "Linear": ((5e-2, 2e-2),) * 2,
    "LayerNormLinear": ((2e-2, 4e-2), (5e-2, 4e-2)),
    "LayerNormMLP": ((5e-2, 4e-2), (2e-1, 4e-2)),
}


def assert_conforms(ours, reference, names, x, dtype):
    ours = ours.to(dtype)
    share_parameters(ours, reference, names)
    out, grads = FP32 if dtype == torch.float32 else BF16[type(ours).__name__]
    x = x.to(dtype)
    assert_same_step(step(ours, x), step(reference, x.float()), names, out=out, grads=grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("return_bias", [True, False])
def test_linear(dtype, bias, return_bias):
    reference = nn.Linear(23, 37, bias=bias)
    names = {"weight": "weight"} | ({"bias": "bias"} if bias else {})
    ours = te.Linear(23, 37, bias=bias, return_bias=return_bias)
    assert list(ours.state_dict()) == list(names)
    x = torch.randn(5, 3, 23)
    if not return_bias:
        assert_conforms(ours, reference, names, x, dtype)
        return
    out, returned = ours.to(dtype)(x.to(dtype))  # neither lost nor added twice
    assert returned is ours.bias
    torch.testing.assert_close(out, F.linear(x.to(dtype), ours.weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("zero_centered_gamma", [False, True])
def test_norms(dtype, normalization, eps, zero_centered_gamma):
    """The reference is in fp32 in any case: bf16 rounds the output of ours once."""
    ours = getattr(te, normalization)(33, eps=eps, zero_centered_gamma=zero_centered_gamma).to(dtype)
    reference = NORMS[normalization](33, eps=eps)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            shift = 1 if zero_centered_gamma and name == "weight" else 0
            reference.get_parameter(name).copy_(parameter.float() + shift)
    x = torch.randn(7, 2, 33, dtype=dtype)
    results = step(ours, x), step(reference, x.float())
    wide = dtype == torch.float32
    names = {n: n for n, _ in ours.named_parameters()}
    # 1e-7 in the table is below what two orders of summation agree to in fp32 at outputs up to 4
    out, grads = (
        ((1e-6, 1e-6), (2e-3 if normalization == "RMSNorm" else 1e-4, 1e-5)) if wide else ((2e-2, 0), (2e-2, 2e-2))
    )
    assert_same_step(*results, names, out=out, grads=grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_layernorm_linear(dtype, normalization, bias):
    reference = nn.Sequential(NORMS[normalization](32, eps=1e-5), nn.Linear(32, 48, bias=bias))
    ours = te.LayerNormLinear(32, 48, bias=bias, normalization=normalization)
    all_names = {"weight": "1.weight", "bias": "1.bias", "layer_norm_weight": "0.weight", "layer_norm_bias": "0.bias"}
    names = {n: all_names[n] for n, _ in ours.named_parameters()}
    assert len(names) == 4 - (not bias) - (normalization == "RMSNorm")
    assert_conforms(ours, reference, names, torch.randn(9, 3, 32), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
@pytest.mark.parametrize("bias", [True, False])
def test_layernorm_mlp(dtype, activation, bias):
    if dtype == torch.bfloat16 and activation in ("relu", "reglu"):
        pytest.skip("rounding moves inputs over the step in the gradient")
    ours = te.LayerNormMLP(32, 52, bias=bias, activation=activation)
    reference = Mlp(32, 52, bias=bias, activation=activation)
    assert_conforms(ours, reference, mlp_names(ours), torch.randn(9, 3, 32), dtype)


def test_the_two_gelus_are_the_two_functions():
    """The tolerances above are wider than the 4.7e-4 between them."""
    for activation in ("gelu", "gelu_erf"):
        ours = te.LayerNormMLP(16, 64, activation=activation, init_method=nn.init.normal_).double()
        reference = Mlp(16, 64, bias=True, activation=activation).double()
        share_parameters(ours, reference, mlp_names(ours))
        x = torch.randn(20, 16, dtype=torch.float64)
        torch.testing.assert_close(ours(x), reference(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("return_bias", [False, True])
@pytest.mark.parametrize("module", [te.LayerNormLinear, te.LayerNormMLP])
def test_the_norms_output_comes_last_and_takes_gradients(module, return_bias):
    ours = module(16, 16, return_layernorm_output=True, return_bias=return_bias).double()
    x = torch.randn(5, 2, 16, dtype=torch.float64, requires_grad=True)
    out, *rest = ours(x)
    assert len(rest) == 1 + return_bias
    torch.testing.assert_close(rest[-1], F.layer_norm(x, (16,)), atol=1e-9, rtol=1e-9)
    dout, dnormalized = torch.randn_like(out), torch.randn_like(x)
    grads = torch.autograd.grad((out, rest[-1]), x, (dout, dnormalized))[0]
    alone = F.layer_norm(x, (16,), ours.layer_norm_weight, ours.layer_norm_bias)
    out, *_ = ours(x)
    expected = torch.autograd.grad((out, alone), x, (dout, dnormalized))[0]
    torch.testing.assert_close(grads, expected)


def test_start_values_and_parameter_dtype():
    torch.manual_seed(0)
    mlp = te.LayerNormMLP(200, 300, output_layer_init_method=nn.init.ones_, params_dtype=torch.bfloat16)
    assert {p.dtype for p in mlp.parameters()} == {torch.bfloat16}
    # 60000 draws: the standard deviation is known to 0.3 %
    assert mlp.fc1_weight.float().std().item() == pytest.approx(0.023, rel=0.02)
    assert abs(mlp.fc1_weight.float().mean().item()) < 5e-4
    assert (mlp.fc2_weight == 1).all()
    assert not mlp.fc1_bias.any()
    assert not mlp.fc2_bias.any()
    assert (mlp.layer_norm_weight == 1).all()


def test_a_module_on_meta_gets_its_values_from_reset_parameters():
    for module in (
        te.Linear(3, 5, device="meta"),
        te.LayerNormMLP(4, 6, device="meta"),
        te.LayerNorm(4, device="meta"),
    ):
        assert all(p.is_meta for p in module.parameters())
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            nn.init.constant_(parameter, torch.nan)
        module.reset_parameters()
        assert all(p.isfinite().all() for p in module.parameters())


def test_a_group_may_be_given_again():
    """As Megatron's models do after they built their layers with it."""

    class TwoRanks:
        def size(self):
            return 2

    group = TwoRanks()
    module = te.LayerNormMLP(8, 16, set_parallel_mode=True, tp_group=group, device="meta")
    module.set_tensor_parallel_group(group)
    assert module.options.tp_group is group


def test_weights_from_outside_take_the_gradients():
    ours, reference = te.Linear(6, 4, skip_weight_param_allocation=True), nn.Linear(6, 4)
    assert not list(ours.parameters())
    x = torch.randn(3, 6)
    weight, bias = (p.detach().clone().requires_grad_() for p in (reference.weight, reference.bias))
    ours(x, weight=weight, bias=bias).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(weight.grad, reference.weight.grad)
    torch.testing.assert_close(bias.grad, reference.bias.grad)


MODULES = {
    "Linear": lambda **o: te.Linear(16, 16, **o),
    "LayerNorm": lambda **o: te.LayerNorm(16, **o),
    "RMSNorm": lambda **o: te.RMSNorm(16, **o),
    "LayerNormLinear": lambda **o: te.LayerNormLinear(16, 16, **o),
    "LayerNormMLP": lambda **o: te.LayerNormMLP(16, 32, **o),
    "gated": lambda **o: te.LayerNormMLP(16, 32, activation="swiglu", normalization="RMSNorm", bias=False, **o),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_without_a_graph_break(name):
    torch.compiler.reset()  # its limit of recompilations counts those of other tests
    module = MODULES[name]()
    x = torch.randn(6, 2, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    names = {n: n for n, _ in module.named_parameters()}
    eager = step(module, x)
    out, grads = step(compiled, x)
    grads = {n.removeprefix("_orig_mod."): g for n, g in grads.items()}
    assert_same_step((out, grads), eager, names, out=(1e-6, 1e-6), grads=(1e-6, 1e-6))


@pytest.mark.parametrize("name", MODULES)
def test_input_and_gradient_of_any_stride(name):
    module = MODULES[name]().double()
    x = torch.randn(2, 6, 16, dtype=torch.float64).transpose(0, 1).requires_grad_()
    dy = torch.randn(16, 2, 6, dtype=torch.float64).permute(2, 1, 0)
    (got,) = torch.autograd.grad(module(x), x, dy)
    straight = x.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(module(straight), straight, dy.contiguous())
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", MODULES)
def test_autocast_computes_in_its_dtype_and_keeps_the_parameters(name):
    module = MODULES[name]()
    x = torch.randn(6, 2, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
    torch.testing.assert_close(out.float(), module(x), atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("name", MODULES)
def test_no_tokens_frozen_weights_and_input_without_gradient(name):
    module = MODULES[name]()
    empty = torch.randn(0, 2, 16, requires_grad=True)
    out = module(empty)
    assert out.shape == empty.shape
    out.sum().backward()
    assert all(not p.grad.any() for p in module.parameters())
    module.zero_grad()
    module(torch.randn(3, 2, 16)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    frozen = copy.deepcopy(module).requires_grad_(False)
    x = torch.randn(3, 2, 16, requires_grad=True)
    frozen(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("activation", "wide"), [("swiglu", 3), ("geglu", 3), ("sreglu", 3), ("silu", 2), ("reglu", 4)]
)
def test_gates_keep_what_they_read_and_give(activation, wide):
    """Tensors of (T, F) that forward keeps: those of kernels/ops/mlp keep both halves and their product."""
    T, H, width = 20, 16, 64
    module = te.LayerNormMLP(H, width, activation=activation, normalization="RMSNorm", bias=False)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(T, H, requires_grad=True))
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes = [size for place, size in kept.items() if place not in storages and size > T * H * 4]
    assert sum(sizes) == wide * T * width * 4


@pytest.mark.parametrize("build_module", [te.LayerNorm, te.RMSNorm, lambda size: te.Linear(size, size)])
def test_the_pickled_fp8_state_of_a_module_is_skipped(build_module):
    """Transformer Engine 2 gives its norms one too."""
    module = build_module(8)
    module.load_state_dict(module.state_dict() | {"_extra_state": torch.zeros(3, dtype=torch.uint8)})


def test_old_names_of_the_norms_parameters_are_loaded():
    values = {"layer_norm_weight": torch.randn(8), "layer_norm_bias": torch.randn(8)}
    ours = te.LayerNorm(8)
    ours.load_state_dict(values)
    assert torch.equal(ours.weight, values["layer_norm_weight"])
    assert set(ours.state_dict()) == {"weight", "bias"}
    nested = nn.Sequential(te.RMSNorm(8), te.Linear(8, 8))
    state = nested.state_dict() | {"1._extra_state": torch.zeros(3, dtype=torch.uint8)}
    state["0.layer_norm_weight"] = state.pop("0.weight")
    nested.load_state_dict(state)


def with_main_grad(main_grad, *, hooked=False):
    module = te.Linear(8, 8, fuse_wgrad_accumulation=True)
    module.weight.main_grad = main_grad
    if hooked:
        module.weight.register_post_accumulate_grad_hook(lambda _: None)
    return module(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: te.Linear(8, 8, parallel_mode="columns"), "parallel_mode='columns'"),
        (lambda: te.Linear(0, 8), "in_features=0"),
        (lambda: te.Linear(8, 8, sequence_parallel=True), "sequence_parallel=True"),
        (lambda: te.Linear(8, 8, tp_size=2), "parallel_mode='column'"),
        (lambda: te.LayerNormMLP(8, 8, tp_size=2), "set_parallel_mode=True"),
        (lambda: te.Linear(8, 9, tp_size=2, parallel_mode="Column"), "out_features=9 is not divisible by tp_size=2"),
        (lambda: te.Linear(9, 8, tp_size=2, parallel_mode="Row"), "legal sizes: 1, 3, 9"),
        (lambda: te.Linear(8, 8, tp_size=2, parallel_mode="row")(torch.randn(2, 4)), "set_tensor_parallel_group"),
        (lambda: te.LayerNormMLP(8, 8, activation="tanh"), "activation='tanh'"),
        (lambda: te.LayerNormLinear(8, 8, normalization="rms"), "normalization='rms'"),
        (lambda: te.Linear(8, 8)(torch.randn(2, 7)), "in_features=8"),
        (lambda: te.LayerNorm(8)(torch.randn(2, 7)), "hidden_size=8"),
        (
            lambda: te.LayerNormMLP(8, 8)(torch.randn(2, 8).bfloat16()),
            "torch.bfloat16, the parameters are torch.float32",
        ),
        (lambda: te.Linear(8, 8)(torch.randn(2, 8), weight=torch.randn(8, 8)), "skip_weight_param_allocation=True"),
        (lambda: te.Linear(8, 8, skip_weight_param_allocation=True)(torch.randn(2, 8)), "weight is none"),
        (
            lambda: te.Linear(8, 8, skip_weight_param_allocation=True)(torch.randn(2, 8), weight=torch.randn(8, 8)),
            "bias is missing",
        ),
        (lambda: with_main_grad(torch.zeros(8, 4)), r"main_grad of a weight of shape \(8, 8\) is \(8, 4\)"),
        (lambda: with_main_grad(torch.zeros(8, 8), hooked=True), "a hook that waits for it in .grad"),
    ],
)
def test_wrong_use_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_both_spellings_of_a_parallel_mode():
    for spelling in ("Column", "column"):
        module = te.Linear(8, 12, tp_size=2, parallel_mode=spelling)
        assert module.weight.shape == (6, 8)
        assert module.bias.shape == (6,)
    for spelling in ("Row", "row"):
        module = te.Linear(8, 12, tp_size=2, parallel_mode=spelling)
        assert module.weight.shape == (12, 4)
        assert module.bias.shape == (12,)
