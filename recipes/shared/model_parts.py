"""What both models share: the stack of layers, the vocabulary's embedding and head, how weights outside the layers start."""

from collections.abc import Sequence

from torch import Tensor, nn

from ...kernels import LayerConfig, LayerStack
from ...kernels.errors import UserError
from ...kernels.layers.inner_modules import must_be_called
from ...kernels.ops.choices import Kernels
from ...kernels.ops.linear import linear
from ...kernels.ops.loss.cross_entropy import linear_cross_entropy
from ...kernels.ops.loss.vocab_parallel import vocab_parallel_embedding, vocab_parallel_linear_cross_entropy
from ...kernels.ops.norm.residual_norm import norm
from ...kernels.ops.parallel_linear import column_parallel_linear
from ...kernels.parallel.collectives import Group, gather_from_group, group_size
from ...kernels.parallel.sharding import Partition, shard_parameters
from ..config import LayerFlags, ModelConfig
from ..recipe import Runtime

# Keys of the model that say nothing of a layer, or that each layer has its own of.
_NOT_A_LAYERS = {
    "type",
    "max_position_embeddings",
    "vocab_size",
    "init_from",
    "tie_word_embeddings",
    "position_embedding",
    "rope_theta",
    "local_rope_theta",
    "sliding_window",
    "global_attn_every_n_layers",
}


def build_layers(model: ModelConfig, flags: LayerFlags, runtime: Runtime) -> LayerStack:
    """num_hidden_layers fresh layers with the model's geometry and the run's flags."""
    config = LayerConfig(
        **model.model_dump(exclude=_NOT_A_LAYERS),
        **flags.model_dump(exclude={"unpad", "cuda_graph"}),
        # The original BERT is post-LN, whose LayerNorms rescale the residual stream themselves.
        adjust_init_range=model.pre_layer_norm,
    )
    return LayerStack(
        config,
        model.num_hidden_layers,
        cuda_graph=flags.cuda_graph,
        fp8=runtime.fp8,
        activation_checkpointing=runtime.activation_checkpointing,
        parallel=runtime.parallel,
    )


def shard_vocabulary(model: nn.Module, names: Sequence[str], vocab_size: int, group: Group) -> None:
    """Leaves each process of the group V/t rows of the model's parameters of these names, (V, ...).

    Raises ValueError if the processes cannot share vocab_size equally.
    """
    if vocab_size % group_size(group):
        raise UserError(
            f"vocab_size={vocab_size} is not divisible by the {group_size(group)} processes of tensor parallelism; pad the "
            f"vocabulary to a multiple of {group_size(group)}"
        )
    shard_parameters(model, dict.fromkeys(names, Partition(0)), group)


def embedded(input_ids: Tensor, table: nn.Embedding, group: Group) -> Tensor:
    """Rows of the vocabulary's embedding, (..., H), of ids (...), from this process's (V/t, H).

    Raises ValueError where processes share an embedding that must be called.
    """
    if not must_be_called(table, nn.Embedding):
        return vocab_parallel_embedding(input_ids, table.weight, group)
    if group_size(group) > 1:
        raise UserError(
            f"word_embeddings, a {type(table).__name__}, has hooks or a forward of its own, which know nothing of the "
            f"{group_size(group)} processes that share its rows; remove them, or use one process"
        )
    rows: Tensor = table(input_ids)
    return rows


def vocabulary_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """hidden @ weight.T + bias over the whole vocabulary, (..., V), replicated.

    hidden: (..., H), replicated; weight: (V/t, H) and bias: (V/t,) or None, this process's rows.
    """
    return gather_from_group(column_parallel_linear(hidden, weight, bias, group), group)


def vocabulary_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kernels: Kernels, group: Group
) -> Tensor:
    """As `linear_cross_entropy`, from this process's rows of weight (V/t, H) and bias (V/t,)."""
    if group_size(group) == 1:
        return linear_cross_entropy(hidden, weight, bias, labels, kernels=kernels)
    return vocab_parallel_linear_cross_entropy(hidden, weight, bias, labels, group)


def initialize(modules: list[nn.Module], std: float) -> None:
    """Weights of the given Linear and Embedding modules from N(0, std), biases 0."""
    for module in modules:
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise TypeError(f"no rule to initialize a {type(module).__name__}")
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def normalized(hidden: Tensor, by: nn.LayerNorm, kernels: Kernels) -> Tensor:
    """LayerNorm of hidden (..., H) by a module, on the same path as the layers' own norms where its parameters say all."""
    if must_be_called(by, nn.LayerNorm):
        return by(hidden)  # type: ignore[no-any-return]
    return norm(hidden, by.weight, by.bias, eps=by.eps, kernels=kernels)


def projected(hidden: Tensor, by: nn.Linear) -> Tensor:
    """hidden (..., K) through a linear module, (..., N), on the path of the layers' own where its parameters say all."""
    return by(hidden) if must_be_called(by, nn.Linear) else linear(hidden, by.weight, by.bias)  # type: ignore[no-any-return]


def check_positions(input_ids: Tensor, limit: int) -> None:
    """Raises ValueError when a sequence is longer than the position embedding."""
    if input_ids.shape[1] > limit:
        raise UserError(
            f"input_ids has {input_ids.shape[1]} positions, max_position_embeddings={limit}; shorten the sequences or "
            f"build the model with more positions"
        )
