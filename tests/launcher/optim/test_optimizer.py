import copy

import pytest
import torch

from xformer_train.kernels.layers.projection import Projection
from xformer_train.launcher.config.optimizers import OPTIMIZER_TERMS, OptimizerConfig
from xformer_train.launcher.optim.kind import parameter_groups
from xformer_train.launcher.optim.lamb import Lamb
from xformer_train.launcher.optim.optimizer import OPTIMIZERS, build_optimizer


class TiedModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.linear = Projection(6, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.linear(self.embedding(tokens))))


def train_step(model, optimizer, seed):
    tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = TiedModel()
    decayed, undecayed = parameter_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(model.embedding.weight), id(model.linear.weight)}
    vectors = [model.linear.bias, model.norm.weight, model.norm.bias, model.head.bias]
    assert {id(p) for p in undecayed["params"]} == {id(p) for p in vectors}
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)


def test_a_tied_weight_is_in_one_group_once():
    groups = parameter_groups(TiedModel(), 0.1)
    assert sum(len(group["params"]) for group in groups) == 6


def test_frozen_parameters_are_left_out_and_an_empty_group_is_dropped():
    model = TiedModel()
    for param in model.parameters():
        param.requires_grad = param.ndim < 2
    groups = parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [4]
    assert groups[0]["weight_decay"] == 0.0


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(torch.nn.Linear(2, 2).requires_grad_(False), 0.1)


def test_lamb_gets_every_option_of_the_config():
    config = OptimizerConfig(
        type="lamb",
        lr=0.011,
        betas=(0.8, 0.95),
        eps=1e-6,
        weight_decay=0.03,
        max_coeff=0.3,
        min_coeff=None,
        bias_correction=False,
        convention="nvidia",
    )
    optimizer = build_optimizer(TiedModel(), config)
    assert isinstance(optimizer, Lamb)
    for group, decay in zip(optimizer.param_groups, (0.03, 0.0), strict=True):
        options = config.model_dump(include={*OPTIMIZER_TERMS["lamb"].params, "convention"})
        expected = options | {"weight_decay": decay}
        assert {name: group[name] for name in expected} == expected


def test_adamw_gets_every_option_of_the_config():
    optimizer = build_optimizer(TiedModel(), OptimizerConfig(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.03))
    assert type(optimizer) is torch.optim.AdamW  # ZeRO accepts exactly this type
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.03, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 1e-6)


def test_adamw_without_bias_correction_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.bias_correction=false needs optimizer\.type=lamb"):
        build_optimizer(TiedModel(), OptimizerConfig(type="adamw", bias_correction=False))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_continues_bit_by_bit_from_saved_weights_and_state(kind):
    torch.manual_seed(0)
    config = OptimizerConfig(type=kind, lr=0.01)
    model = TiedModel()
    optimizer = build_optimizer(model, config)
    for seed in range(4):
        train_step(model, optimizer, seed)
    resumed_model = TiedModel()
    resumed_model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()})
    resumed = build_optimizer(resumed_model, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # a loaded state may share memory with the saved one
    straight = [train_step(model, optimizer, seed) for seed in range(4, 8)]
    assert straight == [train_step(resumed_model, resumed, seed) for seed in range(4, 8)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))
