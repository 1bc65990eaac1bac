"""A GPT and a BERT as one writes them in plain torch, for benchmarks: nn.Linear, torch's own attention, norms and losses.

Both take sizes, activation and biases from a run config's section `model`, have pre-LN layers, learned positions, no dropout
and a head tied to the word embedding; the names of weights are those of our models.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_train.launcher.config.schema import RunConfig
from xformer_train.recipes.config import ModelConfig

_NO_LABEL = -100


class Block(nn.Module):
    """A pre-LN layer."""

    def __init__(self, model: ModelConfig, causal: bool) -> None:
        super().__init__()
        size, width = model.hidden_size, model.intermediate_size
        self.heads, self.causal = model.num_attention_heads, causal
        self.tanh = model.hidden_act == "gelu_tanh"
        self.attention_norm = nn.LayerNorm(size, model.layer_norm_eps, bias=model.norm_bias)
        self.qkv = nn.Linear(size, 3 * size, bias=model.attention_bias)
        self.attention_output = nn.Linear(size, size, bias=model.attention_bias)
        self.mlp_norm = nn.LayerNorm(size, model.layer_norm_eps, bias=model.norm_bias)
        self.intermediate = nn.Linear(size, width, bias=model.mlp_bias)
        self.output = nn.Linear(width, size, bias=model.mlp_bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, S, H); mask: bool, True where a query sees a key, (B, 1, 1, S)."""
        q, k, v = self.qkv(self.attention_norm(x)).split(x.shape[-1], -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        x = x + self.attention_output(context.transpose(1, 2).flatten(2))
        hidden = self.intermediate(self.mlp_norm(x))
        return x + self.output(F.gelu(hidden, approximate="tanh" if self.tanh else "none"))


class PlainGpt(nn.Module):
    """A causal model whose head gives logits of all tokens."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        super().__init__()
        model = config.model
        self.word_embeddings = nn.Embedding(vocab_size, model.hidden_size)
        self.position_embeddings = nn.Embedding(model.max_position_embeddings, model.hidden_size)
        self.layers = nn.ModuleList(Block(model, causal=True) for _ in range(model.num_hidden_layers))
        self.final_norm = nn.LayerNorm(model.hidden_size, model.layer_norm_eps, bias=model.norm_bias)
        initialize(self, model.initializer_range)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> Tensor:
        """Return the mean loss; input_ids, labels: (B, S)."""
        x = self.word_embeddings(input_ids) + self.position_embeddings(torch.arange(input_ids.shape[1]))
        for block in self.layers:
            x = block(x, None)
        logits = F.linear(self.final_norm(x), self.word_embeddings.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_NO_LABEL)


class PlainBert(nn.Module):
    """A bidirectional model with BERT's two heads, which gives logits of the masked tokens alone."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        super().__init__()
        model = config.model
        size, eps = model.hidden_size, model.layer_norm_eps
        self.word_embeddings = nn.Embedding(vocab_size, size)
        self.position_embeddings = nn.Embedding(model.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(2, size)
        self.embedding_norm = nn.LayerNorm(size, eps)
        self.layers = nn.ModuleList(Block(model, causal=False) for _ in range(model.num_hidden_layers))
        self.final_norm = nn.LayerNorm(size, eps)
        self.mlm_transform, self.mlm_norm = nn.Linear(size, size), nn.LayerNorm(size, eps)
        self.mlm_bias = nn.Parameter(torch.zeros(vocab_size))
        self.pooler, self.sentence_classifier = nn.Linear(size, size), nn.Linear(size, 2)
        initialize(self, model.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        masked_positions: Tensor,
        masked_labels: Tensor,
        sentence_labels: Tensor,
    ) -> Tensor:
        """Return the sum of both mean losses; the tensors as our own BERT takes them."""
        x = (
            self.word_embeddings(input_ids)
            + self.token_type_embeddings(token_type_ids)
            + self.position_embeddings(torch.arange(input_ids.shape[1]))
        )
        x, mask = self.embedding_norm(x), attention_mask[:, None, None, :]
        for block in self.layers:
            x = block(x, mask)
        x = self.final_norm(x)
        masked = self.mlm_norm(F.gelu(self.mlm_transform(x.flatten(0, 1)[masked_positions])))
        logits = F.linear(masked, self.word_embeddings.weight, self.mlm_bias)
        scores = self.sentence_classifier(torch.tanh(self.pooler(x[:, 0])))
        return F.cross_entropy(logits, masked_labels) + F.cross_entropy(scores, sentence_labels)


def initialize(model: nn.Module, std: float) -> None:
    """Draw matrices from N(0, std) and set the biases of linear layers to 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
