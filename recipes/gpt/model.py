"""GPT: causal pre-LN decoder, with the positions of GPT-2 or those of Llama.

Sources: Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2); Touvron et al., arXiv 2302.13971.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.errors import UserError
from ...kernels.layers.cache import KeyValueCache
from ...kernels.layers.inner_modules import must_be_called
from ...kernels.ops.attention.attention import AttentionMask
from ...kernels.ops.choices import IGNORED
from ...kernels.ops.dropout import draw_seed
from ...kernels.ops.norm.residual_norm import dropout
from ..config import LayerFlags, ModelConfig, ObjectiveConfig
from ..recipe import PLAIN_RUNTIME, Runtime
from ..shared.model_parts import (
    build_layers,
    check_positions,
    embedded,
    initialize,
    model_norm,
    normalized,
    refuse_to_share,
    shard_vocabulary,
    vocabulary_logits,
    vocabulary_loss,
)

_EMBEDDING_SITE = 1


def attention_window(model: ModelConfig) -> int | None:
    """Return how many tokens before it one sees in local layers, or None where all layers are global."""
    return None if model.sliding_window is None else model.sliding_window - 1


class GptForPretraining(nn.Module):
    """GPT with its language-model head.

    With position_embedding rope there is no embedding of positions; with tie_word_embeddings the head is the word embedding.
    The processes of runtime.parallel each hold V/t rows of the word embedding and of `lm_head`, and their parts of the layers;
    inputs, hidden states, logits and losses are replicated.
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
        learned, tied = model.position_embedding == "learned", model.tie_word_embeddings
        self.word_embeddings = nn.Embedding(vocab_size, model.hidden_size)
        self.position_embeddings = nn.Embedding(model.max_position_embeddings, model.hidden_size) if learned else None
        self.layers = build_layers(model, layer, runtime, window=attention_window(model))
        self.final_norm = model_norm(model)
        self.lm_head = None if tied else nn.Linear(model.hidden_size, vocab_size, bias=False)
        fresh = [self.word_embeddings, self.position_embeddings, self.lm_head]
        initialize([module for module in fresh if module is not None], model.initializer_range)
        of_vocabulary = ["word_embeddings.weight"] if tied else ["word_embeddings.weight", "lm_head.weight"]
        shard_vocabulary(self, of_vocabulary, vocab_size, runtime.parallel.group)

    def encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The hidden state of every token after the final norm, (B, S, H).

        input_ids: (B, S) int64; position_ids: (B, S) int64, default 0 .. S - 1; segment_ids: (B, S) int, tokens see only
        their own segment, default one segment; attention_mask: (B, S) bool, True = a token, default all.
        Rotary positions are the places in a row, whatever position_ids are: tokens that see each other know their distance.
        cache: the tokens follow those in it, and theirs are added; position_ids count on, and attention_mask is of all of them.
        Raises ValueError if S, with the tokens in the cache, exceeds max_position_embeddings.
        """
        start = 0 if cache is None else cache.length
        check_positions(input_ids, self.config.max_position_embeddings, start)
        hidden = embedded(input_ids, self.word_embeddings, self.parallel.group)
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
            hidden = hidden + self.position_embeddings(position_ids)
        p = self.config.hidden_dropout_prob
        seed = draw_seed(hidden.device) if self.training and p > 0 else None
        hidden = dropout(hidden, p=p, seed=seed, site=_EMBEDDING_SITE, kernels=self.kernels)
        mask = AttentionMask(causal=True, key_mask=attention_mask, segment_ids=segment_ids)
        hidden = self.layers(hidden, mask, cache)
        return normalized(hidden, self.final_norm, self.kernels)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every vocabulary entry as the next token, (..., V), for hidden states (..., H)."""
        head = self._called_head()
        if head is not None:
            return head(hidden)  # type: ignore[no-any-return]
        return vocabulary_logits(hidden, self._head_weight, None, self.parallel.group)

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The summed next-token loss, {"clm": ()} in fp32.

        labels: (B, S) int64, the token that follows each position, IGNORED where there is none to predict.
        """
        hidden = self.encode(input_ids, position_ids, segment_ids).flatten(0, 1)
        head = self._called_head()
        if head is not None:
            logits: Tensor = head(hidden)
            wide = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits.to(wide), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        else:
            group = self.parallel.group
            loss = vocabulary_loss(hidden, self._head_weight, None, labels.flatten(), self.kernels, group)
        return {"clm": loss}

    @property
    def _head_weight(self) -> Tensor:
        return self.word_embeddings.weight if self.lm_head is None else self.lm_head.weight

    def _called_head(self) -> nn.Module | None:
        """Return the untied head if it does more than its parameters say. Raises ValueError if processes share it then."""
        if self.lm_head is None or not must_be_called(self.lm_head, nn.Linear):
            return None
        refuse_to_share("lm_head", self.lm_head, self.parallel.group)
        return self.lm_head
