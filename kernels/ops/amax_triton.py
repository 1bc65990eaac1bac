"""The largest magnitude of a tensor, by the kernels that write it. Magnitudes are compared as integers, to keep NaN."""

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x):
    """Return the bits of |x|, x fp32, as int32: they compare as magnitudes do, with NaN above infinity."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def raise_amax(amax_ptr, bits):
    """Set amax to max(amax, the number of these bits)."""
    tl.atomic_max(amax_ptr.to(tl.pointer_type(tl.int32)), bits, sem="relaxed")
