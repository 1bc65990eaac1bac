"""Functions that are computed again in backward in place of keeping what they computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..ops.region import in_regions, open_regions
from ..ops.replay import Replay


class Recomputed:
    """A function whose first call is the first pass and whose later calls, in backward, compute the same again.

    Later calls run in the fp8_autocast regions of the first, with the recipe and scales that each FP8 product had there,
    whatever ran in between. No amax enters a history twice. The caller restores random generators and torch.autocast.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._replay = Replay()
        self._regions = open_regions()
        self._started = False

    def __call__(self, *args: Any) -> Any:
        if self._started:
            return self._again(*args)
        self._started = True
        return self._first(*args)

    def _first(self, *args: Any) -> Any:
        with self._replay.first():
            return self._function(*args)

    def _again(self, *args: Any) -> Any:
        with in_regions(self._regions), self._replay.again():
            return self._function(*args)


def recompute_in_backward(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), keeping args alone for backward.

    The function draws no random numbers: dropout's seeds are among args.
    """
    # a trace has no first pass: what it holds is values of the graph
    call = function if torch.compiler.is_compiling() else Recomputed(function)
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)
