"""BERT: bidirectional encoder, masked-token loss on the masked positions only, and a sentence-pair task.

Sources: Devlin et al., arXiv 1810.04805; pre-LN placement as in DeepSpeed's BERT recipe (a norm after the embeddings and one
after the last layer); with rotary positions Warner et al., ModernBERT, arXiv 2412.13663.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.ops.attention.attention import AttentionMask
from ...kernels.ops.dropout import draw_seed
from ...kernels.ops.mlp.activation import activated
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
    projected,
    shard_vocabulary,
    vocabulary_logits,
    vocabulary_loss,
)

NUM_TOKEN_TYPES = 2  # sentence A and sentence B
_EMBEDDING_SITE = 1


def attention_window(model: ModelConfig) -> int | None:
    """Return how many tokens to each side of it one sees in local layers, or None where all layers are global."""
    return None if model.sliding_window is None else model.sliding_window // 2


class BertForPretraining(nn.Module):
    """BERT with its heads.

    objective.sentence_task: nsp or sop adds the pooler and a two-way classifier over [CLS]; with none they do not exist.
    model.position_embedding: with rope there is no embedding of positions, none of token types without a sentence task, and the
    norm of the embedding is what the first layer's attention reads.
    The processes of runtime.parallel each hold V/t rows of the word embedding and of mlm_bias, and their parts of the layers;
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
        self.config, self.kernels, self.sentence_task = model, layer.kernels, objective.sentence_task
        self.parallel = runtime.parallel
        size, learned = model.hidden_size, model.position_embedding == "learned"
        with_types = learned or self.sentence_task != "none"
        self.word_embeddings = nn.Embedding(vocab_size, size)
        self.position_embeddings = nn.Embedding(model.max_position_embeddings, size) if learned else None
        self.token_type_embeddings = nn.Embedding(NUM_TOKEN_TYPES, size) if with_types else None
        self.embedding_norm = model_norm(model)
        self.layers = build_layers(model, layer, runtime, window=attention_window(model), norm_before_first=learned)
        self.final_norm = model_norm(model) if model.pre_layer_norm else None
        self.mlm_transform = nn.Linear(size, size, bias=model.mlp_bias)
        self.mlm_norm = model_norm(model)
        self.mlm_bias = nn.Parameter(torch.zeros(vocab_size))  # the projection itself is the word embedding
        fresh = [self.word_embeddings, self.position_embeddings, self.token_type_embeddings, self.mlm_transform]
        if self.sentence_task != "none":
            self.pooler = nn.Linear(size, size)
            self.sentence_classifier = nn.Linear(size, 2)
            fresh += [self.pooler, self.sentence_classifier]
        initialize([module for module in fresh if module is not None], model.initializer_range)
        shard_vocabulary(self, ["word_embeddings.weight", "mlm_bias"], vocab_size, runtime.parallel.group)

    def encode(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """The hidden state of every token, (B, S, H).

        input_ids: (B, S) int64; token_type_ids: (B, S) int64 in {0, 1}, default 0; attention_mask: (B, S) bool, True = a
        token, default all; position_ids: (B, S) int64, default 0 .. S - 1; segment_ids: (B, S) int, tokens see only their own
        segment, default one segment. Raises ValueError if S exceeds max_position_embeddings.
        Rotary positions are the places in a row, whatever position_ids are: tokens that see each other know their distance.
        """
        check_positions(input_ids, self.config.max_position_embeddings)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = AttentionMask(key_mask=attention_mask, segment_ids=segment_ids)
        return self._encode(input_ids, token_type_ids, position_ids, mask)

    def _encode_unpadded(
        self, input_ids: Tensor, token_type_ids: Tensor, token_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The hidden states of the tokens at these places of (B, S) alone, (T, H), and the row of each first one, (B,).

        Nothing here waits for a GPU to learn how many tokens there are: T and S are shapes.
        """
        check_positions(input_ids, self.config.max_position_embeddings)
        batch, size = input_ids.shape
        starts = torch.arange(0, (batch + 1) * size, size, device=input_ids.device)
        borders = torch.searchsorted(token_positions, starts, out_int32=True)
        hidden = self._encode(
            input_ids.flatten().index_select(0, token_positions),
            token_type_ids.flatten().index_select(0, token_positions),
            token_positions % size,
            AttentionMask(cu_seqlens=borders, max_length=size),
        )
        return hidden, borders[:-1]

    def _encode(self, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor, mask: AttentionMask) -> Tensor:
        """Hidden states of a padded batch, (B, S, H) from (B, S), or a packed one, (T, H) from (T,), as the mask has it.

        positions: place of each token in its sequence, (S,), (B, S) or (T,) int64.
        """
        hidden = embedded(input_ids, self.word_embeddings, self.parallel.group)
        if self.token_type_embeddings is not None:
            hidden = hidden + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(positions)
        hidden = normalized(hidden, self.embedding_norm, self.kernels)
        p = self.config.hidden_dropout_prob
        seed = draw_seed(hidden.device) if self.training and p > 0 else None
        hidden = dropout(hidden, p=p, seed=seed, site=_EMBEDDING_SITE, kernels=self.kernels)
        hidden = self.layers(hidden, mask)
        if self.final_norm is not None:
            hidden = normalized(hidden, self.final_norm, self.kernels)
        return hidden

    def _mlm_features(self, hidden: Tensor) -> Tensor:
        features = activated(projected(hidden, self.mlm_transform), self.config.hidden_act, kernels=self.kernels)
        return normalized(features, self.mlm_norm, self.kernels)

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Scores of every vocabulary entry, (..., V), for hidden states (..., H)."""
        features = self._mlm_features(hidden)
        return vocabulary_logits(features, self.word_embeddings.weight, self.mlm_bias, self.parallel.group)

    def sentence_logits(self, first: Tensor) -> Tensor:
        """Return the scores of the two sentence labels, (B, 2), from the hidden states of first tokens, (B, H)."""
        scores: Tensor = self.sentence_classifier(torch.tanh(self.pooler(first)))
        return scores

    def forward(  # noqa: PLR0913 - the tensors of a batch
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        masked_positions: Tensor,
        masked_labels: Tensor,
        sentence_labels: Tensor | None = None,
        token_positions: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The summed loss of each task, {"mlm": (), and "nsp" or "sop": ()} in fp32.

        masked_positions: (M,) int64, flat indices into B * S; masked_labels: (M,) int64 token ids, IGNORED counts nothing;
        sentence_labels: (B,) int64, 0 = true pair or order, 1 = not.
        token_positions: (T,) int64, the flat indices at which attention_mask is True, ascending, among them the first of every
            row and all masked ones. With them padding is left out before the embedding and never put back, which changes
            neither losses nor gradients beyond rounding, but the dropout masks outside attention, which count elements.
            With rope no token may stand behind padding of its row.
        position_ids, segment_ids: as in `encode`, for rows of several samples, where padding is a segment of its own and
            attention_mask says nothing more.
        """
        if token_positions is None:
            key_mask = attention_mask if segment_ids is None else None
            hidden = self.encode(input_ids, token_type_ids, key_mask, position_ids, segment_ids)
            first, hidden = hidden[:, 0], hidden.flatten(0, 1)
        else:
            hidden, first_rows = self._encode_unpadded(input_ids, token_type_ids, token_positions)
            first = hidden.index_select(0, first_rows)
            masked_positions = torch.searchsorted(token_positions, masked_positions)
        masked = self._mlm_features(hidden.index_select(0, masked_positions))
        loss = vocabulary_loss(
            masked, self.word_embeddings.weight, self.mlm_bias, masked_labels, self.kernels, self.parallel.group
        )
        sums = {"mlm": loss}
        if self.sentence_task != "none":
            assert sentence_labels is not None, "a batch without sentence labels for a model with a sentence task"
            scores = self.sentence_logits(first).float()
            sums[self.sentence_task] = F.cross_entropy(scores, sentence_labels, reduction="sum")
        return sums
