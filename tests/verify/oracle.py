"""What the verifier must decide, by brute force: every element, every pair of tasks, a naive transitive closure.

Slow and plain on purpose, and written against the contract of ir/, not against verify/.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

from mpk_dynamo.ir.expr import Const, Expr, Load, Op, Reduce, Var
from mpk_dynamo.ir.graph import RowMap, reads, writes
from mpk_dynamo.ir.region import Access, Box, whole
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.ir.tasks import Task, TaskGraph
from mpk_dynamo.ir.types import Buffer, BufferKind

EXACT = (BufferKind.SCRATCH, BufferKind.OUTPUT)
Point = tuple[int, ...]


@functools.cache
def box_points(box: Box) -> frozenset[Point]:
    return frozenset(itertools.product(*(range(s, e) for s, e in box)))


def points(a: Access) -> frozenset[Point]:
    return box_points(a.box)


def apart(a: Access, b: Access) -> bool:
    return a.partition != "" and a.partition == b.partition and a.side is not b.side


def meet(tg: TaskGraph, a: Access, b: Access) -> bool:
    """Whether two accesses can touch the same element."""
    same = tg.buffers[a.buffer].storage == tg.buffers[b.buffer].storage
    return same and not apart(a, b) and bool(points(a) & points(b))


def conflict(tg: TaskGraph, a: Task, b: Task) -> bool:
    """Whether memory that is not flagged needs an order between them."""

    def plain(accesses: Iterable[Access]) -> list[Access]:
        return [x for x in accesses if tg.buffers[x.buffer].storage not in tg.flagged]

    return any(meet(tg, x, y) for x in plain(a.writes) for y in (*b.reads, *b.writes)) or any(
        meet(tg, x, y) for x in plain(a.reads) for y in b.writes
    )


def poll_edges(tg: TaskGraph) -> list[tuple[int, int]]:
    """(writer, reader) of a common flagged element; both may be the same task."""
    edges = []
    for a, b in itertools.product(tg.tasks, tg.tasks):
        for x, y in itertools.product(a.writes, b.reads):
            same = tg.buffers[x.buffer].storage == tg.buffers[y.buffer].storage
            if same and tg.buffers[x.buffer].storage in tg.flagged and points(x) & points(y):
                edges.append((a.id, b.id))
    return edges


def flagged_fine(tg: TaskGraph) -> bool:
    for name in tg.flagged:
        sharing = [b for b in tg.buffers.values() if b.storage == name]
        if [b.kind for b in sharing] != [BufferKind.SCRATCH] or sharing[0].dtype.value not in ("bf16", "f16", "f32"):
            return False
        writes = [a for t in tg.tasks for a in t.writes if a.buffer == sharing[0].name]
        if any(a.side is not None for a in writes):
            return False
        if sorted(p for a in writes for p in points(a)) != sorted(box_points(whole(sharing[0].shape))):
            return False
    return True


def closure(n: int, edges: Iterable[tuple[int, int]]) -> list[set[int]]:
    """reach[a]: all that come after a."""
    reach: list[set[int]] = [set() for _ in range(n)]
    for a, b in edges:
        reach[a].add(b)
    for k in range(n):
        for a in range(n):
            if k in reach[a]:
                reach[a] |= reach[k]
    return reach


def version(b: Buffer) -> int:
    return int(b.name.split("@")[1]) if "@" in b.name else 0


def event_edges(tg: TaskGraph) -> list[tuple[int, int]]:
    return [(p, w) for e in tg.events for p in e.producers for w in e.waiters]


def schedule_edges(s: Schedule) -> list[tuple[int, int]]:
    return event_edges(s.tasks) + [(a, b) for q in s.queues for a, b in zip(q, q[1:], strict=False)]


def declared_fine(tg: TaskGraph) -> bool:
    n = len(tg.tasks)
    if any(tg.buffers.get(name) != b for name, b in tg.graph.buffers.items()):
        return False
    if [t.id for t in tg.tasks] != list(range(n)) or [e.id for e in tg.events] != list(range(len(tg.events))):
        return False
    for t in tg.tasks:
        for a in (*t.reads, *t.writes):
            if a.buffer not in tg.buffers or len(a.box) != len(tg.buffers[a.buffer].shape):
                return False
            if not points(a) <= box_points(whole(tg.buffers[a.buffer].shape)):
                return False
            if any(s < 0 or s > e or e > size for (s, e), size in zip(a.box, tg.buffers[a.buffer].shape, strict=True)):
                return False
            if (a.partition == "") != (a.side is None):
                return False
        for a in t.writes:
            b = tg.buffers[a.buffer]
            if b.kind in (BufferKind.PARAM, BufferKind.INPUT) or (b.kind is BufferKind.STATE and version(b) == 0):
                return False
    for e in tg.events:
        if not e.producers or any(not 0 <= t < n for t in (*e.producers, *e.waiters)):
            return False
        if len(set(e.producers)) < len(e.producers) or len(set(e.waiters)) < len(e.waiters):
            return False
        if set(e.producers) & set(e.waiters):
            return False
    for i, node in enumerate(tg.graph.nodes):
        mine = [t for t in tg.tasks if t.node == i]
        if {a.buffer for t in mine for a in t.writes} != set(writes(node)):
            return False
        read = {tg.buffers[a.buffer].storage for t in mine for a in t.reads}
        if any(tg.buffers[r].storage not in read for r in reads(node) if tg.buffers[r].kind is not BufferKind.PARAM):
            return False
    return all(reads_enough(tg, t) for t in tg.tasks) and flagged_fine(tg)


def reads_enough(tg: TaskGraph, t: Task) -> bool:
    """Every element that goes into one the task writes is declared, as far as tasks write that memory at all."""
    node = tg.graph.nodes[t.node]
    assert isinstance(node, RowMap)
    written = {tg.buffers[a.buffer].storage for u in tg.tasks for a in u.writes}
    mine = set().union(*(points(a) for a in t.writes if a.buffer == node.out))
    declared: dict[str, set[Point]] = {}
    for a in t.reads:
        declared.setdefault(tg.buffers[a.buffer].storage, set()).update(points(a))
    shape = tg.buffers[node.out].shape
    for values in itertools.product(*(range(v.size) for v in node.dims)):
        at = dict(zip(node.dims, values, strict=True))
        axes = [range(n) if isinstance(e, Load) else [value(e, at)] for e, n in zip(node.store, shape, strict=True)]
        if not mine.isdisjoint(itertools.product(*axes)):
            for buffer, element in elements(node.body, at):
                storage = tg.buffers[buffer].storage
                if storage in written and element not in declared.get(storage, ()):
                    return False
    return True


def elements(e: Expr, at: dict[Var, int]) -> set[tuple[str, Point]]:
    """Elements an expression loads."""
    if isinstance(e, Load):
        return {(e.buffer, tuple(value(i, at) for i in e.index))}
    if isinstance(e, Reduce):
        return set().union(*(elements(e.body, {**at, e.var: i}) for i in range(e.var.size)))
    return set().union(*(elements(c, at) for c in e.children))


def ordered_fine(tg: TaskGraph, reach: list[set[int]]) -> bool:
    """Conflicts, versions, initialisation and coverage, given what comes after each task."""
    for a, b in itertools.combinations(tg.tasks, 2):
        if conflict(tg, a, b) and b.id not in reach[a.id]:
            return False
        for x, y in itertools.product((*a.reads, *a.writes), (*b.reads, *b.writes)):
            if not meet(tg, x, y):
                continue
            first, last = version(tg.buffers[x.buffer]), version(tg.buffers[y.buffer])
            if x in a.writes and last < first:
                return False
            if x in a.reads and y in b.writes and last <= first:
                return False
    for name, b in tg.buffers.items():
        if b.kind not in EXACT:
            continue
        counts: dict[Point, int] = {}
        for t in tg.tasks:
            for a in t.writes:
                if a.buffer == name:
                    if a.side is not None:
                        return False
                    for p in points(a):
                        counts[p] = counts.get(p, 0) + 1
        readers = [(t, a) for t in tg.tasks for a in t.reads if a.buffer == name and points(a)]
        if any(c > 1 for c in counts.values()):
            return False
        if (b.kind is BufferKind.OUTPUT or readers) and len(counts) < b.numel:
            return False
        for t, a in readers:
            before = [w for w in tg.tasks if (w.id < t.id if b.storage in tg.flagged else t.id in reach[w.id])]
            done = {p for w in before for x in w.writes if x.buffer == name for p in points(x)}
            if not points(a) <= done:
                return False
    for node in tg.graph.nodes:
        assert isinstance(node, RowMap)
        if tg.buffers[node.out].kind is BufferKind.STATE:
            written = {p for t in tg.tasks for a in t.writes if a.buffer == node.out for p in points(a)}
            if written != stored(node, tg.buffers[node.out]):
                return False
    return True


def stored(node: RowMap, b: Buffer) -> set[Point]:
    """Elements a store may reach; any, where the index is loaded."""
    out = set()
    for values in itertools.product(*(range(v.size) for v in node.dims)):
        at = dict(zip(node.dims, values, strict=True))
        axes = [range(n) if isinstance(e, Load) else [value(e, at)] for e, n in zip(node.store, b.shape, strict=True)]
        out |= set(itertools.product(*axes))
    return out


def value(e: Expr, at: dict[Var, int]) -> int:
    if isinstance(e, Var):
        return at[e]
    if isinstance(e, Const):
        return e.value
    assert isinstance(e, Op)
    a, b = (value(c, at) for c in e.children)
    return {"add": a + b, "sub": a - b, "mul": a * b, "floordiv": a // b if b else 0, "mod": a % b if b else 0}[e.name]


def tasks_fine(tg: TaskGraph) -> bool:
    if not declared_fine(tg):
        return False
    edges = event_edges(tg)
    return all(p < w for p, w in edges + poll_edges(tg)) and ordered_fine(tg, closure(len(tg.tasks), edges))


def users(tg: TaskGraph, name: str) -> set[int]:
    return {t.id for t in tg.tasks for a in (*t.reads, *t.writes) if a.buffer == name}


def may_share(tg: TaskGraph, reach: list[set[int]], a: Buffer, at: int, b: Buffer, bt: int) -> bool:
    if at + a.nbytes <= bt or bt + b.nbytes <= at or not a.nbytes or not b.nbytes:
        return True
    x, y = users(tg, a.name), users(tg, b.name)
    return all(j in reach[i] for i in x for j in y) or all(i in reach[j] for i in x for j in y)


def schedule_fine(s: Schedule) -> bool:
    tg, n = s.tasks, len(s.tasks.tasks)
    if not declared_fine(tg) or sorted(t for q in s.queues for t in q) != list(range(n)) or not s.queues:
        return False
    if len(s.slots) != len(tg.events) or len(set(s.slots)) != len(s.slots) or any(x < 0 for x in s.slots):
        return False
    reach = closure(n, schedule_edges(s))
    waiting = closure(n, schedule_edges(s) + poll_edges(tg))
    if any(t in waiting[t] for t in range(n)) or not ordered_fine(tg, reach):
        return False
    first = range(s.flagged_start, s.flagged_start + s.flagged_bytes)
    both = range(s.flagged_start, s.flagged_start + 2 * s.flagged_bytes)
    if s.flagged_start % 256 or s.flagged_bytes % 256 or s.flagged_start < 0 or s.flagged_bytes < 0:
        return False
    if both.stop > s.arena_bytes:
        return False
    taken: set[int] = set()
    for name, offset in s.arena.items():
        b = tg.buffers.get(name)
        if b is None or b.kind is not BufferKind.SCRATCH:
            return False
        held = set(range(offset, offset + b.nbytes))
        if name in tg.flagged:
            if offset % 128 or not held <= set(first) or held & taken or not first.start <= offset <= first.stop:
                return False
            taken |= held
        elif offset % 256 or offset < 0 or offset + b.nbytes > s.arena_bytes or held & set(both):
            return False
    scratch = [b for b in tg.buffers.values() if b.kind is BufferKind.SCRATCH and users(tg, b.name)]
    if any(b.name not in s.arena for b in scratch):
        return False
    plain = [b for b in scratch if b.storage not in tg.flagged]
    return all(
        may_share(tg, reach, a, s.arena[a.name], b, s.arena[b.name]) for a, b in itertools.combinations(plain, 2)
    )
