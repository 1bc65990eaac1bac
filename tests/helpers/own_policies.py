"""Models for which no policy is shipped, and policies for them as their users would write them."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from helpers.hf_models import BERT, ENDS, MODELS, SIZES, VOCABULARY, WORDS, Small, decoder_text, text
from torch import Tensor, nn

from xformer_train.recipes.policies import AllReduceConv1D, AllReduceLinear, Layer, Policy


class OpenAIGPTPolicy(Policy):
    """As parallelformers' users write theirs."""

    @staticmethod
    def replace_arguments(config, world_size):
        return {
            "attn.split_size": config.hidden_size // world_size,
            "attn.n_head": config.num_attention_heads // world_size,
            "crossattention.n_head": config.num_attention_heads // world_size,
        }

    @staticmethod
    def attn_qkv():
        return [
            Layer(weight="attn.c_attn.weight", bias="attn.c_attn.bias", n_fused=3, reversed=True),
            Layer(
                weight="crossattention.c_attn.weight",
                bias="crossattention.c_attn.bias",
                n_fused=3,
                reversed=True,
                ignore_checker=True,
            ),
        ]

    @staticmethod
    def attn_out():
        return [
            Layer(weight="attn.c_proj.weight", bias="attn.c_proj.bias", replace=AllReduceConv1D, reversed=True),
        ]

    @staticmethod
    def mlp_in():
        return [Layer(weight="mlp.c_fc.weight", bias="mlp.c_fc.bias", reversed=True)]

    @staticmethod
    def mlp_out():
        return [Layer(weight="mlp.c_proj.weight", bias="mlp.c_proj.bias", replace=AllReduceConv1D, reversed=True)]

    @staticmethod
    def original_layer_class():
        from transformers.models.openai.modeling_openai import Block

        return Block


class Config:
    """Of `Grouped`: four heads of queries share two of keys and values."""

    hidden_size, heads, groups, head_dim, intermediate_size = 16, 4, 2, 4, 24

    def __init__(self, **fields: Any) -> None:
        assert not fields


class Gate(nn.Module):
    """SwiGLU of both projections in one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


class Block(nn.Module):
    """Attention with grouped queries and an MLP, their projections fused in nn.Linear, one after the other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.groups, self.head_dim = config.groups, config.head_dim
        self.norms = nn.ModuleList([nn.LayerNorm(config.hidden_size) for _ in range(2)])
        self.qkv = nn.Linear(config.hidden_size, (config.heads + 2 * config.groups) * config.head_dim)
        self.query_norm = nn.RMSNorm(config.head_dim)
        self.out = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        self.mlp = nn.ModuleList(
            [
                nn.Linear(config.hidden_size, 2 * config.intermediate_size),
                Gate(),
                nn.Linear(config.intermediate_size, config.hidden_size),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        columns = self.groups * self.head_dim
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).split([2 * columns, columns, columns], -1)
        )
        context = F.scaled_dot_product_attention(self.query_norm(q), k, v, enable_gqa=True)
        x = x + self.out(context.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        for module in self.mlp:
            y = module(y)
        return x + y


class Output(dict):
    """A model's output by name, with its loss as transformers' have it."""

    @property
    def loss(self) -> Tensor:
        return self["loss"]


class Grouped(nn.Module):
    """Two blocks on the inputs themselves."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([Block(config) for _ in range(2)])

    def tie_weights(self) -> None:
        """It has none."""

    def forward(self, x: Tensor, output_hidden_states: bool = False) -> Output:
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return Output(loss=states[-1].square().sum(), states=states)


class PlainGate(Gate):
    """The same in other words."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x[..., half:] * F.silu(x[..., :half])


class GroupedPolicy(Policy):
    @staticmethod
    def original_layer_class():
        return Block

    @staticmethod
    def replace_arguments(config, world_size):
        return {"groups": config.groups // world_size}

    @staticmethod
    def replace_modules():
        return {"Gate": PlainGate}

    @staticmethod
    def attn_qkv():
        def parts(config):
            return [heads * config.head_dim for heads in (config.heads, config.groups, config.groups)]

        return [Layer("qkv.weight", "qkv.bias", parts=parts)]

    @staticmethod
    def attn_out():
        return [Layer("out.weight", replace=AllReduceLinear)]

    @staticmethod
    def mlp_in():
        return [Layer("mlp[0].weight", "mlp[0].bias", n_fused=2)]

    @staticmethod
    def mlp_out():
        return [Layer("mlp[2].weight", "mlp[2].bias", replace=AllReduceLinear)]

    @staticmethod
    def shared_by_heads():
        return ["query_norm.weight"]


class MPNetBiasPolicy(Policy):
    """Biases by distance, (buckets, heads), in a rule of projections that are stored (out, in)."""

    @staticmethod
    def replace_arguments(config, world_size):
        return {"n_heads": config.num_attention_heads // world_size}

    @staticmethod
    def attn_out():
        return [Layer(weight="relative_attention_bias.weight")]

    @staticmethod
    def original_layer_class():
        from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

        return MPNetEncoder


class MPNetLayerPolicy(Policy):
    """With biases that no rule names, an MLP that stays whole, an attribute and a class that are gone."""

    @staticmethod
    def replace_arguments(config, world_size):
        return {
            "attention.attn.num_attention_heads": config.num_attention_heads // world_size,
            "attention.attn.all_head_size": config.hidden_size // world_size,
            "attention.hidden_size": config.hidden_size // world_size,
        }

    @staticmethod
    def replace_modules():
        return {"MPNetOldAttention": PlainGate}

    @staticmethod
    def attn_qkv():
        return [Layer(weight=f"attention.attn.{name}.weight") for name in "qkv"]

    @staticmethod
    def attn_out():
        return [Layer(weight="attention.attn.o.weight", replace=AllReduceLinear)]

    @staticmethod
    def original_layer_class():
        from transformers.models.mpnet.modeling_mpnet import MPNetLayer

        return MPNetLayer


class OldFeedForward(nn.Module):
    """Written for a version whose forward had other arguments."""

    def forward(self, states: Tensor, layer_head_mask: Tensor | None = None) -> Tensor:
        raise AssertionError("nobody can call this")


class T5OldPolicy(Policy):
    """With the last of a list, whichever that is, and a replacement that today's model cannot call."""

    @staticmethod
    def replace_arguments(config, world_size):
        heads = config.num_heads // world_size
        attentions = ("layer[0].SelfAttention", "layer[1].EncDecAttention")
        sizes = {"n_heads": heads, "inner_dim": heads * config.d_kv}
        return {f"{attention}.{name}": size for attention in attentions for name, size in sizes.items()}

    @staticmethod
    def replace_modules():
        return {"T5LayerFF": OldFeedForward}

    @staticmethod
    def attn_qkv():
        return [
            *(Layer(weight=f"layer[0].SelfAttention.{name}.weight") for name in "qkv"),
            *(Layer(weight=f"layer[1].EncDecAttention.{name}.weight", ignore_checker=True) for name in "qkv"),
        ]

    @staticmethod
    def attn_out():
        return [
            Layer(weight="layer[0].SelfAttention.o.weight", replace=AllReduceLinear),
            Layer(weight="layer[1].EncDecAttention.o.weight", replace=AllReduceLinear, ignore_checker=True),
            Layer(weight="layer[0].SelfAttention.relative_attention_bias.weight", ignore_checker=True),
        ]

    @staticmethod
    def mlp_in():
        return [Layer(weight="layer[-1].DenseReluDense.wi.weight")]

    @staticmethod
    def mlp_out():
        return [Layer(weight="layer[-1].DenseReluDense.wo.weight", replace=AllReduceLinear)]

    @staticmethod
    def original_layer_class():
        from transformers.models.t5.modeling_t5 import T5Block

        return T5Block


class ForgetfulPolicy(GroupedPolicy):
    """Does not say that all heads use one norm of queries."""

    @staticmethod
    def shared_by_heads():
        return []


class GatedBlock(Block):
    """With a gate of the attention's output that hidden states reach around the projections."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(self.norms[0](x)).sigmoid()
        with_gate = self.out.register_forward_pre_hook(lambda _, args: (args[0] * gate,))
        try:
            return super().forward(x)
        finally:
            with_gate.remove()


class Gated(Grouped):
    """Two blocks whose gates have partial gradients in part."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList([GatedBlock(config) for _ in range(2)])


GATED = Small(Gated, {}, lambda generator: {"x": torch.randn(2, 6, 16, generator=generator)}, lambda _: GroupedPolicy)

MODELS_WITH_POLICIES: dict[str, Small] = {
    "openai": Small(
        "OpenAIGPTLMHeadModel",
        {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_head": 4, "n_layer": 2},
        decoder_text,
        lambda config: OpenAIGPTPolicy,
    ),
    "grouped": Small(
        Grouped, {}, lambda generator: {"x": torch.randn(2, 6, 16, generator=generator)}, lambda config: GroupedPolicy
    ),
    "forgetful": Small(
        Grouped, {}, lambda generator: {"x": torch.randn(2, 6, 16, generator=generator)}, lambda config: ForgetfulPolicy
    ),
    "apertus_plan": Small(  # whose activation is learnt, two numbers a layer, which its plan does not say
        "ApertusForCausalLM",
        WORDS | SIZES | ENDS | {"num_key_value_heads": 2},
        decoder_text,
        Policy.from_tp_plan,
    ),
    "llama_plan": Small(
        "LlamaForCausalLM", WORDS | SIZES | ENDS | {"num_key_value_heads": 2}, decoder_text, Policy.from_tp_plan
    ),
    "qwen3_plan": Small(  # whose norms of queries and keys are shared by the heads
        "Qwen3ForCausalLM",
        WORDS | SIZES | ENDS | {"num_key_value_heads": 2, "head_dim": 8},
        decoder_text,
        Policy.from_tp_plan,
    ),
    "mpnet_old": Small("MPNetForMaskedLM", BERT, text, lambda config: [MPNetBiasPolicy, MPNetLayerPolicy]),
    "t5_old": dataclasses.replace(MODELS["t5"], policy=lambda config: T5OldPolicy),
}
