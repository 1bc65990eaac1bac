"""Dropout decisions on the GPU: eight of them, 16 bits each, from one Philox call.

One call per element would cost more instructions than the LayerNorm that it is fused into; one per eight costs a fifth.
Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); 7 rounds pass its test batteries.
"""

import triton
import triton.language as tl

# Kernels take seeds by this name, at any alignment: those of a stack's layers lie eight bytes apart, and Triton would compile a
# second variant of every kernel for each other layer.
SEED = ["seed_ptr"]


@triton.jit
def keep_rows(seed, site, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, threshold):
    """Return which elements of the given rows stay, bool (ROWS, COLUMNS).

    seed: int64, the Philox key; rows: (ROWS,) int64, row numbers in the whole tensor; COLUMNS: a multiple of 8.
    Counter: (column // 8, row's low word, row's high word, site). Column 8 g + 2 w + h takes half h (0 = low) of word w,
    and stays if that is not below threshold. So a decision depends on seed, site, row and column, never on tile shape.
    """
    group = tl.arange(0, COLUMNS // 8)[None, :].to(tl.uint32)  # (1, COLUMNS / 8)
    c0 = group + tl.zeros((ROWS, 1), tl.uint32)
    c1 = tl.zeros_like(c0) + (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c2 = tl.zeros_like(c0) + (rows >> 32).to(tl.uint32)[:, None]
    c3 = tl.zeros_like(c0) + site.to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3, 7)
    # tl.join puts its two tensors side by side in a new last dim, which the reshape makes the fastest-running one.
    low = tl.join(tl.join(r0 & 0xFFFF, r2 & 0xFFFF), tl.join(r1 & 0xFFFF, r3 & 0xFFFF))
    high = tl.join(tl.join(r0 >> 16, r2 >> 16), tl.join(r1 >> 16, r3 >> 16))
    bits = tl.join(low, high)  # (ROWS, COLUMNS / 8, 2, 2, 2)
    return tl.reshape(bits, (ROWS, COLUMNS)).to(tl.int32) >= threshold
