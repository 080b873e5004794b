"""Mutants of valid programs: every way to break one thing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mpk_dynamo.ir.region import Access, Side
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.ir.tasks import Event, Task, TaskGraph
from mpk_dynamo.ir.types import DType


def task_mutants(tg: TaskGraph) -> Iterator[tuple[str, TaskGraph]]:
    """(what was done, mutant), each one change away from `tg`."""
    for what, events in _event_mutants(tg):
        yield what, replace(tg, events=tuple(events))
    for what, flagged in _flag_mutants(tg):
        yield what, replace(tg, flagged=flagged)
    for t in tg.tasks:
        for what, task in _access_mutants(t, tg):
            yield f"t{t.id}: {what}", replace(tg, tasks=(*tg.tasks[: t.id], task, *tg.tasks[t.id + 1 :]))
        yield f"drop t{t.id}", without(tg, t.id)
        if t.id + 1 < len(tg.tasks):
            yield f"exchange t{t.id} and the next", renumbered(tg, {t.id: t.id + 1, t.id + 1: t.id})
        yield (
            f"t{t.id} gets another id",
            replace(tg, tasks=(*tg.tasks[: t.id], replace(t, id=t.id + 1), *tg.tasks[t.id + 1 :])),
        )
    for name, b in tg.buffers.items():
        grown = replace(b, shape=(*b.shape[:-1], b.shape[-1] + 1) if b.shape else (1,))
        buffers = {**tg.buffers, name: grown}
        yield f"tiling changes the shape of {name}", replace(tg, buffers=buffers)
        if name in tg.flagged:
            for dtype in (DType.I32, DType.F64, DType.BF16):
                changed = replace(b, dtype=dtype)
                graph = replace(tg.graph, buffers={**tg.graph.buffers, name: changed})
                buffers = {**tg.buffers, name: changed}
                yield f"flagged {name} is {dtype.value}", replace(tg, graph=graph, buffers=buffers)


def _flag_mutants(tg: TaskGraph) -> Iterator[tuple[str, frozenset[str]]]:
    for name in dict.fromkeys(b.storage for b in tg.buffers.values()):
        yield f"{name} {'no longer ' if name in tg.flagged else ''}flagged", tg.flagged ^ {name}
    for b in tg.buffers.values():
        if b.name != b.storage:
            yield f"version {b.name} flagged", tg.flagged | {b.name}
    yield "an unknown storage flagged", tg.flagged | {"?"}


def _event_mutants(tg: TaskGraph) -> Iterator[tuple[str, list[Event]]]:
    n = len(tg.tasks)

    def changed(e: Event, **fields: tuple[int, ...]) -> list[Event]:
        return [replace(x, **fields) if x.id == e.id else x for x in tg.events]

    for e in tg.events:
        yield f"drop event {e.id}", [replace(x, id=i) for i, x in enumerate(x for x in tg.events if x.id != e.id)]
        for p in e.producers:
            rest = tuple(x for x in e.producers if x != p)
            yield f"event {e.id} loses producer {p}", changed(e, producers=rest)
            yield f"event {e.id} has producer {p} twice", changed(e, producers=(*e.producers, p))
            for q in (p - 1, p + 1, 0, n - 1, n, -1):
                if q not in e.producers:
                    yield f"event {e.id}: producer {p} becomes {q}", changed(e, producers=(*rest, q))
        for w in e.waiters:
            rest = tuple(x for x in e.waiters if x != w)
            yield f"event {e.id} loses waiter {w}", changed(e, waiters=rest)
            yield f"event {e.id} has waiter {w} twice", changed(e, waiters=(*e.waiters, w))
            for q in (w - 1, w + 1, n - 1, n, -1):
                if q not in e.waiters:
                    yield f"event {e.id}: waiter {w} becomes {q}", changed(e, waiters=(*rest, q))
        yield f"event {e.id} turned around", changed(e, producers=e.waiters, waiters=e.producers)
        yield f"event {e.id} gets a wrong id", [replace(x, id=x.id + 1) if x.id == e.id else x for x in tg.events]
        for f in tg.events[e.id + 1 :]:
            union = Event(e.id, tuple(sorted({*e.producers, *f.producers})), tuple(sorted({*e.waiters, *f.waiters})))
            crossed = [replace(e, waiters=f.waiters), replace(f, waiters=e.waiters)]
            rest = [x for x in tg.events if x.id not in (e.id, f.id)]
            yield f"events {e.id} and {f.id} merged", _numbered([union, *rest])
            lost = replace(union, producers=e.producers)
            yield f"events {e.id} and {f.id} merged, producers lost", _numbered([lost, *rest])
            yield f"events {e.id} and {f.id} exchange waiters", _numbered([*crossed, *rest])


def _numbered(events: list[Event]) -> list[Event]:
    return [replace(e, id=i) for i, e in enumerate(events)]


def _access_mutants(t: Task, tg: TaskGraph) -> Iterator[tuple[str, Task]]:
    for kind in ("reads", "writes"):
        accesses: tuple[Access, ...] = getattr(t, kind)
        for i, a in enumerate(accesses):
            others = (*accesses[:i], *accesses[i + 1 :])
            yield f"{kind} drop {i}", replace(t, **{kind: others})
            yield f"{kind} repeat {i}", replace(t, **{kind: (*accesses, a)})
            for what, changed in _boxes(a):
                yield f"{kind} {i} {what}", replace(t, **{kind: (*others, changed)})
            for b in tg.buffers.values():
                if b.name != a.buffer and len(b.shape) == len(a.box):
                    moved = replace(a, buffer=b.name)
                    yield f"{kind} {i} of {b.name} instead", replace(t, **{kind: (*others, moved)})
            yield f"{kind} {i} of an unknown buffer", replace(t, **{kind: (*others, replace(a, buffer="?"))})
            yield f"{kind} {i} rank", replace(t, **{kind: (*others, replace(a, box=(*a.box, (0, 1))))})
            if a.side is None:
                marked = replace(a, partition="pos[]", side=Side.AT)
                yield f"{kind} {i} at position only", replace(t, **{kind: (*others, marked)})
            else:
                flipped = replace(a, side=Side.OFF if a.side is Side.AT else Side.AT)
                for what, changed in (
                    ("side flipped", flipped),
                    ("unpartitioned", replace(a, partition="", side=None)),
                    ("of another partition", replace(a, partition="elsewhere")),
                    ("partition without side", replace(a, side=None)),
                ):
                    yield f"{kind} {i} {what}", replace(t, **{kind: (*others, changed)})


def _boxes(a: Access) -> Iterator[tuple[str, Access]]:
    for d, (start, stop) in enumerate(a.box):
        for what, span in (
            ("starts later", (start + 1, stop)),
            ("stops earlier", (start, stop - 1)),
            ("starts earlier", (start - 1, stop)),
            ("stops later", (start, stop + 1)),
            ("shifted up", (start + 1, stop + 1)),
            ("shifted down", (start - 1, stop - 1)),
        ):
            yield f"{what} in dimension {d}", replace(a, box=(*a.box[:d], span, *a.box[d + 1 :]))


def renumbered(tg: TaskGraph, ids: dict[int, int]) -> TaskGraph:
    """The same tasks in another order; ids maps old to new where they differ."""
    tasks = sorted((replace(t, id=ids.get(t.id, t.id)) for t in tg.tasks), key=lambda t: t.id)
    events = [
        replace(e, producers=tuple(ids.get(p, p) for p in e.producers), waiters=tuple(ids.get(w, w) for w in e.waiters))
        for e in tg.events
    ]
    return replace(tg, tasks=tuple(tasks), events=tuple(events))


def without(tg: TaskGraph, gone: int) -> TaskGraph:
    """One task fewer, also in events."""
    moved = [t for t in tg.tasks if t.id != gone]
    ids = {t.id: i for i, t in enumerate(moved)}
    events = []
    for e in tg.events:
        producers, waiters = (tuple(ids.get(t, t) for t in ts if t != gone) for ts in (e.producers, e.waiters))
        if producers:
            events.append(Event(len(events), producers, waiters))
    return replace(tg, tasks=tuple(replace(t, id=ids[t.id]) for t in moved), events=tuple(events))


def schedule_mutants(s: Schedule) -> Iterator[tuple[str, Schedule]]:
    """(what was done, mutant): queues, arena, slots, and the events as far as queues may make them redundant."""
    queues = [list(q) for q in s.queues]

    def with_queues(changed: list[list[int]]) -> Schedule:
        return replace(s, queues=tuple(map(tuple, changed)))

    for w, q in enumerate(queues):
        for k in range(len(q)):
            rest = [*q[:k], *q[k + 1 :]]
            for m in range(k + 1, len(q)):
                swapped = list(q)
                swapped[k], swapped[m] = q[m], q[k]
                yield f"queue {w}: places {k} and {m} exchanged", with_queues([*queues[:w], swapped, *queues[w + 1 :]])
            yield f"queue {w} loses place {k}", with_queues([*queues[:w], rest, *queues[w + 1 :]])
            yield f"queue {w} repeats place {k}", with_queues([*queues[:w], [*q, q[k]], *queues[w + 1 :]])
            for v, other in enumerate(queues):
                if v == w:
                    continue
                for m in range(len(other) + 1):
                    moved = [list(x) for x in queues]
                    moved[w] = rest
                    moved[v].insert(m, q[k])
                    yield f"place {k} of queue {w} moved to place {m} of {v}", with_queues(moved)
                both = [list(x) for x in queues]
                both[v].append(q[k])
                yield f"place {k} of queue {w} also in queue {v}", with_queues(both)
        yield f"queue {w} reversed", with_queues([*queues[:w], q[::-1], *queues[w + 1 :]])
    yield "a queue names an unknown task", with_queues([[*queues[0], len(s.tasks.tasks)], *queues[1:]])
    yield "no queue", replace(s, queues=())
    yield "one queue", with_queues([[t for q in queues for t in q]])
    for name, offset in s.arena.items():
        for other, at in s.arena.items():
            if offset != at:
                yield f"{name} placed on {other}", replace(s, arena={**s.arena, name: at})
        for delta in (256, -256, 128, -128, s.arena_bytes):
            yield f"{name} moved by {delta}", replace(s, arena={**s.arena, name: offset + delta})
        yield f"{name} has no place", replace(s, arena={k: v for k, v in s.arena.items() if k != name})
        for what, at in (("first", s.flagged_start), ("second", s.flagged_start + s.flagged_bytes)):
            for delta in (0, -256):
                moved = {**s.arena, name: at + delta}
                yield f"{name} placed at the {what} set {delta:+}", replace(s, arena=moved)
    for delta in (256, -256, 128, -128, s.arena_bytes, -s.flagged_start - 256):
        yield f"flagged memory moved by {delta}", replace(s, flagged_start=s.flagged_start + delta)
    for delta in (256, -256, 128, -128, -s.flagged_bytes, -s.flagged_bytes - 256):
        yield f"flagged memory grown by {delta}", replace(s, flagged_bytes=s.flagged_bytes + delta)
    for what, flagged in _flag_mutants(s.tasks):
        yield what, replace(s, tasks=replace(s.tasks, flagged=flagged))
    yield "an input in the arena", replace(s, arena={**s.arena, "x": 0})
    yield "arena too small", replace(s, arena_bytes=s.arena_bytes - 256)
    for e in range(len(s.slots)):
        for f in range(e):
            yield f"events {e} and {f} share", replace(s, slots=(*s.slots[:e], s.slots[f], *s.slots[e + 1 :]))
        yield f"event {e} has slot -1", replace(s, slots=(*s.slots[:e], -1, *s.slots[e + 1 :]))
    yield "a slot too few", replace(s, slots=s.slots[:-1])
    for what, events in _event_mutants(s.tasks):
        slots = tuple(range(len(events)))
        yield what, replace(s, tasks=replace(s.tasks, events=tuple(events)), slots=slots)
