"""RowMap: fused pointwise, gather, row-reduction and scatter computations.

Task kind `row_map`, tile = (start, stop): a range of flattened rows. A row is one point of the first
`row_dims(node)` dims; the remaining dims run in full. Everything a task reads is read before anything is stored,
because a node that shifts a tensor in place overwrites what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..ir.expr import Var, loads, reductions
from ..ir.graph import Graph, RowMap
from ..ir.region import Access
from ..ir.types import Buffer
from .access import access_bytes, arithmetic, flat_range_boxes, gathered_bytes, read_accesses, write_accesses
from .evaluate import Assignment, compile_assignment, evaluate
from .spec import Memory, TileSpec, Tiling

MIN_ELEMENTS = 256
"""Elements computed by a task, at least: below that an event costs more than the arithmetic."""


def row_dims(node: RowMap) -> int:
    """Number of leading dims that make up a row index: the shortest prefix of `dims` that covers the free variables
    of every reduction, so that a row computes its reductions once; all dims when there is none."""
    reduced = reductions(node.body)
    if not reduced:
        return len(node.dims)
    needed = frozenset().union(*(r.free for r in reduced))
    return max((i + 1 for i, v in enumerate(node.dims) if v in needed), default=0)


def row_ranges(node: RowMap, start: int, stop: int) -> list[dict[Var, tuple[int, int]]]:
    """Ranges of all dims, one mapping per box, that rows [start, stop) cover."""
    n = row_dims(node)
    rest = {v: (0, v.size) for v in node.dims[n:]}
    boxes = flat_range_boxes(tuple(v.size for v in node.dims[:n]), start, stop)
    return [{**dict(zip(node.dims[:n], box, strict=True)), **rest} for box in boxes]


def shifts_in_place(node: RowMap, buffers: Mapping[str, Buffer]) -> bool:
    """Whether the node reads memory that another of its elements overwrites. It must then be one task."""
    storage = buffers[node.out].storage
    return any(buffers[ld.buffer].storage == storage and ld.index != node.store for ld in loads(node.body))


class RowMapOperator:
    """See ops/spec.py for the contract."""

    name = "row_map"

    def tile(self, node: RowMap, graph: Graph, workers: int) -> Tiling:
        """Equal row ranges, at most `workers`, each of at least MIN_ELEMENTS computed elements."""
        n = row_dims(node)
        rows = math.prod(v.size for v in node.dims[:n])
        per_row = math.prod(v.size for v in node.dims[n:])
        per_row = max([per_row, *(r.var.size for r in reductions(node.body))])
        count = max(1, min(workers, rows, rows * per_row // MIN_ELEMENTS))
        if shifts_in_place(node, graph.buffers):
            count = 1
        if not rows * per_row:
            return Tiling(())
        cuts = [rows * i // count for i in range(count + 1)]
        return Tiling(tuple(self._task(node, graph.buffers, a, b) for a, b in zip(cuts, cuts[1:], strict=False)))

    def _task(self, node: RowMap, buffers: Mapping[str, Buffer], start: int, stop: int) -> TileSpec:
        exprs = (node.body, *node.store)
        reads: dict[Access, None] = {}
        writes: dict[Access, None] = {}
        moved = flops = 0
        for ranges in row_ranges(node, start, stop):
            reads.update(dict.fromkeys(read_accesses(exprs, ranges, buffers)))
            stored = write_accesses(node.out, node.store, ranges, buffers)
            writes.update(dict.fromkeys(stored))
            elements = math.prod(b - a for a, b in ranges.values())
            moved += gathered_bytes(exprs, ranges, buffers)
            moved += min(elements * buffers[node.out].dtype.itemsize, access_bytes(stored, buffers))
            flops += arithmetic(exprs, ranges)
        return TileSpec("row_map", (start, stop), tuple(reads), tuple(writes), moved, flops)

    def prepare(
        self, node: RowMap, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...]
    ) -> Callable[[Memory], None]:
        """The task of rows tile[0] to tile[1] as a function of memory."""
        parts = [self._assign(node, ranges, buffers) for ranges in row_ranges(node, *tile)]
        if len(parts) == 1 and not shifts_in_place(node, buffers):
            return parts[0]

        def task(memory: Memory) -> None:
            # clone: a value may be a view of what another part overwrites
            computed = [[value.clone(), *index] for value, *index in (p.compute(memory) for p in parts)]
            for part, values in zip(parts, computed, strict=True):
                part.commit(memory, values)

        return task

    @staticmethod
    def _assign(node: RowMap, ranges: dict[Var, tuple[int, int]], buffers: Mapping[str, Buffer]) -> Assignment:
        return compile_assignment(node.body, node.out, node.store, ranges, buffers)

    def run(self, node: RowMap, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...], memory: Memory) -> None:
        """Execute one task."""
        self.prepare(node, buffers, op, tile)(memory)

    def oracle(self, node: RowMap, buffers: Mapping[str, Buffer], memory: Memory) -> None:
        """All elements at once, stored through index tensors."""
        ranges = {v: (0, v.size) for v in node.dims}
        sizes = tuple(v.size for v in node.dims)
        value = evaluate(node.body, ranges, memory).expand(sizes).clone()
        index = tuple(evaluate(e, ranges, memory).expand(sizes) for e in node.store)
        memory[node.out][index] = value
