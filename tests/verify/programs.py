"""Small valid programs for the verifier's tests, made without any pass of the project."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from verify import oracle

from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import Graph, Output, RowMap
from mpk_dynamo.ir.region import Access, Box, Side, whole
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.ir.tasks import Event, Task, TaskGraph
from mpk_dynamo.ir.types import Buffer, BufferKind, DType, buffer

POSITION = "pos[]"


class Builder:
    """Adds buffers and nodes; each node is a RowMap cut into a grid of tasks."""

    def __init__(self) -> None:
        self.buffers: dict[str, Buffer] = {}
        self.nodes: list[RowMap] = []
        self.tasks: list[Task] = []
        self.outputs: list[str] = []
        self.add("pos", (), BufferKind.INPUT, DType.I64)

    def add(
        self, name: str, shape: Sequence[int], kind: BufferKind, dtype: DType = DType.F32, storage: str = ""
    ) -> str:
        self.buffers[name] = buffer(name, dtype, tuple(shape), kind, storage=storage or None)
        if kind is BufferKind.OUTPUT:
            self.outputs.append(name)
        return name

    def version(self, state: str) -> str:
        """A new version of a state, e.g. s@2."""
        storage = self.buffers[state].storage
        n = sum(b.storage == storage for b in self.buffers.values())
        return self.add(f"{storage}@{n}", self.buffers[state].shape, BufferKind.STATE, storage=storage)

    def node(
        self,
        out: str,
        pieces: Sequence[int] = (),
        same: Sequence[str] = (),
        every: Sequence[str] = (),
        append: bool = False,
        off: Sequence[str] = (),
    ) -> None:
        """out = f(element of `same`, all of `every`). pieces: tasks per dimension. append: write only the row at the
        position. off: states of which all rows but the one at the position are read."""
        b = self.buffers[out]
        dims = tuple(ex.var(f"i{d}", n) for d, n in enumerate(b.shape))
        body: ex.Expr = ex.const(1.0, DType.F32)
        for name in same:
            body = ex.op("add", body, ex.load(name, dims, DType.F32))
        for name in (*every, *off):
            inner = tuple(ex.var(f"r{d}", n) for d, n in enumerate(self.buffers[name].shape))
            term: ex.Expr = ex.load(name, inner, DType.F32)
            for v in inner:
                term = ex.reduce("sum", v, term)
            body = ex.op("add", body, term)
        position = ex.load("pos", (), DType.I64)
        store: tuple[ex.Expr, ...] = dims
        if append:
            dims, store = dims[1:], (position, *dims[1:])
        self.nodes.append(RowMap(f"n{len(self.nodes)}", dims, body, out, store, f"layer{len(self.nodes)}"))
        counts = [*pieces, *([1] * (len(b.shape) - len(pieces)))]
        if append and counts:
            counts[0] = 1
        for cell in itertools.product(*(range(c) for c in counts)):
            box: Box = tuple((n * i // c, n * (i + 1) // c) for n, c, i in zip(b.shape, counts, cell, strict=True))
            reads = [Access(name, box) for name in same]
            reads += [Access(name, whole(self.buffers[name].shape)) for name in every]
            reads += [Access(name, whole(self.buffers[name].shape), POSITION, Side.OFF) for name in off]
            if append:
                reads.append(Access("pos", ()))
                write = Access(out, box, POSITION, Side.AT)
            else:
                write = Access(out, box)
            if any(s >= e for s, e in box):
                continue
            node = len(self.nodes) - 1
            self.tasks.append(Task(len(self.tasks), node, "row_map", cell, tuple(reads), (write,), 0, 0))

    def graph(self) -> Graph:
        return Graph(tuple(self.nodes), dict(self.buffers), tuple(Output(o) for o in self.outputs), ("test",))

    def task_graph(self) -> TaskGraph:
        """With events: one per distinct set of conflicting earlier tasks. Not minimal."""
        return with_events(TaskGraph(self.graph(), dict(self.buffers), tuple(self.tasks)))


def with_events(bare: TaskGraph) -> TaskGraph:
    waiters: dict[tuple[int, ...], list[int]] = {}
    for b in range(len(bare.tasks)):
        before = tuple(a for a in range(b) if oracle.conflict(bare, bare.tasks[a], bare.tasks[b]))
        if before:
            waiters.setdefault(before, []).append(b)
    events = tuple(Event(i, before, tuple(after)) for i, (before, after) in enumerate(waiters.items()))
    return replace(bare, events=events)


def flagged(tg: TaskGraph, names: Iterable[str]) -> TaskGraph:
    """With these storages flagged, and events for the rest alone."""
    return with_events(replace(tg, flagged=frozenset(names)))


def some_flagged(tg: TaskGraph, seed: int) -> TaskGraph:
    """With a random part of scratch memory flagged."""
    r = random.Random(seed)
    return flagged(tg, [b.name for b in tg.buffers.values() if b.kind is BufferKind.SCRATCH and r.random() < 0.6])


def decoder_like() -> TaskGraph:
    """Everything a decode step has, tiny: chains, all-to-all, partial results, a cache append, a counter."""
    b = Builder()
    b.add("x", (4,), BufferKind.INPUT)
    b.add("keys", (3, 4), BufferKind.STATE)
    b.add("count", (), BufferKind.STATE)
    for name, shape in (("h", (4,)), ("q", (4,)), ("part", (2, 4)), ("dead", (2,))):
        b.add(name, shape, BufferKind.SCRATCH)
    b.add("y", (4,), BufferKind.OUTPUT)
    b.node("h", (2,), same=["x"])
    b.node("q", (2,), every=["h"])
    b.node("part", (2, 1), every=["q", "count"], off=["keys"])
    b.node(b.version("keys"), (1, 2), every=["h"], append=True)
    b.node("dead", (1,), every=["q"])
    b.node(b.version("count"), (), every=["count"])
    b.node("y", (2,), same=["h"], every=["part", "count@1"])
    return b.task_graph()


def random_tasks(seed: int) -> TaskGraph:
    """A valid random program of 2 to 6 nodes."""
    r = random.Random(seed)
    b = Builder()
    b.add("x", (r.randint(1, 4),), BufferKind.INPUT)
    b.add("s", (r.randint(2, 3), r.randint(1, 3)), BufferKind.STATE)
    readable, state = ["x"], "s"
    for i in range(r.randint(2, 6)):
        every = r.sample(readable, k=min(len(readable), r.randint(0, 2)))
        choice = r.random()
        if choice < 0.2:
            state = b.version(state)
            b.node(state, (1, r.randint(1, 2)), every=every, append=True)
            continue
        shape = tuple(r.randint(1, 4) for _ in range(r.randint(0, 2)))
        if choice < 0.3:
            old, state = state, b.version(state)
            b.node(state, (r.randint(1, 2), r.randint(1, 2)), same=[old], every=every)
            continue
        out = b.add(f"b{i}", shape, BufferKind.OUTPUT if r.random() < 0.3 else BufferKind.SCRATCH)
        same = [n for n in readable if b.buffers[n].shape == shape][:1]
        every = [n for n in every if n not in same]
        off = [state] if r.random() < 0.3 else []
        if r.random() < 0.3:
            every.append(state) if not off else None
        b.node(out, tuple(r.randint(1, 3) for _ in shape), same=same, every=every, off=off)
        readable.append(out)
    return b.task_graph()


def schedule(tg: TaskGraph, workers: int, seed: int = 0, reuse: bool = True) -> Schedule:
    """A valid schedule: tasks in id order on random workers; plain scratch placed first-fit by the oracle's
    lifetimes, flagged scratch behind it."""
    r = random.Random(seed)
    queues: list[list[int]] = [[] for _ in range(workers)]
    for t in tg.tasks:
        queues[r.randrange(workers)].append(t.id)
    frozen = tuple(map(tuple, queues))
    arena: dict[str, int] = {}
    end = 0
    bare = Schedule(tg, frozen, {}, 0, tuple(range(len(tg.events))))
    reach = oracle.closure(len(tg.tasks), oracle.schedule_edges(bare))
    for b in tg.buffers.values():
        if b.kind is not BufferKind.SCRATCH or b.storage in tg.flagged:
            continue
        offset = 0
        while reuse and not all(oracle.may_share(tg, reach, b, offset, tg.buffers[o], at) for o, at in arena.items()):
            offset += 256
        offset = offset if reuse else end
        arena[b.name] = offset
        end = max(end, offset + max(256, -(-b.nbytes // 256) * 256))
    start = offset = end
    for b in tg.buffers.values():
        if b.storage in tg.flagged:
            arena[b.name] = offset
            offset += max(128, -(-b.nbytes // 128) * 128)
    size = -(-(offset - start) // 256) * 256
    return Schedule(tg, frozen, arena, start + 2 * size, tuple(range(len(tg.events))), start, size)
