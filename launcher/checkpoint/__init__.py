"""Save, find, verify, load and reshard checkpoints."""
