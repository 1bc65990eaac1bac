"""File permissions that hold for the superuser too."""

import ctypes
import os
from contextlib import contextmanager

import pytest

_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2


@contextmanager
def bound_by_permissions():
    """The superuser reads and writes where permissions forbid it, unless this thread gives that up for a while."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of two words
    if libc.capget(header, sets):
        pytest.skip("this system has no capabilities")
    before = sets[0]
    sets[0] &= ~(_CAP_DAC_OVERRIDE | _CAP_DAC_READ_SEARCH)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(header, sets)
