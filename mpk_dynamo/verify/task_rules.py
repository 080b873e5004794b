"""Rules T1 to T3, T9 and T10: what tasks and events must be by themselves, before any order is looked at."""

from __future__ import annotations

from itertools import chain

import numpy as np

from ..errors import VerificationError
from ..ir.graph import reads, writes
from ..ir.region import Access
from ..ir.tasks import Task, TaskGraph, task_name
from ..ir.types import BufferKind
from .accesses import AccessIndex, Group, names
from .overlap import stack


def fail(rule: str, tg: TaskGraph, task: Task | None, text: str) -> VerificationError:
    """The error, with the place in the model of one task."""
    origin = tg.graph.nodes[task.node].origin if task is not None and 0 <= task.node < len(tg.graph.nodes) else ""
    return VerificationError(rule, text, origin=origin)


def check_tasks(tg: TaskGraph) -> None:
    """T1, first part: tasks are numbered by place and belong to a node."""
    for i, t in enumerate(tg.tasks):
        if t.id != i:
            raise fail("T1", tg, t, f"task at place {i} has id {t.id}")
        if not 0 <= t.node < len(tg.graph.nodes):
            raise fail("T1", tg, None, f"task {i} belongs to node {t.node} of {len(tg.graph.nodes)}")
    for name, b in tg.buffers.items():
        if name != b.name:
            raise fail("T1", tg, None, f"buffer {b.name!r} is filed as {name!r}")
    for name, b in tg.graph.buffers.items():
        if tg.buffers.get(name) != b:
            raise fail("T1", tg, None, f"buffer {name!r} of the graph became {tg.buffers.get(name)!r} by tiling")


def check_accesses(tg: TaskGraph, index: AccessIndex) -> None:
    """T1, second part: every access lies inside a known buffer; what the caller keeps constant is not written."""
    for is_write, groups in ((False, index.reads), (True, index.writes)):
        for g in _suspicious(groups, is_write):
            wrong = _wrong(g, is_write)
            if wrong:
                task = tg.tasks[g.tasks[0]]
                verb = "writes" if is_write else "reads"
                raise fail("T1", tg, task, f"{task_name(tg, task)} (t{task.id}) {verb} {_text(g.access)}: {wrong}")


def _suspicious(groups: list[Group], is_write: bool) -> list[Group]:
    """Those that `_wrong` must look at. Most are plain boxes inside their buffers, which numpy sees many times faster,
    and of which layers share the objects."""
    odd: list[Group] = []
    by_rank: dict[int, list[Group]] = {}
    seen: dict[int, tuple[int, ...]] = {}  # by identity of a box: a shape it is compared with
    for g in groups:
        a, b = g.access, g.buffer
        if b is None or a.side is not None or a.partition or len(a.box) != len(b.shape):
            odd.append(g)
        elif is_write and b.kind not in (BufferKind.SCRATCH, BufferKind.OUTPUT):
            odd.append(g)
        elif a.box and seen.get(id(a.box)) != b.shape:
            seen[id(a.box)] = b.shape
            by_rank.setdefault(len(a.box), []).append(g)
    for same in by_rank.values():
        boxes = stack([g.access.box for g in same])
        sizes = np.fromiter(chain.from_iterable(g.buffer.shape for g in same), dtype=np.int64).reshape(len(same), -1)
        start, stop = boxes[:, :, 0], boxes[:, :, 1]
        inside = ((start >= 0) & (start <= stop) & (stop <= sizes)).all(axis=1)
        odd += [same[k] for k in np.flatnonzero(~inside).tolist()]
    return odd


def _text(a: Access) -> str:
    return f"{a.buffer}[{', '.join(f'{s}:{e}' for s, e in a.box)}]"


def _wrong(g: Group, is_write: bool) -> str:
    a, b = g.access, g.buffer
    if b is None:
        return "there is no such buffer"
    if len(a.box) != len(b.shape):
        return f"{len(a.box)} dimensions for a buffer of shape {list(b.shape)}"
    for d, ((start, stop), size) in enumerate(zip(a.box, b.shape, strict=True)):
        if not 0 <= start <= stop <= size:
            return f"dimension {d}: {start}:{stop} is not inside 0:{size}"
    if (a.side is None) != (a.partition == ""):
        return f"side {a.side} of partition {a.partition!r}"
    if is_write and b.kind in (BufferKind.PARAM, BufferKind.INPUT):
        return f"a {b.kind.value} is never written"
    if is_write and b.kind is BufferKind.STATE and b.name == b.storage:
        return "a state is written through a later version, not as the caller passed it"
    return ""


def check_events(tg: TaskGraph) -> None:
    """T2: an event's count is its number of distinct producers, none of which waits for it."""
    n = len(tg.tasks)
    for i, e in enumerate(tg.events):
        producers, waiters = set(e.producers), set(e.waiters)
        members = producers | waiters
        if e.id != i:
            raise fail("T2", tg, None, f"event at place {i} has id {e.id}")
        if members and not (0 <= min(members) and max(members) < n):
            raise fail(
                "T2", tg, None, f"event {i} names a task outside 0:{n}: {sorted(members)[0]}, {sorted(members)[-1]}"
            )
        if not producers:
            raise fail(
                "T2", tg, None, f"event {i} has no producer: its waiters {names(tg, e.waiters)} wait for nothing"
            )
        for role, tasks, distinct in (("producer", e.producers, producers), ("waiter", e.waiters, waiters)):
            if len(tasks) != len(distinct):
                twice = next(t for k, t in enumerate(tasks) if t in tasks[:k])
                text = f"event {i} has {names(tg, [twice])} as {role} twice; a count of {len(tasks)} is wrong"
                raise fail("T2", tg, tg.tasks[twice], text)
        if producers & waiters:
            both = min(producers & waiters)
            raise fail("T2", tg, tg.tasks[both], f"event {i}: {names(tg, [both])} waits for its own signal")


def check_ready(tg: TaskGraph) -> None:
    """T3: every wait is for earlier tasks only, so tasks run one by one in order never block, and none waits for
    ever."""
    for e in tg.events:
        if e.waiters and max(e.producers) >= min(e.waiters):
            p, w = max(e.producers), min(e.waiters)
            text = f"event {e.id}: {names(tg, [w])} waits for {names(tg, [p])}, which comes later in the order of tasks"
            raise fail("T3", tg, tg.tasks[w], text)


def check_nodes(tg: TaskGraph, index: AccessIndex) -> None:
    """T10: together, the tasks of a node touch the memory the node touches: nothing else is written, nothing is left
    out. Partial results that tiling added are free; weights are not compared (operators may read a part)."""
    added = set(tg.buffers) - set(tg.graph.buffers)
    read: list[set[str]] = [set() for _ in tg.graph.nodes]
    written: list[set[str]] = [set() for _ in tg.graph.nodes]
    node_of = [t.node for t in tg.tasks]
    for groups, sets in ((index.reads, read), (index.writes, written)):
        for g in groups:
            for node in {node_of[t] for t in g.tasks} if len(g.tasks) > 1 else (node_of[g.tasks[0]],):
                sets[node].add(g.buffer.name)
    for i, node in enumerate(tg.graph.nodes):
        extra = written[i] - set(writes(node)) - added
        missing = {w for w in writes(node) if tg.buffers[w].numel} - written[i]
        if extra or missing:
            what = f"write {sorted(extra)}, which it does not" if extra else f"leave {sorted(missing)} unwritten"
            raise VerificationError("T10", f"the tasks of {node.name} {what}", origin=node.origin)
        storages = {tg.buffers[name].storage for name in read[i]}
        unread = [r for r in reads(node) if tg.buffers[r].kind is not BufferKind.PARAM and written[i]]
        left = [r for r in unread if tg.buffers[r].storage not in storages]
        if left:
            raise VerificationError("T10", f"no task of {node.name} reads {sorted(left)}", origin=node.origin)
