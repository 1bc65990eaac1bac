"""Layers whose inner modules FSDP wraps one by one, and layers that two processes share with a hook inside."""

from typing import Any

import torch
import torch.distributed as dist
from helpers.lora import adapt
from helpers.spawn import PATIENCE_S
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack
from xformer_train.kernels.parallel.collectives import TensorParallel
from xformer_train.launcher.processes.topology import quiet, start_processes, stop_processes
from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig
from xformer_train.recipes.recipe import Runtime

CONFIG = LayerConfig(32, 4, 64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
INNER = ("qkv", "attention_output", "intermediate", "output", "attention_norm", "mlp_norm")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = LayerStack(CONFIG, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x, AttentionMask(causal=True))
        return y


def two_steps(model: nn.Module) -> list[float]:
    """Losses of three passes with steps between them, on the same batch in both processes."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    torch.manual_seed(1)
    x = torch.randn(2, 5, 32)
    for _ in range(3):
        loss = (model(x) - x.flip(2)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _by_fsdp1(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def by_fsdp() -> dict[str, list[float]]:
    """`two_steps` by how the layers are wrapped."""
    found = {"plain": two_steps(Model())}
    for name, places in (("layers", ()), ("modules inside", INNER)):
        ours, theirs = Model(), Model()
        for number, (one, other) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
            for place in places:
                fully_shard(one.get_submodule(place))
                setattr(other, place, _by_fsdp1(other.get_submodule(place)))
            fully_shard(one)
            theirs.layers[number] = _by_fsdp1(other)
        fully_shard(ours)
        found[f"fully_shard of {name}"] = two_steps(ours)
        found[f"FullyShardedDataParallel of {name}"] = two_steps(_by_fsdp1(theirs))
    return found


def refusals() -> dict[str, str]:
    """What is said of a hook, or an adapter, inside of what two processes share."""
    group, said = dist.group.WORLD, {}
    for name in INNER:
        layers = LayerStack(CONFIG, 1, parallel=TensorParallel(group))
        layers[0].get_submodule(name).register_forward_hook(lambda *_: None)
        said[name] = _said(lambda layers=layers: layers(torch.randn(1, 2, 32), AttentionMask()))
    adapted = adapt(LayerStack(CONFIG, 1, parallel=TensorParallel(group, sequence=True)), ("output",))
    said["adapter"] = _said(lambda: adapted(torch.randn(1, 2, 32), AttentionMask()))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = RECIPES["gpt"].build_model(
        ModelConfig(type="gpt", **sizes), LayerFlags(), ObjectiveConfig(), 20, Runtime(parallel=TensorParallel(group))
    )
    model.word_embeddings.register_forward_hook(lambda *_: None)
    ids = torch.zeros(1, 4, dtype=torch.long)
    return said | {"word_embeddings": _said(lambda: model(ids, ids))}


def _said(run: Any) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def worker() -> dict[str, Any]:
    """`by_fsdp` and `refusals`."""
    torch.set_num_threads(1)
    quiet(debug=False)
    start_processes(PATIENCE_S)
    results = {"losses": by_fsdp(), "said": refusals()}
    stop_processes()
    return results
