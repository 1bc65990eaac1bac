"""From sources of text to batches, knowing no model."""
