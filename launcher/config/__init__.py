"""The run config: its schema, its file, its checks, and the DeepSpeed JSON made of it."""
