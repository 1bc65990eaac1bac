"""BERT: the model, its samples with their masks, and its recipe."""
