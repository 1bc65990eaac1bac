"""Dropout of attention probabilities on the GPU: four decisions, 16 bits each, from one Philox 2x32 call.

A call decides on two queries and two keys, eight apart each. In the result layout of a matrix product one thread holds all
four, whether the tile is (queries, keys) or (keys, queries), so nothing moves between threads and no decision is drawn in vain.
Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); 7 rounds pass its test batteries.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dropout_key(seed_ptr, site, stream):
    """Return the key of `philox_2x32` and a salt, uint32, for one head of one sequence; 0 and 0 where seed_ptr is None.

    seed_ptr: () int64; site: of the dropout in its layer; stream: sequence * N + head.
    """
    key = 0
    salt = 0
    if seed_ptr is not None:
        stream = stream.to(tl.uint32)
        key, salt, _, _ = tl.philox(tl.load(seed_ptr), stream, site.to(tl.uint32), stream * 0, stream * 0, 7)
    return key, salt


@triton.jit
def philox_2x32(c0, c1, key):
    """Return two random words for each counter (c0, c1); all uint32."""
    for _ in tl.static_range(7):
        high, low = _wide_product(c0)
        c0 = high ^ key ^ c1
        c1 = low
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
    return c0, c1


@triton.jit
def _wide_product(c0):
    """Return the high and the low word of c0 times Philox's multiplier: one instruction, which Triton cannot name."""
    if _INTERPRETED:  # it knows no assembly
        high = tl.umulhi(c0, 0xD256D193)
        low = tl.mul(c0, 0xD256D193, sanitize_overflow=False)
    else:
        high, low = tl.inline_asm_elementwise(
            "{.reg .b64 t; mul.wide.u32 t, $2, 0xD256D193; mov.b64 {$1, $0}, t;}",
            "=r,=r,r",
            [c0],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    return high, low


@triton.jit
def drop(p, key, salt, query_start, key_start, threshold):
    """Return p (Q, K) with the dropped elements 0; query_start, key_start, Q and K are multiples of 16.

    key, salt: of `dropout_key`. With a = query // 16 * 8 + query % 8 and b = key // 16 * 8 + key % 8 the counter is
    (b, a ^ salt); bit 3 of the query chooses the word, bit 3 of the key its half (0 = low). An element stays if its half is
    not below threshold. So decisions depend on neither tile shape nor memory layout.
    """
    Q: tl.constexpr = p.shape[0]
    K: tl.constexpr = p.shape[1]
    r0, r1 = _draw(tl.arange(0, Q // 2)[:, None], tl.arange(0, K // 2)[None, :], key, salt, query_start, key_start)
    p = tl.permute(tl.reshape(p, (Q // 16, 2, 8, K // 16, 2, 8)), (0, 2, 3, 5, 1, 4))
    p = _keep(tl.reshape(p, (Q // 2, K // 2, 2, 2)), r0, r1, threshold)
    return tl.reshape(tl.permute(tl.reshape(p, (Q // 16, 8, K // 16, 8, 2, 2)), (0, 4, 1, 2, 5, 3)), (Q, K))


@triton.jit
def drop_transposed(p, key, salt, query_start, key_start, threshold):
    """Return what `drop` does, for p (K, Q)."""
    K: tl.constexpr = p.shape[0]
    Q: tl.constexpr = p.shape[1]
    r0, r1 = _draw(tl.arange(0, Q // 2)[None, :], tl.arange(0, K // 2)[:, None], key, salt, query_start, key_start)
    p = tl.permute(tl.reshape(p, (K // 16, 2, 8, Q // 16, 2, 8)), (0, 2, 3, 5, 4, 1))
    p = _keep(tl.reshape(p, (K // 2, Q // 2, 2, 2)), r0, r1, threshold)
    return tl.reshape(tl.permute(tl.reshape(p, (K // 16, 8, Q // 16, 8, 2, 2)), (0, 5, 1, 2, 4, 3)), (K, Q))


@triton.jit
def _draw(a, b, key, salt, query_start, key_start):
    """Return two random words for each pair of a and b, which count from the tile's start."""
    a = (query_start // 2 + a).to(tl.uint32) ^ salt
    b = (key_start // 2 + b).to(tl.uint32)
    b, a = tl.broadcast(b, a)
    return philox_2x32(b, a, key)


@triton.jit
def _keep(p, r0, r1, threshold):
    """Return p (..., 2, 2), by the query's bit and the key's, with zeros where the half word falls below the threshold.

    Whole words are compared: the high half with the low one after it, and the low half shifted up.
    """
    least = threshold.to(tl.uint32) << 16
    # 0, which the compiler does not know: it would pack pairs of 16 bits before it selects a known one, and unpack them again
    zero = (threshold >> 16).to(tl.float32)
    p_low, p_high = tl.split(p)
    p0, p1 = tl.split(p_low)
    low = tl.join(tl.where((r0 << 16) >= least, p0, zero), tl.where((r1 << 16) >= least, p1, zero))
    p0, p1 = tl.split(p_high)
    high = tl.join(tl.where(r0 >= least, p0, zero), tl.where(r1 >= least, p1, zero))
    return tl.join(low, high)
