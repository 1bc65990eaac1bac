"""What a layer keeps for backward: the bytes by formula, and a count of what a forward pass really keeps.

docs/memory.md has the formula as a table.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from xformer_train.kernels.layers.config import LayerConfig
from xformer_train.kernels.ops.attention.attention import products_are_faster
from xformer_train.kernels.ops.attention.blocks import window_blocks
from xformer_train.kernels.ops.choices import ActivationCheckpointing

_SEED_BYTES = 8


def saved_activations(  # noqa: PLR0913 - what decides on what is kept
    config: LayerConfig,
    batch: int,
    length: int,
    dtype: torch.dtype,
    *,
    triton_attention: bool,
    training: bool = True,
    tokens: int | None = None,
    causal: bool = False,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> dict[str, int]:
    """Return the bytes of each tensor that one layer keeps from forward to backward, by name; their sum is all it keeps.

    batch, length: B and S. tokens: rows of a packed batch, None for a padded one. causal: of the mask, which matters where
    there is a window. dtype: of hidden states and parameters.
    triton_attention: whether attention runs in the Triton kernels, by the rule in `kernels.attention`; all else is kept
    alike on every path. training: False switches dropout off, as `module.eval()` does. activation_checkpointing: of a
    `LayerStack`.

    The input is counted and the output is not, since it is the next layer's input. Parameters are not counted, nor what all
    layers share: masks and tables of angles. normalize_invertible is taken to act: a norm with too small weights keeps its
    input all the same. Without dropout and without Triton the log-sum-exp is that of torch's attention on a CPU; its CUDA
    kernels may pad theirs.
    """
    H, N, F, size = config.hidden_size, config.num_attention_heads, config.intermediate_size, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize  # of statistics
    rows = batch * length if tokens is None else tokens
    drops_probabilities = training and config.attention_probs_dropout_prob > 0
    drops = drops_probabilities or (training and config.hidden_dropout_prob > 0)
    seed = {"dropout_seed": _SEED_BYTES} if drops else {}
    if activation_checkpointing == "full":
        return {"input": rows * H * size} | seed
    kept = {"input": rows * H * size, "qkv": sum(config.qkv_parts) * rows * size}
    kept["context"] = N * config.head_size * rows * size
    if config.qk_norm:
        kept |= {"head_norm_input": kept["qkv"], "head_norm_rstd": (N + config.key_heads) * rows * wide}
    if triton_attention:
        kept["log_sum_exp"] = N * ((rows + 15) // 16 * 16) * wide
    elif drops_probabilities:
        scores = _scores(length, config.attention_window, causal)
        kept["probabilities"] = 0 if activation_checkpointing == "selective" else batch * N * scores * size
        kept["dropped_probabilities"] = 0 if config.attn_dropout_checkpoint else kept["probabilities"]
    elif not _narrows(config.attention_window, length) and not products_are_faster(dtype, batch, length, N):
        kept |= _kept_by_torchs_attention(config, batch * length, tokens, size, wide)
    kept |= dict.fromkeys(("attention_residual", "mlp_input"), rows * H * size)
    kept |= {"gelu_input": (2 if config.gated_mlp else 1) * rows * F * size}
    kept |= {"gelu_output": 0 if config.gelu_checkpoint else rows * F * size}
    norms = 2 if config.norm_before_attention else 1
    if not config.pre_layer_norm:
        kept["mlp_residual"] = rows * H * size
    elif config.norm_before_attention:  # else the QKV projection reads the layer's input itself, as in post-LN
        kept["qkv_input"] = rows * H * size
    kept |= {"norm_mean": 0 if config.norm == "rms_norm" else norms * rows * wide, "norm_rstd": norms * rows * wide}
    if config.normalize_invertible:
        other = (
            "mlp_residual" if not config.pre_layer_norm else "input" if config.norm_before_attention else "norm_mean"
        )
        kept |= dict.fromkeys((other, "attention_residual", "norm_mean"), 0)
    return {name: count for name, count in kept.items() if count > 0} | seed


def _kept_by_torchs_attention(
    config: LayerConfig, padded_rows: int, tokens: int | None, size: int, wide: int
) -> dict[str, int]:
    """Return the bytes that torch's attention keeps besides qkv and context, of one row per place of the padded batch."""
    kept = {"log_sum_exp": config.num_attention_heads * padded_rows * wide}
    if tokens is not None:
        queries, *_ = config.qkv_parts
        kept |= {
            "padded_qkv": sum(config.qkv_parts) * padded_rows * size,
            "padded_context": queries * padded_rows * size,
        }
    return kept


def _narrows(window: int | None, length: int) -> bool:
    """Return whether a window hides any key."""
    return window is not None and window < length - 1


def _scores(length: int, window: int | None, causal: bool) -> int:
    """Return how many scores of one head there are: those of blocks of queries with the keys that a window lets them see."""
    if window is None or not _narrows(window, length):
        return length**2
    blocks = window_blocks(length, window, causal).slices()
    return sum((query.stop - query.start) * (key.stop - key.start) for query, key in blocks)


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
