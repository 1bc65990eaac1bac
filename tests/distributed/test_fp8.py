"""Delayed scaling over several processes."""

import numpy as np
from distributed.workers.fp8 import reduction_worker
from helpers.spawn import run_processes


def test_amaxes_are_reduced_over_the_group():
    """The first layer's input is NaN in one process: then neither process may change that scale."""
    first, second = run_processes(reduction_worker, 2)
    both = [[1, 448 / 1.5, 57344 / 4], [448 / 8, 448 / 1.5, 57344 / 4]]
    mine = [[448 / 4, 448 / 0.5, 57344 / 4], [448 / 2, 448 / 0.5, 57344 / 4]]
    other = [[1, 448 / 1.5, 57344], [448 / 8, 448 / 1.5, 57344]]
    assert np.allclose(first, [both, mine, mine], rtol=1e-6)
    assert np.allclose(second, [both, other, other], rtol=1e-6)
