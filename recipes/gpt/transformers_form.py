"""GPT in transformers: GPT-2."""

from ..shared.transformers_form import Architecture, TransformersForm

_NOTE = """\
In training, documents were packed into rows, each token saw its own document alone, and positions began at 0 in each document.
The exported model reads its input as one document.

The tokenizer pads on the left with the end-of-document token, as `generate` needs it for a batch. For fine-tuning set
`tokenizer.padding_side = "right"`, so that positions begin at 0.
"""
_GPT2 = Architecture(
    model_type="gpt2",
    recipe="gpt",
    pre_layer_norm=True,
    base="transformer",
    layers="h",
    body={"word_embeddings": "wte", "position_embeddings": "wpe", "final_norm": "ln_f"},
    layer={
        "attention_norm": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "attention_output": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "intermediate": ("mlp.c_fc",),
        "output": ("mlp.c_proj",),
    },
    heads={},
    bias=(),
    keys={
        "hidden_size": ("n_embd", 768),
        "num_hidden_layers": ("n_layer", 12),
        "num_attention_heads": ("n_head", 12),
        "intermediate_size": ("n_inner", None),
        "hidden_act": ("activation_function", "gelu_new"),
        "max_position_embeddings": ("n_positions", 1024),
        "layer_norm_eps": ("layer_norm_epsilon", 1e-5),
        "hidden_dropout_prob": ("resid_pdrop", 0.1),
        "attention_probs_dropout_prob": ("attn_pdrop", 0.1),
        "initializer_range": ("initializer_range", 0.02),
    },
    features={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    symbols={"bos_token_id": "eos", "eos_token_id": "eos", "pad_token_id": "eos"},
    copies={"embd_pdrop": "hidden_dropout_prob"},
    ignored=("lm_head.weight", ".attn.bias", ".attn.masked_bias"),  # of layers: the causal mask, in old checkpoints
    classes=("GPT2LMHeadModel",),
    transposed=True,
)


GPT_IN_TRANSFORMERS = TransformersForm(
    architectures=(_GPT2,),
    written_as=lambda _: _GPT2,
    inputs=("input_ids", "attention_mask"),  # GPT-2 would add embeddings for token types
    generation={"bos_token_id": "eos", "eos_token_id": "eos", "pad_token_id": "eos"},
    padding_side="left",  # so that all texts of a batch go on at its end
    post_processor=lambda _: None,
    pipeline_tag="text-generation",
    auto_class="AutoModelForCausalLM",
    objective=lambda _: "next token",
    notes=lambda *_: [_NOTE],
)
