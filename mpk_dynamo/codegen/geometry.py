"""How a weight matrix is cut into slots of the shared-memory ring. Mirrors the shapes of tasks/linear*.cuh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from ..errors import Unsupported
from ..ir.expr import reductions
from ..ir.graph import Graph, Linear
from ..ir.types import Buffer

SLOT_BYTES = 16384
"""Bytes of one copy at most: large copies stream at the full rate with few in flight."""

LONG_SLOT_BYTES = 24576
"""The same for one token, in a program with rows that are longer than SLOT_BYTES: such a row fits whole."""

MMA_SLOT_BYTES = 32768
"""The same on tensor cores: a tile is 8 rows."""

CHUNK = 2048
"""Columns of x that the tensor-core body holds in registers; longer rows come in pieces. With pieces of 1024 the thread
that issues them is too slow (docs/benchmarks.md). Of a prologue that reduces over rows it holds whole rows."""

LONGEST_CHUNK = 3072
"""The same where only so are all pieces of a row of one length: an uneven last one costs more."""

GROUP = 64 * 8
"""Columns of which each consumer warp has 64."""

IN_FLIGHT_BYTES = 65536
"""What a worker's loader keeps under way: polls and stores queue behind it."""

SUM_BYTES = 16384
"""Shared memory for sums of rows of the tensor-core body. With more, fewer slots fit (docs/benchmarks.md)."""

LONG_SUM_BYTES = 32768
"""The same for more than 8 tokens where x comes in pieces, since each block of rows fetches all of x again."""

LONG_ROWS = 4096
"""Rows of a Linear of which the workers of a large GPU have no more than one block in SUM_BYTES."""

TILE_ROWS = 8
TILE_TOKENS = 8
"""Tokens whose sums the tensor-core body has together; it takes one or two times as many."""

CONSUMER_WARPS = 8
LANE_ROWS = 8
"""Rows of a slot that a warp takes, at most."""


@dataclass(frozen=True)
class Geometry:
    """body: the task body. copy_bytes: of one copy. slot_bytes: shared memory a slot needs. warps: that share a row
    (not on tensor cores). slot_rows: for linear_mma (0: others), the rows of a slot. chunk: their columns.
    tiles: of 8 rows, whose sums are kept at a time. block_rows: rows of one run where rows are cut into chunks; 0: a
    run is a segment."""

    body: str
    copy_bytes: int
    slot_bytes: int
    warps: int = CONSUMER_WARPS
    slot_rows: int = 0
    chunk: int = 0
    tiles: int = 0
    block_rows: int = 0


def token_slot_bytes(graph: Graph) -> int:
    """Bytes of one copy at most, of the Linears of one token."""
    linears = (n for n in graph.nodes if isinstance(n, Linear) and n.t.size == 1 and not n.transposed)
    rows = [row_bytes(n, graph.buffers) for n in linears]
    return SLOT_BYTES if max(rows, default=0) <= SLOT_BYTES else LONG_SLOT_BYTES


def row_bytes(node: Linear, buffers: Mapping[str, Buffer]) -> int:
    """Bytes of a row of the weights."""
    return node.k.size * buffers[node.parts[0].weights[0]].dtype.itemsize


def flight(graph: Graph, most: int) -> int:
    """Ring slots that hold IN_FLIGHT_BYTES on average over what is streamed. most: as for `linear_geometry`."""
    streamed, copies = 0, 0
    for node in graph.nodes:
        if isinstance(node, Linear) and (size := linear_geometry(node, graph.buffers, most).slot_bytes):
            weights = sum(graph.buffers[w].nbytes for part in node.parts for w in part.weights)
            streamed, copies = streamed + weights, copies + -(-weights // size)
    return max(1, round(IN_FLIGHT_BYTES * copies / streamed)) if streamed else 1


def linear_geometry(node: Linear, buffers: Mapping[str, Buffer], most: int = SLOT_BYTES) -> Geometry:
    """The slots of a Linear, none when its weights are transposed. most: `token_slot_bytes` of its graph. Raises
    Unsupported when rows are not whole 16-byte vectors."""
    k, dtype, row = node.k.size, buffers[node.parts[0].weights[0]].dtype, row_bytes(node, buffers)
    if row % 16:
        raise Unsupported(
            f"a weight row of {k} {dtype.value} elements is not a multiple of 16 bytes",
            origin=node.origin,
            remedy="the part runs in the fallback",
        )
    if node.transposed:
        return Geometry("linear_columns", 0, 0)
    joint = max(len(p.weights) for p in node.parts)
    if node.t.size > 1 and dtype.is_narrow_float and joint <= 2:
        chunk = k if reductions(node.x) else _chunk(k)
        piece, rows = chunk * dtype.itemsize, TILE_ROWS
        while rows > 1 and rows * piece > MMA_SLOT_BYTES:
            rows //= 2
        halves = -(-node.t.size // TILE_TOKENS)
        several = chunk < k and sum(p.rows for p in node.parts) > LONG_ROWS
        room = LONG_SUM_BYTES if several and halves == 2 else SUM_BYTES
        tiles = room // (CONSUMER_WARPS * TILE_ROWS * TILE_TOKENS * 4 * halves * joint)
        blocks = tiles * TILE_ROWS if chunk < k else 0
        return Geometry("linear_mma", piece, rows * piece, CONSUMER_WARPS, rows, chunk, tiles, blocks)
    vectors = row // 16
    body, share = ("linear_token", _tiles) if node.t.size == 1 else ("linear", _shared_out)
    most = most if node.t.size == 1 else SLOT_BYTES
    if row <= most:
        rows, warps = share(vectors, most // row)
        return Geometry(body, rows * row, rows * row, warps)
    pieces = -(-row // most)
    while vectors % pieces:
        pieces += 1
    return Geometry(body, row // pieces, row // pieces)


def _chunk(k: int) -> int:
    """Columns of a piece of a row: all pieces whole groups and of one length where that can be."""
    fewest, most = -(-k // LONGEST_CHUNK), -(-k // CHUNK)
    even = (k // pieces for pieces in range(most, fewest - 1, -1) if k % (pieces * GROUP) == 0)
    return next(even, k if k <= LONGEST_CHUNK else CHUNK)


def _tiles(vectors: int, most: int) -> tuple[int, int]:
    """As _shared_out, for linear_token, which takes 8 rows at a time or segments of fewer: the fewest vectors of a lane
    per row, a slot costing as much as three."""

    def of_lane(rows: int, warps: int) -> int:
        tile = next(r for r in (1, 2, 4, 8) if r >= min(rows, 8))
        units = -(-vectors // (4 * max(8 // tile, 2) * warps))
        return units * (2 if tile == 8 else 1) * -(-rows // (8 * (CONSUMER_WARPS // warps)))

    most = min(most, 32 * CONSUMER_WARPS)  # a thread sums up a row
    choices = [(rows, warps) for warps in (8, 4, 2, 1) for rows in range(most, 0, -1)]
    return min(choices, key=lambda c: Fraction(of_lane(*c) + 3, c[0]))


def _shared_out(vectors: int, most: int) -> tuple[int, int]:
    """Rows of a slot, and warps that share a row, so that a slot's vectors of 16 bytes fall evenly on all lanes: the
    least cost per row, a slot costing as much as two vectors."""

    def cost(rows: int, warps: int) -> Fraction | None:
        of_group, of_lane = -(-rows // (CONSUMER_WARPS // warps)), -(-vectors // (32 * warps))
        if of_group > LANE_ROWS:
            return None
        return Fraction(of_group * of_lane + 2, rows)

    choices = [(rows, warps) for warps in (8, 4, 2, 1) for rows in range(most, 0, -1)]
    return min((c for c in choices if cost(*c) is not None), key=lambda c: cost(*c) or 0)
