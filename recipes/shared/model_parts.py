"""What both models share: the stack of layers, the vocabulary's embedding and head, how weights outside the layers start."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from ...kernels import LayerConfig, LayerStack
from ...kernels.errors import UserError
from ...kernels.layers.inner_modules import must_be_called
from ...kernels.layers.norms import make_norm
from ...kernels.ops.choices import Kernels, Norm
from ...kernels.ops.linear import linear
from ...kernels.ops.loss.cross_entropy import linear_cross_entropy
from ...kernels.ops.loss.vocab_parallel import vocab_parallel_embedding, vocab_parallel_linear_cross_entropy
from ...kernels.ops.norm.residual_norm import norm
from ...kernels.ops.parallel_linear import column_parallel_linear
from ...kernels.parallel.collectives import Group, gather_from_group, group_size
from ...kernels.parallel.sharding import Partition, shard_parameters
from ..config import LayerFlags, ModelConfig
from ..recipe import Runtime

_OF_LAYERS = LayerConfig.__dataclass_fields__.keys() & ModelConfig.model_fields.keys() - {"rope_theta"}


def build_layers(
    model: ModelConfig,
    flags: LayerFlags,
    runtime: Runtime,
    *,
    window: int | None,
    norm_before_first: bool = True,
) -> LayerStack:
    """num_hidden_layers fresh layers with the model's geometry and the run's flags.

    window: how far a token sees in local layers, in tokens to a side. norm_before_first: False where the norm of the embedding
    is the first layer's too.
    """
    config = LayerConfig(
        **model.model_dump(include=_OF_LAYERS),
        **flags.model_dump(exclude={"unpad", "cuda_graph"}),
        # The original BERT is post-LN, whose LayerNorms rescale the residual stream themselves.
        adjust_init_range=model.pre_layer_norm,
    )
    rotary = model.position_embedding == "rope"
    layers = []
    for number in range(model.num_hidden_layers):
        local = model.is_local(number)
        theta = model.local_rope_theta if local and model.local_rope_theta is not None else model.rope_theta
        layers.append(
            replace(
                config,
                attention_window=window if local else None,
                rope_theta=theta if rotary else None,
                norm_before_attention=norm_before_first or number > 0,
            )
        )
    return LayerStack(
        layers,
        cuda_graph=flags.cuda_graph,
        fp8=runtime.fp8,
        activation_checkpointing=runtime.activation_checkpointing,
        parallel=runtime.parallel,
    )


def model_norm(model: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    """A fresh norm outside the layers, of the kind that they have."""
    return make_norm(model.hidden_size, model.layer_norm_eps, model.norm, model.norm_bias)


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
    refuse_to_share("word_embeddings", table, group)
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


def refuse_to_share(name: str, module: nn.Module, group: Group) -> None:
    """Raises ValueError if processes share the rows of a module that must be called."""
    if group_size(group) > 1:
        raise UserError(
            f"{name}, a {type(module).__name__}, has hooks or a forward of its own, which know nothing of the "
            f"{group_size(group)} processes that share its rows; remove them, or use one process"
        )


def initialize(modules: list[nn.Module], std: float) -> None:
    """Weights of the given Linear and Embedding modules from N(0, std), biases 0."""
    for module in modules:
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise TypeError(f"no rule to initialize a {type(module).__name__}")
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def normalized(hidden: Tensor, by: nn.LayerNorm | nn.RMSNorm, kernels: Kernels) -> Tensor:
    """LayerNorm or RMSNorm of hidden (..., H) by a module, as the layers' own norms where its parameters say all."""
    plain = nn.RMSNorm if isinstance(by, nn.RMSNorm) else nn.LayerNorm
    if must_be_called(by, plain):
        return by(hidden)  # type: ignore[no-any-return]
    assert by.eps is not None, "make_norm gives each norm one"
    kind: Norm = "rms_norm" if plain is nn.RMSNorm else "layer_norm"
    return norm(hidden, by.weight, getattr(by, "bias", None), eps=by.eps, kernels=kernels, kind=kind)


def projected(hidden: Tensor, by: nn.Linear) -> Tensor:
    """hidden (..., K) through a linear module, (..., N), on the path of the layers' own where its parameters say all."""
    return by(hidden) if must_be_called(by, nn.Linear) else linear(hidden, by.weight, by.bias)  # type: ignore[no-any-return]


def check_positions(input_ids: Tensor, limit: int, start: int = 0) -> None:
    """Raises ValueError when a sequence is longer than the model can take; start: its tokens in a cache."""
    if start + input_ids.shape[1] > limit:
        behind = f" behind {start} in the cache" if start else ""
        raise UserError(
            f"input_ids has {input_ids.shape[1]} positions{behind}, max_position_embeddings={limit}; shorten the sequences or "
            f"build the model with more positions"
        )
