"""`te.TransformerLayer`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..fp8.linear import Fp8State
from ..fp8.norm import norm_before
from ..layers.inner_modules import must_be_called
from ..ops.attention.attention import AttentionMask
from ..ops.norm.residual_norm import dropout, residual_add
from ..parallel.collectives import group_rank
from .attention import MultiheadAttention
from .core_attention import Dropping, MaskType, Visibility, check_mask_type, cross_visibility, visibility
from .inference import Cache
from .layer_options import LayerOptions
from .mlp import LayerNormMLP
from .module import ProjectionModule, cast_like
from .normalization import LayerNorm, RMSNorm, effective_weight, kind_of, normalize_before
from .rng_tracker import DropoutSeeds, draw_dropout_seeds

# The dropouts of a layer draw from one seed or two; the site keeps their masks apart.
_SELF_SITE, _SELF_OUTPUT_SITE, _CROSS_SITE, _CROSS_OUTPUT_SITE, _MLP_SITE, _SITES = 1, 2, 3, 4, 5, 8


@dataclass(frozen=True)
class _Pass:
    """What the halves of a layer need of one forward pass. seeds: None where nothing is dropped."""

    seeds: DropoutSeeds | None
    is_first_microbatch: bool | None
    recompute: bool
    cu_seqlens: Tensor | None


class TransformerLayer(ProjectionModule):
    """One layer of a GPT, a BERT or a T5: attention and feed-forward halves around a residual stream.

        a = x + drop(proj(attention(LN(x))));  y = a + drop(mlp(LN(a)))

    TransformerLayer(hidden_size, ffn_hidden_size, num_attention_heads, **options), with the options, defaults and errors of
    `LayerOptions`.

    State dict: self_attention.layernorm_qkv (with output_layernorm self_attention.qkv) and self_attention.proj; in a decoder
    inter_attention.layernorm_query, .key_value and .proj; layernorm_mlp; with output_layernorm layernorm. Without
    fuse_qkv_params query, key, value and query_bias, key_bias, value_bias are in the attention half itself.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int, **options: Any) -> None:
        config = LayerOptions(hidden_size, ffn_hidden_size, num_attention_heads, **options)
        super().__init__(config.shared)
        self._check_parallelism(config.set_parallel_mode, "set_parallel_mode=True")
        self.config = config
        self.self_attention = MultiheadAttention(config)
        self.inter_attention = MultiheadAttention(config, cross=True) if config.layer_type == "decoder" else None
        self.layernorm_mlp = LayerNormMLP(
            hidden_size,
            ffn_hidden_size,
            **config.norm,
            bias=config.bias,
            activation=config.activation,
            init_method=config.init_method,
            output_layer_init_method=config.output_layer_init_method,
            return_layernorm_output=config.apply_residual_connection_post_layernorm,
            return_bias=True,
            set_parallel_mode=config.set_parallel_mode,
            **vars(self.options),
        )
        if config.output_layernorm:
            module = LayerNorm if config.normalization == "LayerNorm" else RMSNorm
            self.layernorm = module(
                hidden_size,
                config.layernorm_epsilon,
                params_dtype=config.params_dtype,
                zero_centered_gamma=config.zero_centered_gamma,
                device=config.device,
            )

    def reset_parameters(self) -> None:
        """Draw the parameters of all modules inside again, in the order in which they were drawn first."""
        for module in self.modules():
            if module is not self and isinstance(module, ProjectionModule | LayerNorm):
                module.reset_parameters()

    def forward(  # noqa: PLR0913 - Transformer Engine's arguments
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_output: Tensor | None = None,
        enc_dec_attn_mask: Tensor | None = None,
        is_first_microbatch: bool | None = None,
        checkpoint_core_attention: bool = False,
        inference_params: Any = None,
        *,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        self_attn_mask_type: MaskType | None = None,
        enc_dec_attn_mask_type: MaskType = "padding",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
    ) -> Tensor:
        """Return the layer's output, in the shape and dtype of hidden_states, or the dtype of torch.autocast.

        hidden_states: (S, B, H), (B, S, H) or (T, H) by attn_input_format; under sequence parallelism this rank's S.
        attention_mask: (B or 1, 1, S or 1, S) bool, or (S, S) for all samples alike; True where a key is hidden, not where it
            is seen; None hides none. With a causal type it holds besides the order; 'no_mask' takes none and 'arbitrary' needs
            one. A query that sees no key attends to nothing: zeros, with zero gradients. self_attn_mask_type: in place of the
            layer's own.
        encoder_output: (Sk, B, H) or (B, Sk, H), for a decoder. enc_dec_attn_mask: (B or 1, 1, S or 1, Sk) or (S, Sk), alike.
        is_first_microbatch: see `Linear.forward`.
        checkpoint_core_attention: compute scores and probabilities again in backward instead of keeping them.
        inference_params: an `InferenceParams`, or an object with its attributes. Self-attention then sees the keys of earlier
            forward passes before its own, its attention_mask and rotary_pos_emb begin with the first of them, Sk is
            sequence_len_offset + S, and the queries are the last S positions. In eval() under torch.no_grad() alone.
        rotary_pos_emb: angles (S, 1, 1, columns) for queries and keys of self-attention, or a pair of them; see
            `RotaryPositionEmbedding`.
        cu_seqlens_q, max_seqlen_q: for 'thd', (B + 1,) int32, 0 and the end of each sequence, and no less than the longest of
            them; without it the host looks it up. cu_seqlens_kv and max_seqlen_kv are equal to them, or left out. Borders are
            checked on a CPU only: a GPU would have to be waited for.
        Raises ValueError for arguments that do not fit the layer or each other.
        """
        x = self._enter(hidden_states, self.config.hidden_size, "hidden_size")
        self._check_packing(x, cu_seqlens_q, (cu_seqlens_kv, max_seqlen_kv), max_seqlen_q)
        self._check_encoder_output(x, encoder_output, enc_dec_attn_mask)
        cache = None if inference_params is None else self._open_cache(x, inference_params)
        mask_type = self_attn_mask_type or self.config.self_attn_mask_type
        seen = self._visibility(x, attention_mask, mask_type, (cu_seqlens_q, max_seqlen_q), cache)
        now = _Pass(self._draw_seeds(x.device), is_first_microbatch, checkpoint_core_attention, cu_seqlens_q)
        angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple | None) else (rotary_pos_emb, rotary_pos_emb)
        out, bias, residual = self.self_attention(
            x,
            seen,
            self._attention_dropout(now, _SELF_SITE),
            rotary_pos_emb=angles,
            is_first_microbatch=is_first_microbatch,
            recompute=checkpoint_core_attention,
            cache=cache,
        )
        if encoder_output is not None:
            x, *_ = self._join(out, bias, residual, now, _SELF_OUTPUT_SITE)
            out, bias, residual = self._cross_half(x, encoder_output, enc_dec_attn_mask, enc_dec_attn_mask_type, now)
            return self._mlp_half(out, bias, residual, now, _CROSS_OUTPUT_SITE)
        return self._mlp_half(out, bias, residual, now, _SELF_OUTPUT_SITE)

    def _cross_half(
        self, x: Tensor, encoder_output: Tensor, mask: Tensor | None, mask_type: str, now: _Pass
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        assert self.inter_attention is not None, "checked with encoder_output"
        check_mask_type("enc_dec_attn_mask_type", mask_type)
        batch, length = self._batch_and_length(x)
        sizes = (batch, length, self._batch_and_length(encoder_output)[1])
        half: tuple[Tensor, Tensor | None, Tensor] = self.inter_attention(
            x,
            cross_visibility(mask, mask_type, sizes, x),
            self._attention_dropout(now, _CROSS_SITE),
            encoder_output=encoder_output,
            is_first_microbatch=now.is_first_microbatch,
            recompute=now.recompute,
        )
        return half

    def _mlp_half(self, out: Tensor, bias: Tensor | None, residual: Tensor, now: _Pass, site: int) -> Tensor:
        """Return the layer's output from that of the attention half."""
        mlp, config = self.layernorm_mlp, self.config
        if must_be_called(mlp, LayerNormMLP):  # with what its hooks make of x, so it computes its norm itself
            x, *_ = self._join(out, bias, residual, now, site)
            out, bias, *returned = mlp(x, now.is_first_microbatch)
        else:
            x, normalized, amax = self._join(out, bias, residual, now, site, mlp.norm_parameters(), mlp.fc1_fp8)
            out, bias, *returned = mlp(x, now.is_first_microbatch, normalized=normalized, amax=amax)
        residual = returned[0] if config.apply_residual_connection_post_layernorm else x
        if not config.output_layernorm:
            return self._join(out, bias, residual, now, _MLP_SITE)[0]
        if must_be_called(self.layernorm, LayerNorm):
            if self.options.sequence_parallel:
                raise UserError(
                    "layernorm has hooks or a forward of its own, which know nothing of sequence_parallel=True, where a rank's "
                    "gradient of it is a part; remove them, or build the layer without it"
                )
            return self.layernorm(self._join(out, bias, residual, now, _MLP_SITE)[0])  # type: ignore[no-any-return]
        weight = self._replicated(self.layernorm.weight)
        assert weight is not None, "a norm has a weight"
        last = effective_weight(weight, config.zero_centered_gamma), self._replicated(self.layernorm.bias)
        return self._join(out, bias, residual, now, _MLP_SITE, last)[1]

    def _join(
        self,
        out: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        now: _Pass,
        site: int,
        norm: tuple[Tensor, Tensor | None] | None = None,
        behind: Fp8State | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return z = residual + droppath(dropout(out + bias)), its norm, z itself without one, and the norm's amax.

        norm: of `normalize`. behind: of the product behind it, see `normalize_before`.
        """
        p, eps = self.config.hidden_dropout, self.config.layernorm_epsilon
        seed = None if now.seeds is None else now.seeds.hidden
        drops_path = self.training and self.config.drop_path_rate > 0 and site != _CROSS_OUTPUT_SITE
        site = self._site(site, self.options.sequence_parallel)
        bias = None if bias is None else cast_like(out, bias)
        if drops_path:
            dropped = dropout(out if bias is None else out + bias, p=p, seed=seed, site=site)
            z = residual + dropped * self._kept_samples(out, now.cu_seqlens)
        elif norm is not None:
            kind = kind_of(norm[1])
            return norm_before(behind, out, bias, residual, *norm, eps=eps, p=p, seed=seed, site=site, kind=kind)
        else:
            z = residual_add(out, bias, residual, p=p, seed=seed, site=site)
        return (z, z, None) if norm is None else (z, *normalize_before(behind, z, *norm, eps))

    def _kept_samples(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Return the factors of drop_path, 0 or 1 / (1 - rate) for a sample that stays, in a shape that multiplies x."""
        rate = self.config.drop_path_rate
        batch = self._batch_and_length(x)[0] if cu_seqlens is None else len(cu_seqlens) - 1
        kept = torch.rand(batch, device=x.device) >= rate
        factors = (kept / (1 - rate) if rate < 1 else torch.zeros_like(kept)).to(x.dtype)
        if cu_seqlens is not None:
            rows = torch.arange(len(x), device=x.device)
            return factors[torch.searchsorted(cu_seqlens, rows, right=True) - 1][:, None]
        return factors[None, :, None] if self.config.attn_input_format == "sbhd" else factors[:, None, None]

    def _draw_seeds(self, device: torch.device) -> DropoutSeeds | None:
        config, tracker = self.config, self.options.get_rng_state_tracker
        if not self.training or (config.hidden_dropout == 0 and config.attention_dropout == 0):
            return None
        tracker = None if tracker is None else tracker()
        return draw_dropout_seeds(device, tracker, sequence_parallel=self.options.sequence_parallel)

    def _attention_dropout(self, now: _Pass, site: int) -> Dropping:
        seed = None if now.seeds is None else now.seeds.attention
        return Dropping(self.config.attention_dropout, seed, self._site(site, True))

    def _site(self, site: int, differs: bool) -> int:
        """Return the site of a dropout whose masks differ between the ranks or not; with a tracker their seeds differ."""
        if not differs or self.options.get_rng_state_tracker is not None:
            return site
        return site + _SITES * group_rank(self._group())

    def _batch_and_length(self, x: Tensor) -> tuple[int, int]:
        """Return B and S, of all ranks together, of an activation (S, B, H) or (B, S, H)."""
        if self.config.attn_input_format == "bshd":
            return x.shape[0], x.shape[1]
        return x.shape[1], x.shape[0] * (self.options.ranks if self.options.sequence_parallel else 1)

    def _open_cache(self, x: Tensor, inference_params: Any) -> Cache:
        """Return the part of the cache that takes the keys of x; raises ValueError where the layer can have no cache."""
        config = self.config
        if self.training or torch.is_grad_enabled():
            gradients = "on" if torch.is_grad_enabled() else "off"
            raise ValueError(
                f"inference_params is given with training={self.training} and gradients {gradients}; the cache passes no "
                f"gradient, so call eval() and use torch.no_grad()"
            )
        if config.attn_input_format == "thd" or self.options.sequence_parallel:
            raise ValueError(
                f"inference_params goes with attn_input_format='sbhd' or 'bshd' and without sequence_parallel; the layer has "
                f"{config.attn_input_format!r} and sequence_parallel={self.options.sequence_parallel}"
            )
        return Cache.open(inference_params, config.layer_number, *self._batch_and_length(x))

    def _visibility(
        self,
        x: Tensor,
        mask: Tensor | None,
        mask_type: str,
        packing: tuple[Tensor | None, int | None],
        cache: Cache | None,
    ) -> Visibility:
        check_mask_type("self_attn_mask_type", mask_type)
        cu_seqlens, max_length = packing
        if cu_seqlens is None:
            batch, length = self._batch_and_length(x)
            return visibility(mask, mask_type, (batch, length, length + (0 if cache is None else cache.start)), x)
        if mask is not None or mask_type == "arbitrary":
            raise ValueError(
                "packed sequences, 'thd', see themselves alone; give no attention_mask and no 'arbitrary' type"
            )
        if max_length is None:
            max_length = len(x) if cu_seqlens.is_meta else int(cu_seqlens.diff().max())
        causal = "causal" in mask_type
        seen = Visibility(AttentionMask(causal=causal, cu_seqlens=cu_seqlens, max_length=max_length))
        if _readable(cu_seqlens) and cu_seqlens[-1] != len(x):
            raise ValueError(
                f"cu_seqlens_q ends with {int(cu_seqlens[-1])}, hidden_states has {len(x)} rows; its last border must be the "
                f"number of rows"
            )
        return seen

    def _check_packing(
        self, x: Tensor, cu_seqlens: Tensor | None, of_keys: tuple[Tensor | None, int | None], max_length: int | None
    ) -> None:
        layout = self.config.attn_input_format
        if x.ndim != len(layout) - 1:
            raise ValueError(
                f"hidden_states is {tuple(x.shape)}; attn_input_format={layout!r} has {len(layout) - 1} dims"
            )
        if (cu_seqlens is not None) != (layout == "thd") or (cu_seqlens is None and max_length is not None):
            raise ValueError(
                f"cu_seqlens_q and max_seqlen_q go with attn_input_format='thd'; the layer's is {layout!r}"
            )
        if of_keys[0] is not None and (cu_seqlens is None or _differ(of_keys[0], cu_seqlens)):
            raise ValueError(
                "cu_seqlens_kv differs from cu_seqlens_q; self-attention has one set of borders, so leave cu_seqlens_kv out"
            )
        if of_keys[1] is not None and of_keys[1] != max_length:
            raise ValueError(f"max_seqlen_kv={of_keys[1]} but max_seqlen_q={max_length}; self-attention has one")

    def _check_encoder_output(self, x: Tensor, encoder_output: Tensor | None, mask: Tensor | None) -> None:
        decodes = self.inter_attention is not None
        if (encoder_output is not None) != decodes or (mask is not None and not decodes):
            raise ValueError(
                f"encoder_output is {'missing' if encoder_output is None else 'given'} and the layer is "
                f"layer_type={self.config.layer_type!r}; it and enc_dec_attn_mask go with 'decoder'"
            )
        if encoder_output is not None and (
            encoder_output.ndim != x.ndim or self._batch_and_length(encoder_output)[0] != self._batch_and_length(x)[0]
        ):
            raise ValueError(
                f"encoder_output is {tuple(encoder_output.shape)}, hidden_states {tuple(x.shape)}; they must have equally many "
                f"dims and samples"
            )


def _readable(borders: Tensor) -> bool:
    """Return whether the host knows the numbers; for those on a GPU it would have to wait."""
    return borders.is_cpu and not torch.compiler.is_compiling()


def _differ(borders: Tensor, others: Tensor) -> bool:
    """Return whether two sets of borders are seen to differ."""
    return borders.shape != others.shape or (_readable(borders) and not torch.equal(borders, others))
