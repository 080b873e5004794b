"""How a weight matrix is cut into slots of the shared-memory ring. Mirrors the shapes of tasks/linear*.cuh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import Unsupported
from ..ir.expr import reductions
from ..ir.graph import Linear
from ..ir.types import Buffer

SLOT_BYTES = 16384
"""Bytes of one copy at most: large copies stream at the full rate with few in flight (3 to 4 slots suffice)."""

CHUNK = 2048
"""Columns of x that the tensor-core body holds in registers at a time: row pieces of 4 KiB, which stream at the full
rate. Of a prologue that reduces over rows it holds whole rows."""

TILE_ROWS = 8
CONSUMER_WARPS = 8


@dataclass(frozen=True)
class Geometry:
    """copy_bytes: of one copy. slot_bytes: shared memory a slot needs. slot_rows: for tensor cores (0: not), the rows
    of a slot. chunk: their columns. block_rows: rows of one run where rows are cut into chunks; 0: a run is a
    segment."""

    copy_bytes: int
    slot_bytes: int
    slot_rows: int = 0
    chunk: int = 0
    block_rows: int = 0


def linear_geometry(node: Linear, buffers: Mapping[str, Buffer]) -> Geometry:
    """The slots of a Linear: none when its weights are transposed. Raises Unsupported when rows are not whole 16-byte
    vectors."""
    k, dtype = node.k.size, buffers[node.parts[0].weights[0]].dtype
    row_bytes = k * dtype.itemsize
    if row_bytes % 16:
        raise Unsupported(
            f"a weight row of {k} {dtype.value} elements is not a multiple of 16 bytes",
            origin=node.origin,
            remedy="the part runs in the fallback",
        )
    if node.transposed:
        return Geometry(0, 0)
    joint = max(len(p.weights) for p in node.parts)
    if node.t.size > 1 and dtype.is_narrow_float and joint <= 2:
        chunk = k if reductions(node.x) else min(k, CHUNK)
        piece, rows = chunk * dtype.itemsize, TILE_ROWS
        while rows * piece > SLOT_BYTES:
            rows //= 2
        return Geometry(piece, rows * piece, rows, chunk, 8 // joint * TILE_ROWS if chunk < k else 0)
    vectors = row_bytes // 16
    if row_bytes <= SLOT_BYTES:
        warps = 8 if vectors > 128 else 4 if vectors > 64 else 2 if vectors > 32 else 1
        rows = min(SLOT_BYTES // row_bytes, 8 * CONSUMER_WARPS // warps)
        return Geometry(rows * row_bytes, rows * row_bytes)
    pieces = -(-row_bytes // SLOT_BYTES)
    while vectors % pieces:
        pieces += 1
    return Geometry(row_bytes // pieces, row_bytes // pieces)
