"""The attention half of `te.TransformerLayer`: projections to queries, keys and values, attention, projection back."""

from typing import Any

import torch
from torch import Tensor

from ..ops.attention.heads import query_key_value
from .core_attention import Dropping, Visibility, attention_over_cache, cross_attention, self_attention
from .inference import Cache
from .layer_options import LayerOptions
from .linear import LayerNormLinear, Linear
from .module import DEFAULT_INIT, ProjectionModule, Shard
from .rotary import check_rotary, rotate, shared_table


class MultiheadAttention(ProjectionModule):
    """One attention half; with cross=True the keys and values are of another stream, `encoder_output`.

    fuse_qkv_params=True: one parameter, interleaved by group of heads: the queries of the group, its key, its value; without
    grouped queries q0 k0 v0 q1 k1 v1 and so on, D rows each. Cross-attention: the query, and k0 v0 k1 v1 ....
    fuse_qkv_params=False: parameters query, key, value and query_bias, key_bias, value_bias of this module, which are what
    their names say. (Transformer Engine before 2023 read their concatenation as interleaved.)

    State dict: see `TransformerLayer`; layernorm_qkv.query_weight and the like, the later names of query, are loaded too.
    """

    def __init__(self, config: LayerOptions, *, cross: bool = False) -> None:
        super().__init__(config.shared)
        self.config, self.cross = config, cross
        self.heads = self.options.part("num_attention_heads", config.num_attention_heads)
        self.groups = self.options.part("num_gqa_groups", config.groups)
        self.key_heads = None if self.groups == self.heads else self.groups  # of ops/attention
        size, dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * dim, config.groups * dim
        inward = {
            "bias": config.bias,
            "init_method": config.init_method,
            "parallel_mode": "column" if config.set_parallel_mode else None,
            "skip_weight_param_allocation": not config.fuse_qkv_params,
            **vars(self.options),
        }
        norm = config.norm | {"return_layernorm_output": config.apply_residual_connection_post_layernorm}
        if cross:
            self._first = "layernorm_query"
            self.layernorm_query = LayerNormLinear(size, queries, **norm, **inward)
            self.key_value = Linear(size, 2 * keys, **inward)
        elif config.output_layernorm:
            self._first = "qkv"
            self.qkv = Linear(size, queries + 2 * keys, **inward)
        else:
            self._first = "layernorm_qkv"
            self.layernorm_qkv = LayerNormLinear(size, queries + 2 * keys, **norm, **inward)
        if not config.fuse_qkv_params:
            self._allocate_apart()
        self.proj = Linear(
            queries,
            size,
            bias=config.bias,
            init_method=config.output_layer_init_method,
            parallel_mode="row" if config.set_parallel_mode else None,
            return_bias=True,
            **vars(self.options),
        )

    def _allocate_apart(self) -> None:
        config, shard = self.config, Shard(0) if self.config.set_parallel_mode else None
        for part, heads in (("query", self.heads), ("key", self.groups), ("value", self.groups)):
            rows = heads * config.head_dim
            self._allocate(part, (rows, config.hidden_size), config.init_method or DEFAULT_INIT, shard=shard)
            self._allocate(f"{part}_bias", (rows,) if config.bias else None, shard=shard)

    def forward(
        self,
        hidden_states: Tensor,
        seen: Visibility,
        dropping: Dropping,
        *,
        encoder_output: Tensor | None = None,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        is_first_microbatch: bool | None = None,
        recompute: bool = False,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (output without the projection's bias, that bias, what a residual connection adds).

        hidden_states, encoder_output: in the layer's input format. seen: of this half. recompute: see `self_attention`.
        cache: takes this half's keys and values, and has those that the queries see before their own.
        """
        first = getattr(self, self._first)
        parts = ("query",) if self.cross else ("query", "key", "value")
        projected = first(hidden_states, *self._joined(parts), is_first_microbatch)
        residual = hidden_states
        if isinstance(projected, tuple):
            projected, residual = projected
        if self.cross:
            assert encoder_output is not None, "the layer asks for it"
            kv = self.key_value(encoder_output, *self._joined(("key", "value")), is_first_microbatch)
            q = self._batch_first(projected.unflatten(-1, (self.heads, -1)))
            context = cross_attention(q, self._batch_first(self._split_kv(kv)), seen, dropping, recompute=recompute)
        else:
            context = self._self_attention(projected, seen, dropping, rotary_pos_emb, recompute=recompute, cache=cache)
        out, bias = self.proj(self._batch_first(context), is_first_microbatch=is_first_microbatch)
        return out, self._handed_out(bias), residual

    def _self_attention(
        self,
        projected: Tensor,
        seen: Visibility,
        dropping: Dropping,
        angles: tuple[Tensor, Tensor] | None,
        *,
        recompute: bool,
        cache: Cache | None,
    ) -> Tensor:
        """Return attention of a projection's output among its own tokens and those of the cache, batch first."""
        qkv, rotary = self._batch_first(self._split_qkv(projected)), None
        if angles is not None:
            rotary = None if cache is not None else shared_table(angles, qkv)
            if rotary is None:
                qkv = self._rotated(qkv, angles, seen, 0 if cache is None else cache.start)
            else:
                check_rotary(angles[0], seen.mask.max_length or qkv.shape[1], qkv.shape[-1])
        if cache is not None:
            queries, keys, values = query_key_value(qkv, self.key_heads)
            known = cache.extend(keys, values)
            if known[0].shape[1] != keys.shape[1]:
                return attention_over_cache(queries, *known, seen)
        return self_attention(qkv, seen, dropping, key_heads=self.key_heads, rotary=rotary, recompute=recompute)

    def _joined(self, parts: tuple[str, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias for a projection that has none of its own."""
        if self.config.fuse_qkv_params:
            return None, None
        weights, biases = ([getattr(self, part + kind) for part in parts] for kind in ("", "_bias"))
        return torch.cat(weights), torch.cat(biases) if self.config.bias else None

    def _split_qkv(self, qkv: Tensor) -> Tensor:
        """Return (..., 3, N, D) of a projection's (..., rows), or (..., N + 2G, D) where heads share keys."""
        heads, groups, dim = self.heads, self.groups, self.config.head_dim
        if not self.config.fuse_qkv_params:
            return qkv.unflatten(-1, (3, heads, dim) if self.key_heads is None else (heads + 2 * groups, dim))
        if self.key_heads is None:
            return qkv.unflatten(-1, (heads, 3, dim)).transpose(-3, -2)
        q, k, v = qkv.unflatten(-1, (groups, heads // groups + 2, dim)).split([heads // groups, 1, 1], -2)
        return torch.cat([part.flatten(-3, -2) for part in (q, k, v)], -2)

    def _split_kv(self, kv: Tensor) -> Tensor:
        """Return keys and values (..., 2, N, D) of a projection's (..., rows)."""
        heads, groups, dim = self.heads, self.groups, self.config.head_dim
        if self.config.fuse_qkv_params:
            kv = kv.unflatten(-1, (groups, 2, dim)).transpose(-3, -2)
        else:
            kv = kv.unflatten(-1, (2, groups, dim))
        return kv if heads == groups else kv.repeat_interleave(heads // groups, -2)

    def _batch_first(self, x: Tensor) -> Tensor:
        """Convert between the input format and (B, S, ...), in which attention computes; this is its own inverse."""
        return x.transpose(0, 1) if self.config.attn_input_format == "sbhd" else x

    def _rotated(self, qkv: Tensor, angles: tuple[Tensor, Tensor], seen: Visibility, start: int) -> Tensor:
        """Return qkv, as `_split_qkv` gives it, with queries and keys turned, each by its angles (S, 1, 1, columns).

        start: the position of the first row.
        """
        borders, length = seen.mask.cu_seqlens, seen.mask.max_length
        length = start + qkv.shape[1] if length is None else length
        for part in angles:
            check_rotary(part, length, qkv.shape[-1])
        if borders is None:
            at_positions = [part[start:length, 0] for part in angles]  # (S, 1, columns)
        else:
            places = torch.arange(len(qkv), device=qkv.device)
            positions = places - borders[torch.searchsorted(borders, places, right=True) - 1]
            at_positions = [part[positions, 0] for part in angles]
        q, k, v = query_key_value(qkv, self.key_heads)
        parts = [rotate(q, at_positions[0]), rotate(k, at_positions[1]), v]
        return torch.stack(parts, -3) if self.key_heads is None else torch.cat(parts, -2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for core in (
            "core_attention",
            "core_attention.fused_attention",
        ):  # the latter in Transformer Engine 1.6 and 1.7
            state_dict.pop(f"{prefix}{core}._extra_state", None)
        for child in (self._first, "key_value"):
            for part in ("query", "key", "value"):
                for later, name in ((f"{part}_weight", part), (f"{part}_bias", f"{part}_bias")):
                    if f"{prefix}{child}.{later}" in state_dict:
                        state_dict[prefix + name] = state_dict.pop(f"{prefix}{child}.{later}")
        super()._load_from_state_dict(state_dict, prefix, *args)
