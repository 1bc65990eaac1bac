"""The optimizers, their schedule, and the DeepSpeed engine that steps them."""
