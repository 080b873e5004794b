"""How a weight matrix is cut into slots of the shared-memory ring. Mirrors the shapes of tasks/linear*.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Unsupported
from ..ir.types import DType

SLOT_BYTES = 16384
"""Bytes of one copy at most: large copies stream at the full rate with few in flight (3 to 4 slots suffice)."""

MMA_CHUNK = 1024
"""Columns of a tile on tensor cores: 2 KiB row pieces."""

TILE_ROWS, TILE_PAD = 8, 64
CONSUMER_WARPS = 8


@dataclass(frozen=True)
class Geometry:
    """tiled: slots of 8 row pieces for tensor cores, else contiguous copies. copy_bytes: of one copy.
    slot_bytes: shared memory a slot needs. block_rows: rows of one run (tiled) or 0 (a run is a segment)."""

    tiled: bool
    copy_bytes: int
    slot_bytes: int
    block_rows: int = 0


def linear_geometry(k: int, tokens: int, dtype: DType, joint: int, origin: str = "") -> Geometry:
    """The slots of a Linear with depth k.

    Raises Unsupported when rows are not whole 16-byte vectors.
    """
    row_bytes = k * dtype.itemsize
    if row_bytes % 16:
        raise Unsupported(
            f"a weight row of {k} {dtype.value} elements is not a multiple of 16 bytes",
            origin=origin,
            remedy="the part runs in the fallback",
        )
    if tokens > 1 and dtype.is_narrow_float and joint in (1, 2, 4):
        columns = min(k, MMA_CHUNK)
        return Geometry(True, columns * 2, TILE_ROWS * (columns * 2 + TILE_PAD), 8 // joint * TILE_ROWS)
    vectors = row_bytes // 16
    if row_bytes <= SLOT_BYTES:
        warps = 8 if vectors > 128 else 4 if vectors > 64 else 2 if vectors > 32 else 1
        rows = min(SLOT_BYTES // row_bytes, 8 * CONSUMER_WARPS // warps)
        return Geometry(False, rows * row_bytes, rows * row_bytes)
    pieces = -(-row_bytes // SLOT_BYTES)
    while vectors % pieces:
        pieces += 1
    return Geometry(False, row_bytes // pieces, row_bytes // pieces)
