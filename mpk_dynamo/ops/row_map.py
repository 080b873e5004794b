"""RowMap: fused pointwise, gather, row-reduction and scatter computations.

Task kind `row_map`, tile = (start, stop): a range of flattened rows. A row is one point of the first
`row_dims(node)` dims; the remaining dims run in full. Everything a task reads is read before anything is stored,
because a node that shifts a tensor in place overwrites what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..ir.expr import Expr, Var, cast, const, index, loads, op, reduce, reductions, var, where
from ..ir.graph import Graph, Node, RowMap
from ..ir.region import Access
from ..ir.types import Buffer, DType
from .access import access_bytes, arithmetic, flat_range_boxes, gathered_bytes, read_accesses, write_accesses
from .evaluate import Assignment, compile_assignment, evaluate
from .sampling import F32, Sample, rms_norm, silu
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

    def context(self, node: RowMap, graph: Graph, workers: int) -> None:
        """Nothing."""

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

    def samples(self) -> list[tuple[Node, Graph]]:
        """Pointwise, views, gather, scatter, reductions, in-place updates, integer and bool results."""
        return [make() for make in SAMPLES]


def _dims(*sizes: int) -> tuple[Var, ...]:
    return tuple(var(f"i{n}", size) for n, size in enumerate(sizes))


def _pointwise() -> tuple[Node, Graph]:
    s, (i, j) = Sample(), _dims(3, 200)
    gate, up = s.input("gate", DType.BF16, 3, 200), s.input("up", DType.BF16, 3, 200)
    bias, out = s.param("bias", DType.BF16, 200), s.output("out", DType.BF16, 3, 200)
    x = op("add", op("mul", silu(s.wide(gate, i, j)), s.wide(up, i, j)), s.wide(bias, j))
    return s.graph(RowMap("pointwise", (i, j), cast(x, DType.BF16), out, (i, j)))


def _strided_view() -> tuple[Node, Graph]:
    s, (i, j, k) = Sample(), _dims(6, 4, 25)
    x = s.input("x", DType.F32, 25, 24, strides=(1, 25))
    out = s.output("out", DType.F32, 600)
    flat = op("add", op("mul", i, index(100)), op("add", op("mul", j, index(25)), k))
    row = op("add", op("mul", i, index(4)), j)
    return s.graph(RowMap("strided_view", (i, j, k), op("tanh", s.at(x, k, row)), out, (flat,)))


def _flat_split() -> tuple[Node, Graph]:
    s, (i,) = Sample(), _dims(31 * 24)
    x, out = s.input("x", DType.F16, 31, 3, 8), s.output("out", DType.F16, 31, 24)
    rest = op("mod", i, index(24))
    body = s.at(x, op("floordiv", i, index(24)), op("floordiv", rest, index(8)), op("mod", rest, index(8)))
    return s.graph(RowMap("flat_split", (i,), body, out, (op("floordiv", i, index(24)), rest)))


def _gather() -> tuple[Node, Graph]:
    s, (i, j, k) = Sample(), _dims(2, 3, 72)
    ids, table = s.input("ids", DType.I64, 2, 3), s.param("table", DType.BF16, 50, 72)
    out = s.output("out", DType.BF16, 2, 3, 72)
    return s.graph(RowMap("gather", (i, j, k), s.at(table, s.at(ids, i, j), k), out, (i, j, k)))


def _scatter() -> tuple[Node, Graph]:
    s, (b, h, d) = Sample(), _dims(2, 3, 80)
    position, row = s.input("position", DType.I64), s.input("row", DType.F16, 2, 3, 80)
    _, after = s.state("cache", DType.F16, 2, 3, 7, 80)
    return s.graph(RowMap("scatter", (b, h, d), s.at(row, b, h, d), after, (b, h, s.at(position), d)))


def _norm() -> tuple[Node, Graph]:
    s, (i, j) = Sample(), _dims(5, 104)
    x, w, out = s.input("x", DType.F16, 5, 104), s.param("w", DType.F16, 104), s.output("out", DType.F16, 5, 104)
    body = rms_norm(lambda k: s.wide(x, i, k), j, lambda k: s.wide(w, k), DType.F16)
    return s.graph(RowMap("norm", (i, j), body, out, (i, j)))


def _softmax() -> tuple[Node, Graph]:
    s, (i, j, k) = Sample(), _dims(2, 3, 137)
    x, out, r = s.input("x", DType.F32, 2, 3, 137), s.output("out", DType.F32, 2, 3, 137), var("r0", 137)
    top = reduce("max", r, s.at(x, i, j, r))
    total = reduce("sum", r, op("exp", op("sub", s.at(x, i, j, r), top)))
    body = op("div", op("exp", op("sub", s.at(x, i, j, k), top)), total)
    return s.graph(RowMap("softmax", (i, j, k), body, out, (i, j, k)))


def _total() -> tuple[Node, Graph]:
    s, r, q = Sample(), var("r0", 9), var("r1", 40)
    x, out = s.input("x", DType.F32, 9, 40), s.output("out", DType.F32)
    body = reduce("sum", r, op("abs", reduce("min", q, s.at(x, r, q))))
    return s.graph(RowMap("total", (), body, out, ()))


def _counter() -> tuple[Node, Graph]:
    s = Sample()
    before, after = s.state("length", DType.I64)
    return s.graph(RowMap("counter", (), op("add", s.at(before), index(1)), after, ()))


def _concatenate() -> tuple[Node, Graph]:
    s, (i, j) = Sample(), _dims(23, 48)
    a, b, out = s.input("a", DType.F32, 9, 48), s.input("b", DType.BF16, 14, 48), s.output("out", DType.F32, 23, 48)
    body = where(op("lt", i, index(9)), s.at(a, i, j), s.wide(b, op("sub", i, index(9)), j))
    return s.graph(RowMap("concatenate", (i, j), body, out, (i, j)))


def _rotary() -> tuple[Node, Graph]:
    s, (t, h, d) = Sample(), _dims(3, 5, 48)
    x, positions = s.input("x", DType.BF16, 3, 5, 48), s.input("positions", DType.I64, 3)
    cos, sin = s.param("cos", DType.F32, 11, 24), s.param("sin", DType.F32, 11, 24)
    out, half = s.output("out", DType.BF16, 3, 5, 48), index(24)
    turned = where(
        op("lt", d, half), op("neg", s.wide(x, t, h, op("add", d, half))), s.wide(x, t, h, op("sub", d, half))
    )

    def table(name: str) -> Expr:
        return s.at(name, s.at(positions, t), op("mod", d, half))

    body = op("add", op("mul", s.wide(x, t, h, d), table(cos)), op("mul", turned, table(sin)))
    return s.graph(RowMap("rotary", (t, h, d), cast(body, DType.BF16), out, (t, h, d)))


def _causal_mask() -> tuple[Node, Graph]:
    s, (b, k) = Sample(), _dims(4, 300)
    length, padding = s.input("length", DType.I64), s.input("padding", DType.I32, 4)
    out = s.output("out", DType.BOOL, 4, 300)
    seen = op("le", k, op("add", s.at(length), index(100)))
    body = op("and", seen, op("ge", k, cast(s.at(padding, b), DType.I64)))
    return s.graph(RowMap("causal_mask", (b, k), body, out, (b, k)))


def _shift() -> tuple[Node, Graph]:
    s, (i, j) = Sample(), _dims(8, 64)
    before, after = s.state("window", DType.F32, 8, 64)
    new = s.input("new", DType.F32, 64)
    moved = s.at(before, op("add", i, index(1)), j)
    body = where(op("eq", i, index(7)), s.at(new, j), moved)
    return s.graph(RowMap("shift", (i, j), body, after, (i, j)))


def _scale_in_place() -> tuple[Node, Graph]:
    s, (i,) = Sample(), _dims(1000)
    before, after = s.state("x", DType.F32, 1000)
    return s.graph(RowMap("scale_in_place", (i,), op("mul", s.at(before, i), const(0.5, F32)), after, (i,)))


def _remainder() -> tuple[Node, Graph]:
    s, (i, j) = Sample(), _dims(3, 40)
    x, y, out = s.input("x", DType.F32, 3, 40), s.input("y", DType.F32, 40), s.output("out", DType.F32, 3, 40)
    dividend = op("mul", cast(s.at(x, i, j), DType.F64), const(8.0, DType.F64))
    body = cast(op("mod", dividend, cast(s.at(y, j), DType.F64)), DType.F32)
    return s.graph(RowMap("remainder", (i, j), body, out, (i, j)))


SAMPLES = (
    _pointwise, _strided_view, _flat_split, _gather, _scatter, _norm, _softmax, _total, _counter, _concatenate,
    _rotary, _causal_mask, _shift, _scale_in_place, _remainder,
)
