"""Task programs written as text, random ones, and brute-force answers to compare passes with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import combinations

from hypothesis import strategies as st

from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import Graph, RowMap
from mpk_dynamo.ir.region import Access, Side, boxes_overlap
from mpk_dynamo.ir.tasks import Task, TaskGraph
from mpk_dynamo.ir.types import BufferKind, DType, buffer

Pairs = set[tuple[int, int]]

_ACCESS = re.compile(r"(\w+(?:@\d+)?)\[([\d:,\s]*)\](?: (at|off) (\w+))?")


def access(text: str) -> Access:
    """`keys@1[0:2,3:4] at p`: buffer, box, and optionally side and partition."""
    match = _ACCESS.fullmatch(text)
    assert match, text
    name, box, side, partition = match.groups()
    dims = [tuple(map(int, d.split(":"))) for d in box.split(",") if d]
    return Access(name, tuple(dims), partition or "", Side(side) if side else None)  # type: ignore[arg-type]


def task(reads: Sequence[str] = (), writes: Sequence[str] = (), node: int | None = None, op: str = "row_map",
         nbytes: int = 0) -> tuple:  # fmt: skip
    return tuple(map(access, reads)), tuple(map(access, writes)), node, op, nbytes


def program(*specs: tuple, size: int = 64, kind: BufferKind = BufferKind.SCRATCH) -> TaskGraph:
    """A TaskGraph of `task(...)`s; each is its own node unless it says otherwise. Every buffer is f32, `size` long
    in each dimension, of one `kind`, and a version `x@1` shares the storage of `x`."""
    buffers, tasks = {}, []
    for i, (reads, writes, node, op, nbytes) in enumerate(specs):
        tasks.append(Task(i, i if node is None else node, op, (i,), reads, writes, nbytes, 0))
        for a in (*reads, *writes):
            storage = a.buffer.split("@")[0]
            buffers[a.buffer] = buffer(a.buffer, DType.F32, (size,) * len(a.box), kind, storage=storage)
    count = 1 + max((t.node for t in tasks), default=0)
    nodes = tuple(RowMap(f"map{i}", (), ex.const(0, DType.F32), "unused", ()) for i in range(count))
    return TaskGraph(Graph(nodes, dict(buffers), ()), buffers, tuple(tasks))


def conflicts(tg: TaskGraph) -> Pairs:
    """All (earlier, later) that touch a common element which one of them writes."""

    def collide(a: Access, b: Access) -> bool:
        if tg.buffers[a.buffer].storage != tg.buffers[b.buffer].storage:
            return False
        apart = a.partition and a.partition == b.partition and {a.side, b.side} == {Side.AT, Side.OFF}
        nonempty = all(start < stop for start, stop in (*a.box, *b.box))
        return nonempty and not apart and boxes_overlap(a.box, b.box)

    def clash(x: Task, y: Task) -> bool:
        pairs = [(a, b) for a in x.writes for b in (*y.reads, *y.writes)] + [(a, b) for a in x.reads for b in y.writes]
        return any(collide(a, b) for a, b in pairs)

    return {(x.id, y.id) for x, y in combinations(tg.tasks, 2) if clash(x, y)}


def edges(tg: TaskGraph) -> Pairs:
    return {(p, w) for e in tg.events for p in e.producers for w in e.waiters}


def queue_edges(queues: Iterable[Sequence[int]]) -> Pairs:
    return {pair for q in queues for pair in zip(q, q[1:])}


def closure(pairs: Pairs) -> Pairs:
    """Transitive closure of edges that go from smaller to larger numbers."""
    before: dict[int, set[int]] = {}
    for later in sorted({y for _, y in pairs}):
        direct = {x for x, y in pairs if y == later}
        before[later] = direct.union(*(before.get(x, set()) for x in direct))
    return {(x, y) for y, xs in before.items() for x in xs}


def reduction(pairs: Pairs) -> Pairs:
    """Transitive reduction: the edges whose ends no longer path connects."""
    full = closure(pairs)
    inner = {n for pair in full for n in pair}
    return {(x, y) for x, y in full if not any((x, m) in full and (m, y) in full for m in inner)}


@st.composite
def programs(draw: st.DrawFn, max_tasks: int = 14) -> TaskGraph:
    """Random tasks over a few storages: overlapping, nested, empty and partitioned boxes, versions of one storage."""
    ranks = {"a": 1, "b": 2, "s": 1, "s@1": 1, "z": 0}

    def one(names: tuple[str, ...]) -> st.SearchStrategy[Access]:
        end = st.tuples(st.integers(0, 5), st.integers(0, 4)).map(lambda x: (x[0], x[0] + x[1]))
        side = st.sampled_from([("", None), ("p", Side.AT), ("p", Side.OFF), ("q", Side.AT), ("q", Side.OFF)])
        return st.sampled_from(names).flatmap(
            lambda n: st.builds(lambda box, s: Access(n, box, *s), st.tuples(*[end] * ranks[n]), side)
        )

    specs = []
    node = 0
    for _ in range(draw(st.integers(1, max_tasks))):
        reads = draw(st.lists(one(tuple(ranks)), max_size=3))
        writes = draw(st.lists(one(tuple(ranks)), max_size=2))
        node += draw(st.integers(0, 1))
        specs.append((tuple(reads), tuple(writes), node, "row_map", draw(st.sampled_from((0, 1 << 20)))))
    return program(*specs, size=9)
