"""GPT: the model, its samples and its recipe."""
