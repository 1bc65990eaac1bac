"""What a layer keeps for backward: the bytes by formula, and a count of what a forward pass really keeps.

docs/memory.md has the formula as a table.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from xformer_train.kernels.layers.config import LayerConfig
from xformer_train.kernels.ops.choices import ActivationCheckpointing

_SEED_BYTES = 8


def saved_activations(
    config: LayerConfig,
    batch: int,
    length: int,
    dtype: torch.dtype,
    *,
    triton_attention: bool,
    training: bool = True,
    tokens: int | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> dict[str, int]:
    """Return the bytes of each tensor that one layer keeps from forward to backward, by name; their sum is all it keeps.

    batch, length: B and S. tokens: rows of a packed batch, None for a padded one. dtype: of hidden states and parameters.
    triton_attention: whether attention runs in the Triton kernels, by the rule in `kernels.attention`; all else is kept
    alike on every path. training: False switches dropout off, as `module.eval()` does. activation_checkpointing: of a
    `LayerStack`.

    The input is counted and the output is not, since it is the next layer's input. Parameters are not counted, nor masks,
    which all layers share. normalize_invertible is taken to act: a LayerNorm with too small weights keeps its input all the
    same. Without dropout and without Triton the log-sum-exp is that of torch's attention on a CPU; its CUDA kernels may pad
    theirs.
    """
    H, N, F, size = config.hidden_size, config.num_attention_heads, config.intermediate_size, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize  # of statistics
    padded_rows = batch * length
    rows = padded_rows if tokens is None else tokens
    drops_probabilities = training and config.attention_probs_dropout_prob > 0
    drops = drops_probabilities or (training and config.hidden_dropout_prob > 0)
    seed = {"dropout_seed": _SEED_BYTES} if drops else {}
    if activation_checkpointing == "full":
        return {"input": rows * H * size} | seed
    kept = {"input": rows * H * size, "qkv": 3 * rows * H * size, "context": rows * H * size}
    if triton_attention:
        kept["log_sum_exp"] = N * ((rows + 15) // 16 * 16) * wide
    elif drops_probabilities:
        kept["probabilities"] = 0 if activation_checkpointing == "selective" else batch * N * length**2 * size
        kept["dropped_probabilities"] = 0 if config.attn_dropout_checkpoint else kept["probabilities"]
    else:
        kept["log_sum_exp"] = N * padded_rows * wide
        if tokens is not None:  # torch's attention works on padded copies
            kept |= {"padded_qkv": 3 * padded_rows * H * size, "padded_context": padded_rows * H * size}
    kept |= dict.fromkeys(("attention_residual", "mlp_input"), rows * H * size)
    kept |= {"gelu_input": rows * F * size, "gelu_output": 0 if config.gelu_checkpoint else rows * F * size}
    # In post-LN the QKV projection reads the layer's input itself.
    kept["qkv_input" if config.pre_layer_norm else "mlp_residual"] = rows * H * size
    kept |= dict.fromkeys(("norm_mean", "norm_rstd"), 2 * rows * wide)
    if config.normalize_invertible:
        second_norm_input = "input" if config.pre_layer_norm else "mlp_residual"
        kept |= dict.fromkeys((second_norm_input, "attention_residual", "norm_mean"), 0)
    return {name: count for name, count in kept.items() if count > 0} | seed


def count_saved_bytes(forward: Callable[[], Tensor], apart_from: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward of one call of `forward`.

    Each distinct storage counts once and whole, except those of `apart_from` (parameters, masks) and of the output, which
    counts as the input of what takes it. What an autograd function hides from autograd by its own attributes is not seen.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    for tensor in (output, *apart_from):
        saved.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values())
