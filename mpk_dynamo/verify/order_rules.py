"""Rules T4 to T6 and T9: conflicting accesses are ordered, and every element has the value the graph says."""

from __future__ import annotations

import numpy as np

from ..errors import VerificationError
from ..ir.tasks import TaskGraph
from ..ir.types import BufferKind
from .accesses import Group, Storage, names
from .order import Order
from .overlap import products, ranges, volumes
from .report import Report
from .task_rules import fail

EXACT = (BufferKind.SCRATCH, BufferKind.OUTPUT)
"""Buffers whose elements are all written, once."""


def check_storages(tg: TaskGraph, storages: list[Storage], order: Order, report: Report) -> None:
    """T4, T5, T6 and T9 for every storage that a task writes, and T6 for those that none writes."""
    for s in storages:
        exact = s.writes[0].buffer.kind in EXACT
        if exact:
            _plain_writes(tg, s)
        report.count(access_pairs=_conflicts(tg, s, s.writes, s.writes, order, exact))
        if s.name not in tg.flagged:  # readers of flagged memory poll; check_polls and replay see to that
            report.count(access_pairs=_conflicts(tg, s, s.writes, s.reads, order, exact))
        if exact and (s.reads or s.writes[0].buffer.kind is BufferKind.OUTPUT):
            _covered(tg, s)
            _initialised(tg, s)
    written = {s.name for s in storages}
    read = {g.buffer.name for s in storages for g in s.reads}
    for name, b in tg.buffers.items():
        if b.kind is BufferKind.OUTPUT and b.storage not in written and b.numel:
            raise VerificationError("T6", f"no task writes output {name}", origin=b.origin)
    report.count(storages=len(storages), buffers_read=len(read))


def check_unwritten(tg: TaskGraph, reads: list[Group], storages: list[Storage]) -> None:
    """T5 for storages that no task writes: scratch memory and outputs hold nothing to read."""
    written = {s.name for s in storages}
    for g in reads:
        if g.buffer.kind in EXACT and g.buffer.storage not in written and g.buffer.numel:
            text = f"{names(tg, g.tasks)} reads {g}, which no task writes"
            raise fail("T5", tg, tg.tasks[g.tasks[0]], text)


def _plain_writes(tg: TaskGraph, s: Storage) -> None:
    for g in s.writes:
        if g.access.side is not None:
            text = f"{names(tg, g.tasks)} writes {g}: only the device knows which elements, so the rest may stay unset"
            raise fail("T6", tg, tg.tasks[g.tasks[0]], text)


def _conflicts(tg: TaskGraph, s: Storage, ws: list[Group], others: list[Group], order: Order, exact: bool) -> int:
    """T4 and T9 (and T6: nothing is written twice) over pairs of a write and another access. Number of pairs."""
    both_write = others is s.writes
    marks, lists, versions = (
        (s.write_marks, s.write_tasks, s.write_version) if both_write else (s.read_marks, s.read_tasks, s.read_version)
    )
    checked = 0
    for i, j, _ in s.twice_written() if both_write else s.read_written():
        # same partition, different sides: disjoint wherever the position is
        apart = (s.write_marks[i, 0] > 0) & (s.write_marks[i, 0] == marks[j, 0]) & (s.write_marks[i, 1] != marks[j, 1])
        keep = ~apart & (i <= j) if both_write else ~apart
        i, j = i[keep], j[keep]
        if both_write and exact:
            _once(tg, s, i, j)
            i, j = i[i != j], j[i != j]
        for p, a, b in products(s.write_tasks, i, lists, j):
            first, last = np.minimum(a, b), np.maximum(a, b)
            bad = (a != b) & ~order.before(first, last)
            if bad.any():
                k = int(np.argmax(bad))
                raise _unordered(tg, ws[i[p[k]]], others[j[p[k]]], int(a[k]), int(b[k]), order, both_write)
            if s.write_version.any():
                # an access before a write of version v sees an older version, one after it v or a newer one
                v, u = s.write_version[i[p]], versions[j[p]]
                bad = (
                    np.where(a < b, u < v, u >= v) & (a != b)
                    if not both_write
                    else (a < b) & (u < v) | (a > b) & (u > v)
                )
                if bad.any():
                    k = int(np.argmax(bad))
                    g, h = ws[i[p[k]]], others[j[p[k]]]
                    verb = "writes" if both_write else "reads"
                    text = f"{names(tg, [a[k]])} writes {g} and {names(tg, [b[k]])} {verb} {h}, but comes "
                    text += "after it" if a[k] < b[k] else "before it"
                    raise fail("T9", tg, tg.tasks[int(b[k])], text)
            checked += len(p)
    return checked


def _once(tg: TaskGraph, s: Storage, i: np.ndarray, j: np.ndarray) -> None:
    """T6, first half: no element is written twice."""
    twice = (i != j) | (s.write_tasks.counts[i] > 1)
    if twice.any():
        k = int(np.argmax(twice))
        g, h = s.writes[i[k]], s.writes[j[k]]
        tasks = g.tasks[:2] if i[k] == j[k] else [g.tasks[0], h.tasks[0]]
        text = f"{names(tg, tasks)} both write elements of {s.name}: {g} and {h}"
        raise fail("T6", tg, tg.tasks[tasks[1]], text)


def _unordered(tg: TaskGraph, g: Group, h: Group, a: int, b: int, order: Order, both_write: bool) -> VerificationError:
    first, last = min(a, b), max(a, b)
    backwards = bool(order.before(np.array([last]), np.array([first]))[0])
    relation = f"runs after {names(tg, [last])}, against the order of tasks" if backwards else (
        f"is not ordered before {names(tg, [last])}"
    )  # fmt: skip
    kind = "both write" if both_write else ("read after write of" if a < b else "write after read of")
    text = f"{names(tg, [first])} {relation}; {kind} {g.buffer.storage}: t{a} writes {g}, t{b} "
    text += f"{'writes' if both_write else 'reads'} {h}"
    return fail("T4", tg, tg.tasks[last], text)


def _covered(tg: TaskGraph, s: Storage) -> None:
    """T6, second half: written boxes are disjoint by now, so their volumes add up to the size or some are missing."""
    b = s.writes[0].buffer
    total = int(volumes(s.write_boxes).sum())
    if total != b.numel:
        hole = _hole(s.write_boxes, np.array([[0, n] for n in b.shape], dtype=np.int64).reshape(-1, 2))
        text = f"{total} of {b.numel} elements of {b.kind.value} {b.name} are written; nobody writes {b.name}{hole}"
        raise VerificationError("T6", text, origin=b.origin)


def _initialised(tg: TaskGraph, s: Storage) -> None:
    """T5: the writes that come before a read cover it. Disjoint writes, so it is enough to add common volumes."""
    if not s.reads:
        return
    lists = s.read_tasks
    first = np.array([g.tasks[0] for g in s.reads], dtype=np.int64)
    all_have = np.zeros(len(s.reads))  # elements written before every reader of the group
    have = np.zeros(len(lists.flat))  # and those written before this one only; float64 is exact below 2**53
    for i, j, common in s.read_written():
        writer = s.write_tasks.flat[s.write_tasks.starts[i]]  # one task per written box, or T6 has failed
        early = writer < first[j]
        all_have += np.bincount(j[early], weights=common[early], minlength=len(s.reads))
        late, common = j[~early], common[~early]
        for p, place in ranges(lists.starts[late], lists.counts[late]):
            before = writer[~early][p] < lists.flat[place]
            have += np.bincount(place[before], weights=common[p[before]], minlength=len(have))
    have += np.repeat(all_have, lists.counts)
    need = np.repeat(volumes(s.read_boxes), lists.counts)
    if (have < need).any():
        k = int(np.argmax(have < need))
        g = s.reads[int(np.searchsorted(lists.starts, k, side="right")) - 1]
        t = int(lists.flat[k])
        text = f"{names(tg, [t])} reads {need[k]} elements {g}, of which tasks before it write only {int(have[k])}"
        raise fail("T5", tg, tg.tasks[t], text)


def _hole(boxes: np.ndarray, space: np.ndarray) -> str:
    """One box that no write touches, found by cutting `space` along the edges of what is written."""
    if not len(space):
        return "[]"
    corner = space.copy()
    for d in range(len(space)):
        # keep to the first slab along d that is not filled by the boxes that reach it
        edges = sorted({int(space[d, 0]), int(space[d, 1]), *boxes[:, d, :].ravel().tolist()})
        for start, stop in zip(edges, edges[1:], strict=False):
            inside = boxes[(boxes[:, d, 0] <= start) & (boxes[:, d, 1] >= stop)]
            slab = int(np.prod(space[d + 1 :, 1] - space[d + 1 :, 0])) if d + 1 < len(space) else 1
            if int(volumes(inside[:, d + 1 :]).sum() if d + 1 < len(space) else len(inside)) < slab:
                corner[d] = start, stop
                boxes = inside
                break
    return "[" + ", ".join(f"{s}:{e}" for s, e in corner) + "]"
