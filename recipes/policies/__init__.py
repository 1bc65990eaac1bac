"""Hugging Face models over several processes: policies, and the verbs that apply them.

A policy says where a model keeps the projections of its transformer layers. transformers is imported by the calls that need it.
"""

from .catalog.layer import Description, Layer
from .catalog.lookup import policies_for
from .catalog.policy import Policy
from .layers import AllReduceConv1D, AllReduceLinear
from .parallelize import parallelize
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
