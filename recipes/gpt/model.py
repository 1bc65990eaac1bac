"""GPT: causal pre-LN decoder with a head tied to the word embeddings.

Source: Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2).
"""

import torch
from torch import Tensor, nn

from ...kernels.errors import UserError
from ...kernels.ops.attention.attention import AttentionMask
from ...kernels.ops.dropout import draw_seed
from ...kernels.ops.norm.residual_norm import dropout
from ..config import LayerFlags, ModelConfig, ObjectiveConfig
from ..recipe import PLAIN_RUNTIME, Runtime
from ..shared.model_parts import (
    build_layers,
    check_positions,
    embedded,
    initialize,
    normalized,
    shard_vocabulary,
    vocabulary_logits,
    vocabulary_loss,
)

_EMBEDDING_SITE = 1


class GptForPretraining(nn.Module):
    """GPT with its language-model head.

    The processes of runtime.parallel each hold V/t rows of the word embedding and their parts of the layers; inputs, hidden
    states, logits and losses are replicated.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: LayerFlags,
        objective: ObjectiveConfig,
        vocab_size: int,
        runtime: Runtime = PLAIN_RUNTIME,
    ) -> None:
        super().__init__()
        if not model.pre_layer_norm:
            raise UserError("model.pre_layer_norm=false: GPT is a pre-LN model; set it to true")
        self.config, self.kernels, self.parallel = model, layer.kernels, runtime.parallel
        self.word_embeddings = nn.Embedding(vocab_size, model.hidden_size)
        self.position_embeddings = nn.Embedding(model.max_position_embeddings, model.hidden_size)
        self.layers = build_layers(model, layer, runtime)
        self.final_norm = nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps)
        initialize([self.word_embeddings, self.position_embeddings], model.initializer_range)
        shard_vocabulary(self, ["word_embeddings.weight"], vocab_size, runtime.parallel.group)

    def encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The hidden state of every token after the final LayerNorm, (B, S, H).

        input_ids: (B, S) int64; position_ids: (B, S) int64, default 0 .. S - 1; segment_ids: (B, S) int, tokens see only
        their own segment, default one segment; attention_mask: (B, S) bool, True = a token, default all.
        Raises ValueError if S exceeds max_position_embeddings.
        """
        check_positions(input_ids, self.config.max_position_embeddings)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = embedded(input_ids, self.word_embeddings, self.parallel.group)
        hidden = hidden + self.position_embeddings(position_ids)
        p = self.config.hidden_dropout_prob
        seed = draw_seed(hidden.device) if self.training and p > 0 else None
        hidden = dropout(hidden, p=p, seed=seed, site=_EMBEDDING_SITE, kernels=self.kernels)
        mask = AttentionMask(causal=True, key_mask=attention_mask, segment_ids=segment_ids)
        hidden = self.layers(hidden, mask)
        return normalized(hidden, self.final_norm, self.kernels)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every vocabulary entry as the next token, (..., V), for hidden states (..., H)."""
        return vocabulary_logits(hidden, self.word_embeddings.weight, None, self.parallel.group)

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The summed next-token loss, {"clm": ()} in fp32.

        labels: (B, S) int64, the token that follows each position, IGNORED where there is none to predict.
        """
        hidden = self.encode(input_ids, position_ids, segment_ids)
        loss = vocabulary_loss(
            hidden.flatten(0, 1), self.word_embeddings.weight, None, labels.flatten(), self.kernels, self.parallel.group
        )
        return {"clm": loss}
