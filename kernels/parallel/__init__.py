"""Collectives of tensor and sequence parallelism, and the shards they work on."""
