"""Residual sum, dropout and LayerNorm in one pass."""
