"""The tiles of the GPU kernels of attention: fixed numbers by device and size, never measured while something runs.

A better row for a device is one line here. scripts/bench/count_instructions.py shows what a tile costs without a device.
"""

import math
from typing import NamedTuple


class Tile(NamedTuple):
    """What one program computes, queries x keys, and what it may take.

    stages: of the pipeline of loads. registers: at most so many per thread; None: as the compiler likes.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """Return Triton's options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class Tiles(NamedTuple):
    """The tiles of the kernels for one kind of input.

    queries: of the kernel for dQ; None: no such kernel runs, and the one for dK and dV, with all keys of a sequence in one
    program, makes dQ too.
    """

    forward: Tile
    queries: Tile | None
    keys: Tile


# By bits of the dtype and compute capability, then by widest head and longest sequence; the first row that fits is taken.
# Other devices take the rows of 80. No tile spills registers, except those of fp32 with heads over 64, where every tile does,
# and on 80 that of dQ in fp32 with dropout for packed batches.
# The limits on registers let one more program onto an SM; the forward kernel does not fit into them in fp16 and fp32, under
# segment_ids or a window, nor where it turns keys that a mask by token hides.
_TABLE = {
    (16, 80): {
        (64, 64): Tiles(Tile(64, 64, 4, 1), None, Tile(16, 64, 4, 2)),
        (64, 128): Tiles(Tile(128, 64, 8, 3), None, Tile(16, 128, 8, 2)),
        (64, math.inf): Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 4, 2, 168), Tile(32, 64, 4, 2)),
        (128, math.inf): Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(16, 128, 8, 2)),
    },
    (16, 90): {  # it multiplies from shared memory, and so has registers left for larger tiles
        (64, 64): Tiles(Tile(64, 64, 4, 3), None, Tile(32, 64, 4, 1)),
        (64, 128): Tiles(Tile(128, 64, 8, 3, 128), None, Tile(32, 128, 8, 2)),
        (64, math.inf): Tiles(Tile(128, 64, 8, 3, 128), Tile(64, 32, 4, 2, 128), Tile(32, 64, 4, 2)),
        (128, math.inf): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    },
    (32, 80): {
        (64, math.inf): Tiles(Tile(64, 16, 4, 2), Tile(32, 16, 2, 1), Tile(16, 32, 4, 2)),
        (128, math.inf): Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    },
    (32, 90): {
        (64, math.inf): Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(16, 64, 4, 1)),
        (128, math.inf): Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    },
}
# Rows that are others without dropout, which needs no limits on registers and leaves some for more queries.
_WITHOUT_DROPOUT = {
    (16, 80): {(64, math.inf): Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))},
    (16, 90): {
        (64, 128): Tiles(Tile(128, 64, 8, 3), None, Tile(64, 128, 8, 2)),
        (64, math.inf): Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    },
    (32, 80): {(64, math.inf): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2))},
}
# What is another in these rows where queries and keys are turned by their places, which takes registers.
_TURNED = {
    (16, 80): {
        (64, math.inf): {
            "forward": Tile(128, 64, 8, 2),
            "queries": Tile(64, 32, 4, 2),
            "keys": Tile(16, 64, 4, 1),
        },
        (128, math.inf): {"forward": Tile(128, 32, 8, 2), "keys": Tile(16, 128, 8, 1)},
    },
    (16, 90): {
        (64, 128): {"forward": Tile(128, 64, 8, 2, 128), "keys": Tile(32, 128, 8, 1)},
        (64, math.inf): {"forward": Tile(128, 64, 8, 2, 128), "queries": Tile(64, 32, 4, 2)},
        (128, math.inf): {"keys": Tile(16, 128, 8, 1)},
    },
    (32, 80): {(64, math.inf): {"keys": Tile(16, 32, 4, 1)}},
}


def tiles_for(
    capability: int, bits: int, head_dim: int, length: int, drops: bool, limited: bool, turned: bool = False
) -> Tiles:
    """Return the tiles for heads of head_dim columns, up to 128, and sequences of up to `length` tokens.

    capability: of the device, times ten; bits: of the dtype; drops: whether there is dropout; limited: whether the forward
    kernel fits into the table's limit on registers; turned: whether there is a rotary table.
    """
    device = (bits, capability if (bits, capability) in _TABLE else 80)
    rows = _TABLE[device] if drops else _TABLE[device] | _WITHOUT_DROPOUT.get(device, {})
    row = next((widest, longest) for widest, longest in rows if head_dim <= widest and length <= longest)
    tiles = rows[row]
    if turned:
        tiles = tiles._replace(**_TURNED.get(device, {}).get(row, {}))
    return tiles if limited else tiles._replace(forward=tiles.forward._replace(registers=None))
