"""A dynamic race detector: watches one execution of a task program, finds what another one could do differently.

Vector clocks (Fidge, Mattern) carry happens-before along queues and events; flagged data orders itself alone. For each
byte of the arena and each element of a caller's tensor it remembers who wrote last and how far each worker had read, as
FastTrack does for threads. An execution without a race is like every other one: conflicting accesses come in the same
order in all of them. So one execution that completes decides for all, whatever order it was taken in.

It looks at elements and at nothing else: no boxes, no rules. That makes it slow, and a second opinion on the verifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..ir.graph import writes
from ..ir.region import Access, Side
from ..ir.schedule import Schedule
from ..ir.tasks import TaskGraph, task_name
from ..ir.types import Buffer, BufferKind

OURS = (BufferKind.SCRATCH, BufferKind.OUTPUT)
"""Memory that holds nothing before the program writes it."""

ARENA = "the arena"


@dataclass(frozen=True)
class Race:
    """What went or could go wrong: `text` names tasks and memory. tasks: ids of those concerned."""

    text: str
    tasks: tuple[int, ...]


class Detector:
    """Give it each task in the order of an execution (`run`), then `finish`. `races` are found so far, at most LIMIT.

    queues: the chains that order tasks besides events; without them each task is alone. arena: byte offset of scratch
    storages that share memory. accesses: task id -> (reads, writes), default what the tasks declare.
    """

    LIMIT = 8

    def __init__(
        self,
        tg: TaskGraph,
        queues: Sequence[Sequence[int]] = (),
        arena: Mapping[str, int] | None = None,
        accesses: Mapping[int, tuple[Sequence[Access], Sequence[Access]]] | None = None,
    ) -> None:
        self.tg, self.arena = tg, arena or {}
        self.accesses = accesses or {t.id: (t.reads, t.writes) for t in tg.tasks}
        chains = [list(q) for q in queues] or [[t.id] for t in tg.tasks]
        self._chain = {t: c for c, tasks in enumerate(chains) for t in tasks}
        self._place = {t: k for tasks in chains for k, t in enumerate(tasks)}
        self._clock = np.zeros((len(tg.tasks), len(chains)), np.int32)
        """[task, chain]: tasks of the chain that have finished before it starts."""
        self._last: dict[int, np.ndarray] = {}
        self._event: dict[int, np.ndarray] = {}
        self._waits, self._signals = tg.waits(), tg.signals()
        self._version = _versions(tg)
        self._ids = {b.storage: i for i, b in enumerate(tg.buffers.values())}
        self._cells: dict[tuple[str, object], np.ndarray] = {}
        self._partitions = _partitions(self.accesses.values(), tg.buffers)
        self._spaces: dict[str, _Space] = {}
        self.races: list[Race] = []

    def run(self, task: int) -> None:
        """The task runs now: after everything it waits for, or that is reported."""
        chain, clock = self._chain[task], self._clock[task]
        if chain in self._last:
            np.maximum(clock, self._last[chain], out=clock)
        for e in self._waits[task]:
            if e in self._event:
                np.maximum(clock, self._event[e], out=clock)
        reads, written = self.accesses[task]
        for access in reads:
            self._read(task, access)
        for access in written:
            self._write(task, access)
        after = clock.copy()
        after[chain] = max(after[chain], self._place[task] + 1)
        self._last[chain] = after
        for e in self._signals[task]:
            self._event[e] = np.maximum(self._event[e], after) if e in self._event else after

    def finish(self) -> list[Race]:
        """All has run: the races, and outputs that nobody has written."""
        for b in self.tg.buffers.values():
            if b.kind is BufferKind.OUTPUT and b.numel and b.name == b.storage:
                missing = int((self._space(b).writer[self._where(b, None)] < 0).sum())
                if missing:
                    self._report(f"{missing} elements of output {b.name} are never written")
        return self.races

    def _read(self, task: int, access: Access) -> None:
        b = self.tg.buffers[access.buffer]
        space, at = self._space(b), self._where(b, access)
        if not len(at):
            return
        writer = space.writer[at]
        if b.kind in OURS:
            unset = (writer < 0) | (space.owner[at] != self._ids[b.storage])
            if unset.any():
                return self._report(f"{{0}} reads {int(unset.sum())} unwritten elements of {b.name}", task)
        if b.storage not in self.tg.flagged:
            self._ordered(task, b, writer, "reads what", "writes")
        version = self._version[b.name]
        if (space.version[at] > version).any():
            self._report(f"{{0}} reads {b.name}, of which elements have been overwritten", task)
        space.read_version[at] = np.maximum(space.read_version[at], version)
        chain = self._chain[task]
        # by others than the task itself: what it reads and then writes is its own affair
        space.readers[chain][at] = np.maximum(space.readers[chain][at], self._place[task] + 1)

    def _write(self, task: int, access: Access) -> None:
        b = self.tg.buffers[access.buffer]
        space, at = self._space(b), self._where(b, access)
        if not len(at):
            return
        writer, mine = space.writer[at], self._ids[b.storage]
        if b.kind in OURS and ((writer >= 0) & (space.owner[at] == mine)).any():
            self._report(f"{{0}} writes elements of {b.name} a second time", task)
        if b.storage in self.tg.flagged:
            if (writer >= 0).any():
                self._report(f"{{0}} publishes {b.name} where something else lies", task)
        else:
            self._ordered(task, b, writer, "overwrites what", "writes")
            chain, clock = self._chain[task], self._clock[task]
            for other, reader in space.readers.items():
                seen = reader[at]
                late = seen > clock[other] + (other == chain)  # in its own chain the task itself comes next
                if late.any():
                    return self._report(f"{{0}} overwrites {b.name}, which chain {other} may still read", task)
        version = self._version[b.name]
        if (space.version[at] > version).any() or (version and (space.read_version[at] >= version).any()):
            self._report(f"{{0}} writes {b.name} after a task that sees or makes a later version", task)
        space.writer[at], space.owner[at], space.version[at] = task, mine, version

    def _ordered(self, task: int, b: Buffer, writer: np.ndarray, does: str, did: str) -> None:
        for other in np.unique(writer[writer >= 0]).tolist():
            if other != task and self._place[other] >= self._clock[task, self._chain[other]]:
                self._report(f"{{0}} {does} {{1}} {did} in {b.name}, unordered", task, other)

    def _report(self, text: str, *tasks: int) -> None:
        if len(self.races) < self.LIMIT:
            words = [f"{task_name(self.tg, self.tg.tasks[t])} (t{t})" for t in tasks]
            self.races.append(Race(text.format(*words), tasks))

    def _space(self, b: Buffer) -> _Space:
        name = ARENA if b.storage in self.arena else b.storage
        if name not in self._spaces:
            size = _extent(self.tg.buffers, b.storage) << len(self._partitions.get(b.storage, ()))
            if name == ARENA:
                places = ((self.tg.buffers[n], at) for n, at in self.arena.items() if n in self.tg.buffers)
                size = max(at + x.nbytes for x, at in places)
            self._spaces[name] = _Space(size, sorted(set(self._chain.values())))
        return self._spaces[name]

    def _where(self, b: Buffer, access: Access | None) -> np.ndarray:
        """Cells of a space: bytes of the arena, or elements. An element of a storage with partitions has a cell for
        each answer to whether it lies at their positions; an access touches those that it may."""
        key = b.name, None if access is None else (access.box, access.partition, access.side)
        if key not in self._cells:
            flat = np.zeros((), np.int64)
            box = [(0, n) for n in b.shape] if access is None else access.box
            for (start, stop), stride in zip(box, b.strides, strict=True):
                flat = flat[..., None] + np.arange(start, stop) * stride
            flat = flat.ravel()
            if b.storage in self.arena:
                size = b.dtype.itemsize
                flat = (self.arena[b.storage] + flat[:, None] * size + np.arange(size)).ravel()
            elif b.storage in self._partitions:
                flat = (flat[:, None] << len(self._partitions[b.storage])) + self._variants(b, access)
            self._cells[key] = flat.ravel()
        return self._cells[key]

    def _variants(self, b: Buffer, access: Access | None) -> np.ndarray:
        names = self._partitions[b.storage]
        every = np.arange(1 << len(names))
        if access is None or access.side is None:
            return every
        at = (every >> names.index(access.partition)) & 1
        return every[at == (access.side is Side.AT)]


class _Space:
    """Shadow memory. By cell: task of the last write, storage it was for, version written and greatest version read;
    and for each chain, how many of its tasks had begun when it last read."""

    def __init__(self, size: int, chains: Iterable[int]) -> None:
        self.writer = np.full(size, -1, np.int32)
        self.owner = np.full(size, -1, np.int32)
        self.version, self.read_version = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        self.readers = {c: np.zeros(size, np.int32) for c in chains}


def find_races(schedule: Schedule, sequence: Iterable[int]) -> list[Race]:
    """Of a Schedule, from one of its complete executions (see `interleave`)."""
    detector = Detector(schedule.tasks, schedule.queues, schedule.arena)
    for task in sequence:
        detector.run(task)
    return detector.finish()


def _extent(buffers: Mapping[str, Buffer], storage: str) -> int:
    """Elements of a storage, as far as any of its versions reaches."""
    reach = [
        1 + sum((n - 1) * stride for n, stride in zip(b.shape, b.strides, strict=True))
        for b in buffers.values()
        if b.storage == storage and b.numel
    ]
    return max(reach, default=0)


def _versions(tg: TaskGraph) -> dict[str, int]:
    """0 as the caller passed it, then in the order of writing nodes."""
    number = dict.fromkeys(tg.buffers, 0)
    count: dict[str, int] = {}
    for node in tg.graph.nodes:
        for name in writes(node):
            b = tg.buffers.get(name)
            if b is not None and b.name != b.storage:
                number[name] = count[b.storage] = count.get(b.storage, 0) + 1
    return number


def _partitions(
    accesses: Iterable[tuple[Sequence[Access], Sequence[Access]]], buffers: Mapping[str, Buffer]
) -> dict[str, list[str]]:
    """Storage -> the partitions that accesses to it speak of."""
    found: dict[str, list[str]] = {}
    for reads, written in accesses:
        for a in (*reads, *written):
            if a.side is not None:
                names = found.setdefault(buffers[a.buffer].storage, [])
                if a.partition not in names:
                    names.append(a.partition)
    return found
