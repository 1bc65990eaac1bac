"""The feed-forward half of a layer."""
