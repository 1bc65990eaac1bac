"""Name the modules of transformers' BertLayer that the modules of a post-LN `TransformerLayer` are made of. No torch import."""

BERT_LAYER = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_output": ("attention.output.dense",),
    "intermediate": ("intermediate.dense",),
    "output": ("output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "mlp_norm": ("output.LayerNorm",),
}
"""Paths below the layer; several are parts of one fused projection, in this order along dim 0."""
