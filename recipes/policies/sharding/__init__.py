"""Divide a Hugging Face model over processes, by its policy."""
