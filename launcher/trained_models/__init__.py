"""Models in and out: from Hugging Face, from checkpoints, exported, sampled."""
