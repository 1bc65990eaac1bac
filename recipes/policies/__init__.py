"""Hugging Face models over several processes: policies, and the verbs that apply them.

A policy says where a model keeps the projections of its transformer layers. transformers is imported by the calls that need it.
"""

from .layers import AllReduceConv1D, AllReduceLinear
from .lookup import policies_for
from .parallelize import parallelize
from .policy import Description, Layer, Policy
from .shard import full_state_dict, shard
from .swap import revert, swap

__all__ = [
    "AllReduceConv1D",
    "AllReduceLinear",
    "Description",
    "Layer",
    "Policy",
    "full_state_dict",
    "parallelize",
    "policies_for",
    "revert",
    "shard",
    "swap",
]
