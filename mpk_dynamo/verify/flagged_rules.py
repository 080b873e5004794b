"""Rules T12 and S8, and T3 for polls: storages whose elements are their own flags.

A reader of flagged memory polls each element until it is no sentinel. So these reads need no order, but they are
waits like those for events, and they can deadlock. They order no other memory: the orders of order.py know nothing of
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from ..errors import VerificationError
from ..ir.graph import ExtensionNode
from ..ir.schedule import Schedule
from ..ir.tasks import TaskGraph
from ..ir.types import Buffer, BufferKind
from .accesses import Group, Storage, names
from .overlap import volumes
from .task_rules import fail

LINE = 128
"""Bytes of a cache line: polling one buffer must not slow the writers of another."""

SET = 256
"""Bytes: alignment of the two sets."""


@dataclass(frozen=True)
class Poll:
    """Tasks that read one box of a flagged storage, and all that write elements of it; no task twice in either."""

    read: Group
    writers: tuple[int, ...]
    readers: tuple[int, ...]


def check_flagged(tg: TaskGraph, storages: list[Storage]) -> None:
    """T12: what is flagged is scratch memory with a spare value, each element of which one task writes, once."""
    if not tg.flagged:
        return
    by_name = {s.name: s for s in storages}
    foreign = {i for i, node in enumerate(tg.graph.nodes) if isinstance(node, ExtensionNode)}
    all_sharing: dict[str, list[Buffer]] = {name: [] for name in tg.flagged}
    for b in tg.buffers.values():
        if b.storage in all_sharing:
            all_sharing[b.storage].append(b)
    for name in sorted(tg.flagged):
        sharing = all_sharing[name]
        if len(sharing) != 1:
            raise VerificationError("T12", f"flagged {name!r} is the storage of {len(sharing)} buffers, not of one")
        b = sharing[0]
        if b.kind is not BufferKind.SCRATCH:
            raise VerificationError("T12", f"flagged {name} is a {b.kind.value}, not scratch memory", origin=b.origin)
        if not b.dtype.is_float or b.dtype.itemsize > 4:
            text = f"flagged {name} is {b.dtype.value}, which has no value to spare as the sentinel"
            raise VerificationError("T12", text, origin=b.origin)
        if not b.numel:
            continue
        if name not in by_name:
            raise VerificationError("T12", f"no task writes flagged {name}", origin=b.origin)
        _written_once(tg, by_name[name])
        _ours_alone(tg, by_name[name], foreign)


def _ours_alone(tg: TaskGraph, s: Storage, foreign: set[int]) -> None:
    """The body of an operator from outside this package, of nodes `foreign`, reads and writes plainly."""
    for g in (*s.reads, *s.writes) if foreign else ():
        for task in (tg.tasks[t] for t in g.tasks if tg.tasks[t].node in foreign):
            raise fail("T12", tg, task, f"{names(tg, [task.id])} uses flagged {s.name}; its operator is an extension")


def _written_once(tg: TaskGraph, s: Storage) -> None:
    for g in s.writes:
        if g.access.side is not None:
            text = f"flagged {g}: only the device knows which elements are written"
            raise fail("T12", tg, tg.tasks[g.tasks[0]], text)
    for i, j, _ in s.twice_written():
        twice = (i != j) | (s.write_tasks.counts[i] > 1)
        if twice.any():
            k = int(twice.argmax())
            tasks = sorted({*s.writes[i[k]].tasks, *s.writes[j[k]].tasks})
            text = f"elements of flagged {s.name} are written more than once: by {names(tg, tasks)}"
            raise fail("T12", tg, tg.tasks[tasks[-1]], text)
    b = s.writes[0].buffer
    total = int(volumes(s.write_boxes).sum())
    if total != b.numel:
        text = f"{total} of {b.numel} elements of flagged {s.name} are written"
        raise VerificationError("T12", text, origin=b.origin)


def polls(tg: TaskGraph, storages: list[Storage]) -> list[Poll]:
    """Every poll, one per distinct box that is read. A side of a partition counts as the whole box."""
    out = []
    for s in storages:
        if s.name not in tg.flagged:
            continue
        tasks = [g.tasks for g in s.writes]
        writers: list[list[list[int]]] = [[] for _ in s.reads]
        for i, j, _ in s.read_written():
            for write, read in zip(i.tolist(), j.tolist(), strict=True):
                writers[read].append(tasks[write])
        for read, lists in zip(s.reads, writers, strict=True):
            if lists:
                distinct = dict.fromkeys(chain.from_iterable(lists))
                out.append(Poll(read, tuple(distinct), tuple(dict.fromkeys(read.tasks))))
    return out


def check_polls(tg: TaskGraph, polled: list[Poll]) -> None:
    """T3 for polls: what a task polls is written by earlier tasks, so that tasks run one by one never block."""
    for p in polled:
        if max(p.writers) >= min(p.readers):
            writer, reader = max(p.writers), min(p.readers)
            what = "which it writes itself" if writer == reader else f"which {names(tg, [writer])} writes later"
            raise fail("T3", tg, tg.tasks[reader], f"{names(tg, [reader])} polls {p.read}, {what}")


def check_sets(s: Schedule) -> None:
    """S8: both sets of flagged memory are in the arena, apart from everything else; no two storages share a line."""
    start, size = s.flagged_start, s.flagged_bytes
    if start < 0 or size < 0 or start % SET or size % SET or start + 2 * size > s.arena_bytes:
        text = f"flagged memory at {start}, two sets of {size} bytes: not multiples of {SET} inside an arena of "
        raise VerificationError("S8", text + f"{s.arena_bytes} bytes")
    held: list[tuple[int, int, str]] = []
    for name, offset in s.arena.items():
        b = s.tasks.buffers[name]
        if name in s.tasks.flagged:
            if offset % LINE or offset < start or offset + b.nbytes > start + size:
                text = f"flagged {name} of {b.nbytes} bytes at {offset}: not a multiple of {LINE} inside the first "
                raise VerificationError("S8", text + f"set, {start}:{start + size}", origin=b.origin)
            held.append((offset, offset + b.nbytes, name))
        elif b.nbytes and offset < start + 2 * size and offset + b.nbytes > start:
            text = f"{name} at {offset}:{offset + b.nbytes} is no flagged storage and lies in flagged memory, "
            text += f"{start}:{start + 2 * size}, which launches clear"
            raise VerificationError("S8", text, origin=b.origin)
    held.sort()
    for (_, stop, a), (begin, _, b) in zip(held, held[1:], strict=False):
        if begin < stop:
            raise VerificationError("S8", f"flagged {a} and {b} share bytes {begin}:{stop} of the arena")
