"""Rules S1, S3, S5 and S6: queues, arena and event slots of a Schedule."""

from __future__ import annotations

import numpy as np

from ..errors import VerificationError
from ..ir.schedule import Schedule
from ..ir.types import BufferKind
from .accesses import AccessIndex, names
from .order import QueueOrder

ALIGNMENT = 256
"""Bytes. Bulk copies need 16, vector loads 16, and no two buffers share a 128-byte line."""


def check_queues(s: Schedule) -> None:
    """S1: each task is in exactly one queue."""
    n = len(s.tasks.tasks)
    where: list[tuple[int, int] | None] = [None] * n
    for w, queue in enumerate(s.queues):
        for k, t in enumerate(queue):
            if not 0 <= t < n:
                raise VerificationError("S1", f"queue {w} names task {t} at place {k}; there are {n} tasks")
            if where[t] is not None:
                first = f"at place {where[t][1]} of queue {where[t][0]}"
                raise VerificationError("S1", f"{names(s.tasks, [t])} is {first} and at place {k} of queue {w}")
            where[t] = (w, k)
    left = [t for t in range(n) if where[t] is None]
    if left:
        raise VerificationError("S1", f"no queue holds {names(s.tasks, left)}")


def check_slots(s: Schedule) -> None:
    """S5: every event has a counter of its own. Counters are never reset within a launch, so none can be reused."""
    if len(s.slots) != len(s.tasks.events):
        raise VerificationError("S5", f"{len(s.slots)} slots for {len(s.tasks.events)} events")
    owner: dict[int, int] = {}
    for e, slot in enumerate(s.slots):
        if slot < 0:
            raise VerificationError("S5", f"event {e} has slot {slot}")
        if slot in owner:
            raise VerificationError("S5", f"events {owner[slot]} and {e} share slot {slot}")
        owner[slot] = e


def check_workers(s: Schedule, target: object | None) -> None:
    """S6: all workers are resident at once, one per multiprocessor; otherwise a wait may never end."""
    if not s.workers:
        raise VerificationError("S6", "the schedule has no worker")
    limit = getattr(target, "sm_count", None)
    if limit is not None and s.workers > limit:
        raise VerificationError(
            "S6", f"{s.workers} workers on {limit} multiprocessors of {getattr(target, 'name', '')}"
        )


def check_offsets(s: Schedule, index: AccessIndex) -> None:
    """S3, first half: scratch buffers lie inside the arena, aligned; nothing else does. S8 says where flagged ones."""
    buffers = s.tasks.buffers
    for name, offset in s.arena.items():
        b = buffers.get(name)
        if b is None or b.kind is not BufferKind.SCRATCH:
            raise VerificationError("S3", f"the arena holds {name!r}, which is no scratch buffer")
        if (offset % ALIGNMENT and name not in s.tasks.flagged) or offset < 0 or offset + b.nbytes > s.arena_bytes:
            text = f"{name} of {b.nbytes} bytes at offset {offset}"
            text += f": not a multiple of {ALIGNMENT} inside an arena of {s.arena_bytes} bytes"
            raise VerificationError("S3", text, origin=b.origin)
    for g in index.reads + index.writes:
        if g.buffer.kind is BufferKind.SCRATCH and g.buffer.storage not in s.arena:
            raise VerificationError("S3", f"{names(s.tasks, g.tasks)} uses {g}, which has no place in the arena")


def check_lifetimes(s: Schedule, index: AccessIndex, order: QueueOrder) -> int:
    """S3, second half: plain buffers that share bytes of the arena are used one after the other. Number of pairs
    checked. Flagged ones share none, which is rule S8.

    A buffer is over when, on every worker, the last task that touches it is done: `over`, a count per worker. What
    is certain to be done before any task that touches a buffer is the minimum of their clocks: `start`.
    """
    users: dict[str, set[int]] = {}
    for g in index.reads + index.writes:
        if g.buffer.kind is BufferKind.SCRATCH:
            users.setdefault(g.buffer.storage, set()).update(g.tasks)
    plain = [name for name in s.arena if name not in s.tasks.flagged]
    live = [name for name in plain if users.get(name) and s.tasks.buffers[name].nbytes]
    if not live:
        return 0
    begin = np.array([s.arena[name] for name in live], dtype=np.int64)
    end = begin + np.array([s.tasks.buffers[name].nbytes for name in live], dtype=np.int64)
    over = np.zeros((len(live), s.workers), dtype=np.int32)
    start = np.zeros((len(live), s.workers), dtype=np.int32)
    for k, name in enumerate(live):
        tasks = np.fromiter(users[name], dtype=np.int64)
        np.maximum.at(over[k], order.worker[tasks], order.position[tasks].astype(np.int32) + 1)
        start[k] = order.clocks[tasks].min(axis=0)
    pairs = 0
    for k in range(len(live)):
        others = np.flatnonzero((begin < end[k]) & (end > begin[k]))
        others = others[others > k]
        pairs += len(others)
        fine = (start[others] >= over[k]).all(axis=1) | (start[k] >= over[others]).all(axis=1)
        if not fine.all():
            raise _overlap(s, live[k], live[int(others[np.argmin(fine)])], users, order)
    return pairs


def _overlap(s: Schedule, a: str, b: str, users: dict[str, set[int]], order: QueueOrder) -> VerificationError:
    """Name a pair of tasks in each direction that is not ordered."""
    parts = []
    for x, y in ((a, b), (b, a)):
        first, last = np.array(sorted(users[x])), np.array(sorted(users[y]))
        loose = ~order.before(first[:, None], last[None, :])
        i, j = np.unravel_index(int(np.argmax(loose)), loose.shape)
        parts.append(f"{names(s.tasks, [first[i]])} of {x} may run after {names(s.tasks, [last[j]])} of {y}")
    where = ", ".join(f"{n} at {s.arena[n]}:{s.arena[n] + s.tasks.buffers[n].nbytes}" for n in (a, b))
    return VerificationError("S3", f"{where} share memory while both are in use: {'; '.join(parts)}")
