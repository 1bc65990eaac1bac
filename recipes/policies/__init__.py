"""Hugging Face models over several processes: policies, and the verbs that apply them.

A policy says where a model keeps the projections of its transformer layers. transformers is imported by the calls that need it.
"""

from .layers import AllReduceConv1D, AllReduceLinear
from .lookup import policies_for
from .policy import Description, Layer, Policy

__all__ = ["AllReduceConv1D", "AllReduceLinear", "Description", "Layer", "Policy", "policies_for"]
