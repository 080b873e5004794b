"""The second opinion on mutants that the verifier lets pass: elements, vector clocks and decoded tables; no code of
verify/.

What a task really touches is what the valid program declares of it (the conformance tests run every operator under
guard for that). So a mutant is harmless when the same tasks, run as it orders and places them, touch the same memory
without a race and to an end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import abi
from ...errors import VerificationError
from ...ir.graph import Graph, reads, writes
from ...ir.program import Program
from ...ir.region import Access
from ...ir.schedule import Schedule
from ...ir.tasks import Task, TaskGraph
from ...ir.types import BufferKind
from ...reference.races import Detector

Touched = dict[int, tuple[Sequence[Access], Sequence[Access]]]


def tasks_harm(mutant: TaskGraph, valid: TaskGraph) -> str:
    """What goes wrong when the mutant's tasks run, ordered by its events alone; '' when nothing can."""
    touched = _touched(mutant, valid)
    if isinstance(touched, str):
        return touched
    order = _order(mutant, touched, [[t.id] for t in mutant.tasks])
    return order if isinstance(order, str) else _races(Detector(mutant, accesses=touched), order)


def schedule_harm(mutant: Schedule, valid: Schedule) -> str:
    """The same for a Schedule: queues order tasks too, and buffers share the arena."""
    tg = mutant.tasks
    touched = _touched(tg, valid.tasks)
    if isinstance(touched, str):
        return touched
    if sorted(t for q in mutant.queues for t in q) != list(range(len(tg.tasks))):
        return "the queues hold other tasks"
    if len(set(mutant.slots)) < len(tg.events) or min(mutant.slots, default=0) < 0:
        return "events share counters, or have none"
    places = _placed(mutant)
    if places:
        return places
    order = _order(tg, touched, mutant.queues)
    return order if isinstance(order, str) else _races(Detector(tg, mutant.queues, mutant.arena, touched), order)


def program_harm(mutant: Program, valid: Program) -> str:
    """Whether the device would do something else: what tables say with every index followed."""
    if (mutant.kinds, mutant.bindings, mutant.source) != (valid.kinds, valid.bindings, valid.source):
        return "other code or bindings"
    if (mutant.threads, mutant.shared_bytes, mutant.target) != (valid.threads, valid.shared_bytes, valid.target):
        return "another launch"
    return "" if _meaning(mutant) == _meaning(valid) else "tables say something else"


def graph_harm(mutant: Graph, valid: Graph) -> str:
    """Harmless only when the same nodes stand in an order in which no two that touch one memory changed sides."""
    if mutant.buffers != valid.buffers or mutant.outputs != valid.outputs:
        return "other buffers or outputs"
    if sorted(map(repr, mutant.nodes)) != sorted(map(repr, valid.nodes)):
        return "other nodes"
    place = {n.name: i for i, n in enumerate(mutant.nodes)}

    def storages(names: Sequence[str]) -> set[str]:
        return {valid.buffers[n].storage for n in names}

    for i, a in enumerate(valid.nodes):
        for b in valid.nodes[i + 1 :]:
            touch = storages(writes(a)) & storages([*reads(b), *writes(b)]) | storages(reads(a)) & storages(writes(b))
            if touch and place[a.name] > place[b.name]:
                return f"{b.name} comes before {a.name}"
    return ""


def _touched(mutant: TaskGraph, valid: TaskGraph) -> Touched | str:
    """By task id, what tasks really touch; or why they are other tasks."""
    if mutant.buffers != valid.buffers or mutant.graph != valid.graph:
        return "other buffers"
    if [t.id for t in mutant.tasks] != list(range(len(mutant.tasks))):
        return "tasks are misnumbered"

    def name(t: Task) -> tuple[Any, ...]:
        return t.node, t.op, t.tile

    real = {name(t): t for t in valid.tasks}
    if sorted(map(name, mutant.tasks)) != sorted(map(name, valid.tasks)):
        return "other tasks"
    known = range(len(mutant.tasks))
    for e in mutant.events:
        if len(set(e.producers)) < max(len(e.producers), 1) or not {*e.producers, *e.waiters} <= set(known):
            return f"event {e.id} counts what is not there"
    return {t.id: (real[name(t)].reads, real[name(t)].writes) for t in mutant.tasks}


def _order(tg: TaskGraph, touched: Touched, queues: Sequence[Sequence[int]]) -> list[int] | str:
    """One complete execution of the queues, or that there is none: a task starts when its events have all signals and
    what it polls is published. Everything is counted afresh after each task."""
    waits, signals = tg.waits(), tg.signals()
    have = [0] * len(tg.events)
    published: dict[str, np.ndarray] = {
        n: np.zeros(tg.buffers[n].shape, bool) for n in tg.flagged if n in tg.buffers
    }
    heads, order, going = [0] * len(queues), [], True

    def box(a: Access) -> tuple[slice, ...]:
        return tuple(slice(*r) for r in a.box)

    def ready(t: int) -> bool:
        if any(have[e] < len(tg.events[e].producers) for e in waits[t]):
            return False
        polled = (a for a in touched[t][0] if a.buffer in published)
        return all(published[a.buffer][box(a)].all() for a in polled)

    while going:
        going = False
        for w, queue in enumerate(queues):
            while heads[w] < len(queue) and ready(queue[heads[w]]):
                t = queue[heads[w]]
                heads[w] += 1
                order.append(t)
                going = True
                for a in touched[t][1]:
                    if a.buffer in published:
                        published[a.buffer][box(a)] = True
                for e in signals[t]:
                    have[e] += 1
    if len(order) < len(tg.tasks):
        return f"{len(tg.tasks) - len(order)} tasks never run"
    return order


def _races(detector: Detector, order: list[int]) -> str:
    for name in detector.tg.flagged:
        sharing = [b for b in detector.tg.buffers.values() if b.storage == name]
        narrow = {"bf16", "f16", "f32"}
        if not sharing or any(b.kind is not BufferKind.SCRATCH or b.dtype.value not in narrow for b in sharing):
            return f"{name} cannot be flagged"
    for task in order:
        detector.run(task)
    found = detector.finish()
    return found[0].text if found else ""


def _placed(s: Schedule) -> str:
    """Bytes of the arena: inside, on 16-byte boundaries, and flagged ones where launches clear them, others not."""
    sets = range(s.flagged_start, s.flagged_start + 2 * s.flagged_bytes)
    if s.flagged_start < 0 or s.flagged_bytes < 0 or s.flagged_start % 16 or s.flagged_bytes % 16:
        return "the flagged sets are no whole vectors"
    if len(sets) and sets.stop > s.arena_bytes:
        return "the flagged sets leave the arena"
    touched = {s.tasks.buffers[a.buffer].storage for t in s.tasks.tasks for a in (*t.reads, *t.writes)}
    for name, b in s.tasks.buffers.items():
        if b.kind is not BufferKind.SCRATCH:
            if name in s.arena:
                return f"{name} is not the arena's"
            continue
        if b.storage not in s.arena:
            if b.storage in touched and b.numel:
                return f"{name} has no place"
            continue
        at = s.arena[b.storage]
        if at < 0 or at + b.nbytes > s.arena_bytes or at % 16:
            return f"{name} leaves the arena, or its vectors are misaligned"
        if name in s.tasks.flagged:
            if at < sets.start or at + b.nbytes > sets.start + s.flagged_bytes:
                return f"{name} is not in the first flagged set"
        elif b.nbytes and at < sets.stop and at + b.nbytes > sets.start:
            return f"{name} lies where launches write sentinels"
    unknown = set(s.arena) - set(s.tasks.buffers)
    return f"{sorted(unknown)} in the arena" if unknown else ""


def _meaning(p: Program) -> object:
    """What the device reads, worker by worker, with every index followed; None when one leads nowhere. Padding, what no
    index reaches, and arguments that no body looks at are left out."""
    if {n for n, _ in abi.TABLES} != set(p.tables):
        return None
    t: dict[str, np.ndarray] = {}
    for name, struct in abi.TABLES:
        if len(p.tables[name]) % struct.dtype.itemsize:
            return None
        t[name] = np.frombuffer(p.tables[name], struct.dtype)

    def rows(name: str, start: int, count: int) -> list[Any]:
        if start < 0 or count < 0 or start + count > len(t[name]):
            raise VerificationError("P1", "an index leads nowhere")
        return t[name][start : start + count].tolist()

    out: list[object] = []
    try:
        for q in t["queues"]:
            for op, ident, o, oc, w, wc, s, sc, arg in rows("tasks", int(q["task"]), int(q["task_count"])):
                linear = op < len(p.kinds) and p.kinds[op].startswith("linear")
                segments = [x[:3] for x in rows("segments", arg[6], arg[7])] if linear else []
                arguments = tuple(arg)[:6] if linear else tuple(arg)
                counted = sorted(rows("waits", w, wc)), sorted(rows("signals", s, sc))
                out.append((op, ident, rows("operands", o, oc), *counted, segments, arguments))
            out.append(rows("runs", int(q["run"]), int(q["run_count"])))
    except VerificationError:
        return None
    return out
