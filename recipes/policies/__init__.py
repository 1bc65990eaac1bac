"""Hugging Face models over several processes: policies, and the verbs that apply them.

A policy says where a model keeps the projections of its transformer layers. transformers is imported by the calls that need it.
"""

from .catalog.layer import Description, Layer
from .catalog.lookup import policies_for
from .catalog.policy import Policy
from .sharding.modules import AllReduceConv1D, AllReduceLinear
from .sharding.parallelize import parallelize
from .sharding.shard import shard
from .state import full_state_dict
from .swapping.swap import revert, swap

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
