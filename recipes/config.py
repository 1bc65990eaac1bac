"""The sections of the run config that say what is trained: model, layer, tokenizer, data, objective.

They stand here, and not with the other sections in `launcher/config/schema.py`, because recipes read them and never import the
launcher. No torch import: reading a run config is quick.
"""

import os.path
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..kernels.ops.choices import Activation, Kernels, Norm

Fraction = Annotated[float, Field(ge=0, le=1)]
DropoutProbability = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
RotaryBase = Annotated[float, Field(ge=1)]
SentenceTask = Literal["nsp", "sop", "none"]
Masking = Literal["subword", "whole_word", "span"]
TokenizerKind = Literal["wordpiece", "bpe", "bytes"]
SpecialToken = Literal["pad", "unk", "cls", "sep", "mask", "eos"]


def from_home(path: str) -> str:
    """Return a path with its `~` replaced by the home folder. Raises ValueError if there is no such user."""
    expanded = os.path.expanduser(path)  # noqa: PTH111 - Path would turn "./a" into "a", and a hub's id is no path
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        remedy = f"write ./{path} for a folder named {user}"
        raise ValueError(f"a path below the home folder of a user of this machine; {remedy}")
    return expanded


PathText = Annotated[str, AfterValidator(from_home)]
"""A path as text, where `~` stands for the home folder; a relative one starts at the current folder."""


class Section(BaseModel):
    """A frozen part of the run config. Unknown keys are errors, numbers are finite, no type is converted but int to float."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    type: Literal["bert", "gpt"] = "bert"
    """Which recipe: a bidirectional encoder with masked-token objective, or a causal decoder."""
    hidden_size: PositiveInt = 768
    """Width of the vector of a token between the layers."""
    num_hidden_layers: PositiveInt = 12
    """Layers of the model, without the embedding and the head."""
    num_attention_heads: PositiveInt = 12
    """Attention heads of each layer; without head_dim they divide hidden_size equally."""
    num_key_value_heads: PositiveInt | None = None
    """Heads of the keys and values, each shared by equally many heads of queries; null is one for each."""
    head_dim: PositiveInt | None = None
    """Width of one attention head; null is hidden_size / num_attention_heads."""
    qk_norm: bool = False
    """RMSNorm of each head's query and key before attention, as in Qwen3."""
    intermediate_size: PositiveInt = 3072
    """Width of the feed-forward part of each layer; four times hidden_size in BERT and GPT-2."""
    hidden_act: Activation = "gelu"
    """GELU by the error function (BERT) or its tanh approximation (GPT-2), SiLU (Llama), or the square of ReLU."""
    gated_mlp: bool = False
    """Multiply the activation by a second projection of equal width: GeGLU with gelu (ModernBERT), SwiGLU with silu (Llama)."""
    hidden_dropout_prob: DropoutProbability = 0.1
    """Share of values dropped after the embedding and at the end of each half of a layer."""
    attention_probs_dropout_prob: DropoutProbability = 0.1
    """Share of the attention probabilities dropped."""
    max_position_embeddings: PositiveInt = 512
    """Longest sequence that the model can take, in tokens; data.max_seq_length is at most this."""
    position_embedding: Literal["learned", "rope"] = "learned"
    """How a token knows its place: a learned vector for each position, or queries and keys turned by an angle that grows with
    the position (rotary embedding, ModernBERT and Llama)."""
    rope_theta: RotaryBase = 10000.0
    """rope: base of the angles. A larger one turns slower, for longer sequences."""
    local_rope_theta: RotaryBase | None = None
    """rope: base of the angles in local layers; null is rope_theta."""
    sliding_window: Annotated[int, Field(ge=2)] | None = None
    """Local attention over so many tokens: GPT sees a token and sliding_window - 1 before it, BERT sliding_window // 2 to each
    side; null is attention over all."""
    global_attn_every_n_layers: PositiveInt | None = None
    """Every n-th layer from the first on sees all tokens, whatever sliding_window is; null makes all layers local."""
    pre_layer_norm: bool = True
    """A norm before each half of the layer and once after the last layer; false is the original, post-LN BERT."""
    norm: Norm = "layer_norm"
    """LayerNorm, or RMSNorm, which subtracts no mean (Llama)."""
    norm_bias: bool = True
    """Whether LayerNorms have a bias; RMSNorm has none."""
    attention_bias: bool = True
    """Whether the projections of attention have biases."""
    mlp_bias: bool = True
    """Whether the projections of the feed-forward part have biases, and the one before BERT's masked-token head."""
    layer_norm_eps: PositiveFloat = 1e-12
    """Added to the variance in LayerNorm, to the mean square in RMSNorm. Transformers has 1e-12 for BERT and 1e-5 for GPT-2."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the normal distribution that weights start from."""
    vocab_size: PositiveInt | Literal["auto"] = "auto"
    """Rows of the embedding; auto is the tokenizer's size, rounded up to a multiple of 64."""
    tie_word_embeddings: bool = True
    """Use the word embedding as the output projection too; false gives GPT an `lm_head` of its own."""
    init_from: PathText | None = None
    """A Hugging Face model to start a new run from, with its tokenizer: a folder, or an id of the hub. The keys above must
    describe it: docs/huggingface.md."""

    @property
    def head_size(self) -> int:
        """Return the width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Return the number of heads of the keys, and of the values."""
        return self.num_key_value_heads or self.num_attention_heads

    def is_local(self, layer: int) -> bool:
        """Return whether the layer of this number, from 0, has local attention."""
        every = self.global_attn_every_n_layers
        return self.sliding_window is not None and (every is None or layer % every != 0)


FREE_MODEL_KEYS = frozenset({"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"})
"""Settings of training that stand in the model's config but change no weight: a later run may set them anew."""


class LayerFlags(Section):
    kernels: Kernels = "auto"
    """auto: Triton for CUDA tensors, PyTorch elsewhere; reference: PyTorch everywhere, to bisect a bad loss."""
    stochastic_mode: bool = False
    """Allow results that differ from run to run where that is faster."""
    normalize_invertible: bool = False
    """Drop the input of LayerNorm and recover it from the output in backward."""
    gelu_checkpoint: bool = False
    """Drop the output of GELU and recompute it in backward."""
    attn_dropout_checkpoint: bool = False
    """Drop the attention probabilities after dropout and recompute them in backward."""
    unpad: bool = False
    """BERT: leave padding out once, before the embedding, and never put it back; samples of GPT have none."""
    cuda_graph: bool = False
    """On a GPU, capture forward and backward of all layers once and replay them: for micro-batches of few tokens."""


class TokenizerConfig(Section):
    type: Literal["auto", TokenizerKind] = "auto"
    """Which tokenizer to train when `path` is not given; auto is wordpiece for BERT and bpe for GPT. bytes trains nothing:
    every byte is a token."""
    path: PathText | None = None
    """A `tokenizer.json`, a folder that holds one, or a WordPiece `vocab.txt`."""
    vocab_size: PositiveInt = 8192
    """Size of the vocabulary to train; unused when `path` is given."""
    do_lower_case: bool = True
    """Lower-case text before WordPiece; unused by bpe and bytes, as the two keys below."""
    strip_accents: bool | None = None
    """Strip accents before WordPiece; null strips them where text is lower-cased."""
    tokenize_chinese_chars: bool = True
    """Take each Chinese character for a word of its own before WordPiece."""


class SourceConfig(Section):
    kind: Literal["builtin", "text", "jsonl", "parquet", "hf"]
    """builtin is the English documentation inside the Python interpreter; hf is a dataset of the Hugging Face hub or a local
    dataset folder."""
    path: PathText | None = None
    """A file, folder or glob (text, jsonl, parquet), or a dataset name or folder (hf); not for builtin."""
    text_field: str = "text"
    """The column or JSON key that holds the text of one document."""
    documents: Literal["auto", "line", "file"] = "auto"
    """What one document of a text source is: auto ends it at a blank line, or where the next article begins in a file with
    titles as in WikiText; line takes each line, file each file whole, as for books."""
    subset: str | None = None
    """The configuration of an hf dataset, such as `20231101.en`."""
    split: str = "train"
    """The split of an hf dataset."""
    streaming: bool = False
    """Read an hf dataset without storing it whole first."""
    weight: PositiveFloat | None = None
    """Share of the samples drawn from this source, relative to the other weights; give it to all sources, or to none to draw
    from each in proportion to its size."""


one_or_list = BeforeValidator(
    lambda value: [value] if isinstance(value, dict) else value,
    json_schema_input_type=SourceConfig | Annotated[list[SourceConfig], Field(min_length=1)],
)


class DataConfig(Section):
    sources: Annotated[list[SourceConfig], Field(min_length=1), one_or_list] = [SourceConfig(kind="builtin")]
    """The text to train on."""
    validation: Annotated[list[SourceConfig], one_or_list] | None = None
    """Held-out text; not together with validation_fraction."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the documents of `sources` to hold out, chosen by their content."""
    max_seq_length: Annotated[int, Field(ge=8)] = 128
    """Tokens in one sample, special ones included."""
    short_seq_prob: Fraction = 0.1
    """BERT: share of the samples cut to a random shorter length."""
    packing: Literal["none", "best_fit"] = "none"
    """BERT without a sentence task: best_fit fills each sequence with whole samples, which do not see each other, in place of
    padding."""
    cache_dir: PathText | None = None
    """Where prepared data is kept; default $XDG_CACHE_HOME/xformer-train, else ~/.cache/xformer-train."""


class ObjectiveConfig(Section):
    type: Literal["mlm", "clm"] = "mlm"
    """Masked-token prediction (BERT) or next-token prediction (GPT)."""
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens to predict (BERT)."""
    masking: Masking = "subword"
    """What is masked together: single tokens, all tokens of a word, or spans of several words (BERT)."""
    sentence_task: SentenceTask = "nsp"
    """Next-sentence prediction, sentence-order prediction, or none (BERT). With clm the default is none, and nothing else
    fits."""
    max_predictions_per_seq: PositiveInt | None = None
    """Most positions to predict in one sample; default mlm_probability times max_seq_length, rounded up."""

    @model_validator(mode="before")
    @classmethod
    def _no_sentence_task_without_pairs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") == "clm":
            return {"sentence_task": "none", **values}
        return values


@dataclass(frozen=True)
class Fault:
    """One broken rule: the keys it read, the first being the one to blame, and the sentence for the user."""

    keys: tuple[str, ...]
    text: str


ConfigCheck = Callable[[ModelConfig, LayerFlags, DataConfig, ObjectiveConfig], Iterator[Fault]]
"""Yields every rule of one model that these sections break."""


def objective_faults(model: ModelConfig, objective: ObjectiveConfig, wanted: str) -> Iterator[Fault]:
    """Yield what is wrong with an objective that must have the type `wanted`."""
    if objective.type != wanted:
        text = f"got {objective.type!r}, but model.type {model.type} needs {wanted!r}"
        yield Fault(("objective.type", "model.type"), text)
    elif objective.type == "clm" and objective.sentence_task != "none":
        text = f"got {objective.sentence_task!r}, but objective.type clm has no sentence pairs; set none"
        yield Fault(("objective.sentence_task", "objective.type"), text)
