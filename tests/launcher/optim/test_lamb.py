import copy
import io
import math

import pytest
import torch

from xformer_train.launcher.optim.lamb import Lamb, norms

SHAPES = [(7, 5), (1,), (3,), (63, 2), (2, 3, 4), ()]


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def set_grads(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
        param.grad = grad.to(param.dtype)


def reference_step(w, g, state, options):
    """LAMB of one tensor, in the order of arXiv 1904.00962 algorithm 2; state is (m, v, t)."""
    (beta1, beta2), eps, decay, lr = options["betas"], options["eps"], options["weight_decay"], options["lr"]
    convention, corrected = options["convention"], options["bias_correction"]
    m, v, t = state
    t = t + 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
    if convention == "deepspeed":
        u, lr = m / (v.sqrt() + eps) + decay * w, lr * math.sqrt(c2) / c1
    else:
        u = (m / c1) / ((v / c2).sqrt() + eps) + decay * w
    ratio = 1.0
    w_norm, u_norm = float((w**2).sum().sqrt()), float((u**2).sum().sqrt())
    if w_norm > 0 and u_norm > 0 and not (convention == "nvidia" and decay == 0):
        ratio = w_norm / u_norm
        ratio = ratio if options["min_coeff"] is None else max(ratio, options["min_coeff"])
        ratio = ratio if options["max_coeff"] is None else min(ratio, options["max_coeff"])
    return w - lr * ratio * u, (m, v, t), ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamps", [(None, None), (0.5, 0.9), (None, 0.3), (2.0, None)])
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("convention", ["paper", "nvidia", "deepspeed"])
def test_fifty_steps_equal_the_reference(convention, bias_correction, clamps, dtype):
    shared = {
        "lr": 0.02,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "bias_correction": bias_correction,
        "convention": convention,
        "min_coeff": clamps[0],
        "max_coeff": clamps[1],
    }
    params = make_params(dtype)
    optimizer = Lamb(
        [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "weight_decay": 0.0}],
        **shared,
    )
    expected = [param.detach().double().clone() for param in params]
    states = [(torch.zeros_like(w), torch.zeros_like(w), 0) for w in expected]
    ratios = []
    for step in range(50):
        set_grads(params, step, scale=10.0 ** (step % 3 - 1))
        ratios = []
        for i, param in enumerate(params):
            options = {**shared, "weight_decay": 0.1 if i < 3 else 0.0}
            expected[i], states[i], ratio = reference_step(expected[i], param.grad.double(), states[i], options)
            ratios.append(ratio)
        optimizer.step()
    # About ten roundings per element and step, each of half an ulp of the weights at most, and random in sign: 50 steps
    # move a weight by less than 500 half ulps of the largest. The reference runs in fp64.
    bound = 250 * torch.finfo(dtype).eps
    for param, w in zip(params, expected, strict=True):
        assert (param.double() - w).abs().max() <= bound * max(1.0, float(w.abs().max()))
    got = optimizer.trust_ratios()
    assert sorted(got) == list(range(len(params)))
    assert [float(got[i]) for i in range(len(params))] == pytest.approx(ratios, rel=500 * torch.finfo(dtype).eps)


def test_conventions_differ_where_they_should():
    results = {}
    for convention in ("paper", "nvidia", "deepspeed"):
        params = make_params()
        groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[2:3], "weight_decay": 0.0}]
        optimizer = Lamb(groups, lr=0.1, convention=convention, max_coeff=None, min_coeff=None)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        results[convention] = (params[0].detach(), params[2].detach())
    assert torch.equal(results["paper"][0], results["nvidia"][0])
    assert not torch.equal(results["paper"][1], results["nvidia"][1])
    assert not torch.allclose(results["paper"][0], results["deepspeed"][0])


def test_paper_equals_deepspeed_without_bias_correction():
    results = []
    for convention in ("paper", "deepspeed"):
        params = make_params()
        optimizer = Lamb(params, convention=convention, bias_correction=False)
        for step in range(5):
            set_grads(params, step)
            optimizer.step()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_zero_weight_gets_ratio_one_even_outside_the_clamps():
    zero, other = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.full((5,), 100.0))
    optimizer = Lamb([zero, other], lr=0.1, weight_decay=0.0, max_coeff=0.3, min_coeff=0.2)
    zero.grad, other.grad = torch.ones(5), torch.ones(5)
    optimizer.step()
    ratios = optimizer.trust_ratios()
    assert float(ratios[0]) == 1.0
    assert float(ratios[1]) == pytest.approx(0.3)
    torch.testing.assert_close(zero.detach(), torch.full((5,), -0.1))


def test_a_zero_update_gets_ratio_one_and_changes_nothing():
    param = torch.nn.Parameter(torch.randn(5))
    before = param.detach().clone()
    optimizer = Lamb([param], lr=0.1, weight_decay=0.0, min_coeff=2.0)
    param.grad = torch.zeros(5)
    optimizer.step()
    assert float(optimizer.trust_ratios()[0]) == 1.0
    assert torch.equal(param.detach(), before)


def test_the_first_corrected_step_has_the_length_lr_times_the_weight_norm():
    param = torch.nn.Parameter(torch.randn(9, 4))
    before = param.detach().clone()
    param.grad = torch.randn(9, 4)
    Lamb([param], lr=0.25, max_coeff=None, min_coeff=None).step()
    assert float((param.detach() - before).norm()) == pytest.approx(0.25 * float(before.norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_file", [True, False])
def test_a_saved_state_continues_bit_by_bit(dtype, by_file):
    def run(optimizer, params, steps):
        for step in steps:
            set_grads(params, step)
            optimizer.step()

    params = make_params(dtype)
    optimizer = Lamb(params, lr=0.05)
    run(optimizer, params, range(5))
    saved = {"weights": [param.detach().clone() for param in params], "optimizer": optimizer.state_dict()}
    if by_file:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    else:
        saved = copy.deepcopy(saved)
    run(optimizer, params, range(5, 9))

    resumed_params = [torch.nn.Parameter(weight) for weight in saved["weights"]]
    resumed = Lamb(resumed_params, lr=0.3)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.trust_ratios() == {}
    run(resumed, resumed_params, range(5, 9))
    for param, other in zip(params, resumed_params, strict=True):
        assert torch.equal(param, other)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert optimizer.state[param][name].dtype == resumed.state[other][name].dtype
            assert torch.equal(optimizer.state[param][name], resumed.state[other][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_updated_from_fp32_moments(dtype):
    half = make_params(dtype)
    exact = [torch.nn.Parameter(param.detach().float()) for param in half]
    of_half, of_exact = Lamb(half, lr=0.1), Lamb(exact, lr=0.1)
    set_grads(half, 0)
    for param, twin in zip(half, exact, strict=True):
        twin.grad = param.grad.float()
    of_half.step()
    of_exact.step()
    for param, twin in zip(half, exact, strict=True):
        assert param.dtype == dtype and of_half.state[param]["exp_avg"].dtype == torch.float32
        assert torch.equal(of_half.state[param]["exp_avg_sq"], of_exact.state[twin]["exp_avg_sq"])
        assert torch.equal(param.detach(), twin.detach().to(dtype))


def test_parameters_without_gradient_keep_weight_state_and_step_count():
    params = make_params()
    optimizer = Lamb([{"params": params[:2]}, {"params": params[2:]}])
    set_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert params[1] not in optimizer.state
    assert sorted(optimizer.trust_ratios()) == [0, 2, 3, 4, 5]
    set_grads(params, 1)
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params[:3]] == [2, 1, 2]


def test_a_parameter_that_joins_late_is_corrected_by_its_own_step_count():
    late, alone = make_params(shapes=[(4, 4)]), make_params(shapes=[(4, 4)])
    early = make_params(shapes=[(3,)], seed=5)
    together, single = Lamb([*early, *late]), Lamb(alone)
    for step in range(3):
        set_grads(early, step)
        together.step()
    set_grads(late, 7)
    set_grads(alone, 7)
    together.step()
    single.step()
    assert torch.equal(late[0], alone[0])


def test_parameters_of_a_non_contiguous_layout_are_updated_like_contiguous_ones():
    weight = torch.randn(6, 4)
    plain, transposed = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.t().contiguous().t())
    grad = torch.randn(6, 4)
    for param in (plain, transposed):
        param.grad = grad.clone()
        Lamb([param], lr=0.1).step()
    assert not transposed.is_contiguous()
    torch.testing.assert_close(plain.detach(), transposed.detach(), rtol=1e-6, atol=0)


def test_norms_of_tensors_larger_than_a_piece_are_exact_to_fp32():
    torch.manual_seed(0)
    tensors = [torch.randn(3 * 2**20 + 17), torch.randn(3), torch.zeros(0), torch.randn(2**18)]
    expected = torch.stack([tensor.double().pow(2).sum().sqrt() for tensor in tensors])
    # Within a piece of 2**18 elements the fp32 sum is good to a few 1e-6; a single sum over 2**21 is not.
    torch.testing.assert_close(norms(tensors).double(), expected, rtol=5e-6, atol=0)


def test_zero_learning_rate_changes_no_weight():
    params = make_params()
    before = [param.detach().clone() for param in params]
    set_grads(params, 0)
    Lamb(params, lr=0.0, weight_decay=0.1, max_coeff=None).step()
    assert all(torch.equal(param, weight) for param, weight in zip(params, before, strict=True))


def test_a_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradient"):
        Lamb(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"convention": "apex"}, "convention='apex' must be paper, nvidia or deepspeed"),
        ({"min_coeff": -1.0}, "min_coeff=-1.0"),
        ({"min_coeff": 0.5, "max_coeff": 0.3}, "max_coeff=0.3 must be positive and at least min_coeff=0.5"),
        ({"max_coeff": 0.0, "min_coeff": None}, "max_coeff=0.0"),
    ],
)
def test_an_option_out_of_range_is_refused_in_the_constructor_and_in_a_group(options, message):
    params = make_params()
    with pytest.raises(ValueError, match=message):
        Lamb(params, **options)
    with pytest.raises(ValueError, match=message):
        Lamb([{"params": params, **options}])


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_an_option_that_is_a_tensor_is_refused_in_the_constructor_and_at_loading(name):
    with pytest.raises(ValueError, match=f"Lamb option {name} is a Tensor, must be a number"):
        Lamb(make_params(), **{name: torch.tensor(0.1)})
    optimizer = Lamb(make_params())
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = torch.tensor(0.1)
    with pytest.raises(ValueError, match=f"Lamb option {name} is a Tensor, must be a number"):
        optimizer.load_state_dict(saved)


def foreign_states():
    """State dicts that no Lamb of one parameter (7, 5) can step with, by what is wrong."""
    param = torch.nn.Parameter(torch.randn(7, 5))
    param.grad = torch.randn(7, 5)
    ours, sgd = Lamb([param]), torch.optim.SGD([param], momentum=0.9)
    ours.step()
    sgd.step()
    saved, state = ours.state_dict(), ours.state_dict()["state"][0]
    yield "SGD's", sgd.state_dict()
    yield "SGD's moments", saved | {"state": sgd.state_dict()["state"]}
    yield "another shape", saved | {"state": {0: state | {"exp_avg": torch.zeros(5, 7)}}}
    yield "no step", saved | {"state": {0: {name: state[name] for name in ("exp_avg", "exp_avg_sq")}}}
    yield "a step that is no tensor", saved | {"state": {0: state | {"step": 3}}}


@pytest.mark.parametrize("saved", [pytest.param(saved, id=what) for what, saved in foreign_states()])
def test_a_state_that_it_cannot_step_with_is_refused_at_loading_and_changes_nothing(saved):
    (param,) = make_params(shapes=[(7, 5)])
    optimizer = Lamb([param], lr=0.5)
    with pytest.raises(ValueError, match=r"the state to load holds the tensors .*; load the state of a Lamb"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.state


def test_it_goes_on_from_the_moments_of_adam_with_its_own_other_options():
    params = make_params()
    adam = torch.optim.AdamW(params, lr=0.25)
    set_grads(params, 0)
    adam.step()
    lamb = Lamb(params, convention="nvidia", max_coeff=None)
    lamb.load_state_dict(adam.state_dict())
    (group,) = lamb.param_groups
    assert (group["lr"], group["convention"], group["max_coeff"]) == (0.25, "nvidia", None)
    assert all(torch.equal(lamb.state[param]["exp_avg"], adam.state[param]["exp_avg"]) for param in params)
    lamb.step()
    assert all(lamb.state[param]["step"] == 2 for param in params)


def test_step_returns_what_the_closure_returns():
    param = torch.nn.Parameter(torch.ones(3))

    def closure():
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert Lamb([param]).step(closure).item() == 3.0
    assert not torch.equal(param.detach(), torch.ones(3))


def test_a_copied_optimizer_steps():
    optimizer = copy.deepcopy(Lamb(make_params()))
    set_grads(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert len(optimizer.trust_ratios()) == len(SHAPES)
