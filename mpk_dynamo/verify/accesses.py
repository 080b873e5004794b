"""Declared accesses, with equal ones gathered: 132 tasks that read the same box are one group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..ir.graph import writes
from ..ir.region import Access, Box
from ..ir.tasks import TaskGraph, task_name
from ..ir.types import Buffer
from .overlap import Overlaps, Pairs, TaskLists, stack


@dataclass(slots=True)
class Group:
    """All tasks that declare one access. `tasks` ascends; a task appears once per declaration."""

    access: Access
    buffer: Buffer
    tasks: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        box = ", ".join(f"{s}:{e}" for s, e in self.access.box)
        return f"{self.access.buffer}[{box}]" + (f" {self.access.side.value} position" if self.access.side else "")


@dataclass
class Storage:
    """Accesses to one storage; empty boxes left out. Box arrays are int64 [groups, rank, 2] over the same axes.

    partition and side are small integers per group: 0 is none.
    """

    name: str
    reads: list[Group]
    writes: list[Group]
    versions: dict[str, int]
    overlaps: Overlaps

    def __post_init__(self) -> None:
        groups = self.reads + self.writes
        buffers = {id(g.buffer): g.buffer for g in groups}.values()
        layouts = {(b.shape, b.strides, b.dtype.itemsize) for b in buffers}
        plain = len(layouts) == 1
        boxes: list[Box] = [g.access.box if plain else (_bytes(g.buffer, g.access.box),) for g in groups]
        k = len(self.reads)
        stacked = stack(boxes)
        self.read_boxes, self.write_boxes = stacked[:k], stacked[k:]
        marks = np.zeros((len(groups), 2), dtype=np.int64)
        texts: dict[str, int] = {"": 0}
        for n, g in enumerate(groups):
            if g.access.side is not None:
                text = texts.setdefault(g.access.partition, len(texts))
                marks[n] = text if plain else 0, 1 + list(type(g.access.side)).index(g.access.side)
        self.read_marks, self.write_marks = marks[:k], marks[k:]
        self.read_tasks, self.write_tasks = (TaskLists([g.tasks for g in gs]) for gs in (self.reads, self.writes))
        versions = np.zeros(len(groups), dtype=np.int64)
        if any(self.versions[b.name] for b in buffers):
            versions[:] = [self.versions[g.buffer.name] for g in groups]
        self.read_version, self.write_version = versions[:k], versions[k:]

    def twice_written(self) -> Iterable[Pairs]:
        """Pairs of writes that overlap, each with itself too: (i, j, common elements), in pieces."""
        return self.overlaps(self.write_boxes, self.write_boxes)

    def read_written(self) -> Iterable[Pairs]:
        """Pairs of a write i and a read j that overlap."""
        return self.overlaps(self.write_boxes, self.read_boxes)


def _bytes(buffer: Buffer, box: Box) -> tuple[int, int]:
    """First and one past the last byte of a box: comparable between views of different shape."""
    first = sum(s * stride for (s, _), stride in zip(box, buffer.strides, strict=True))
    last = sum((e - 1) * stride for (_, e), stride in zip(box, buffer.strides, strict=True))
    return min(first, last) * buffer.dtype.itemsize, (max(first, last) + 1) * buffer.dtype.itemsize


class AccessIndex:
    """reads, writes: groups by declared access, all buffers. storages: those that anything writes."""

    def __init__(self, tg: TaskGraph) -> None:
        self.reads = _gather(tg, [t.reads for t in tg.tasks])
        self.writes = _gather(tg, [t.writes for t in tg.tasks])
        self.accesses = sum(len(g.tasks) for g in self.reads + self.writes)
        self._tg = tg

    def storages(self) -> list[Storage]:
        """Call only once every access is known to be inside its buffer (rule T1)."""
        versions = version_numbers(self._tg)
        written: dict[str, tuple[list[Group], list[Group]]] = {}
        for g in self.writes:
            if not _empty(g.access.box):
                written.setdefault(g.buffer.storage, ([], []))[1].append(g)
        for g in self.reads:
            if g.buffer.storage in written and not _empty(g.access.box):
                written[g.buffer.storage][0].append(g)
        overlaps = Overlaps()
        return [Storage(name, rs, ws, versions, overlaps) for name, (rs, ws) in written.items()]


def _empty(box: Box) -> bool:
    for s, e in box:
        if s >= e:
            return True
    return False


def _gather(tg: TaskGraph, declared: Sequence[tuple[Access, ...]]) -> list[Group]:
    by_identity: dict[int, list[int]] = {}
    by_value: dict[tuple[object, ...], Group] = {}
    for t, accesses in enumerate(declared):
        for a in accesses:
            # tiling shares Access objects between tasks: looking at identity first saves hashing boxes
            tasks = by_identity.get(id(a))
            if tasks is None:
                key = (a.buffer, a.box, a.partition, a.side)
                group = by_value.get(key)
                if group is None:
                    group = by_value[key] = Group(a, tg.buffers.get(a.buffer, _UNKNOWN))
                tasks = by_identity[id(a)] = group.tasks
            tasks.append(t)
    return list(by_value.values())


_UNKNOWN: Buffer = None  # type: ignore[assignment]  # rule T1 refuses it before anyone looks inside


def version_numbers(tg: TaskGraph) -> dict[str, int]:
    """How many earlier versions of its memory each buffer has: 0 as the caller passed it, then in writing order."""
    numbers: dict[str, int] = {b.name: 0 for b in tg.buffers.values()}
    last: dict[str, int] = {}
    for node in tg.graph.nodes:
        for name in writes(node):
            b = tg.buffers.get(name)
            if b is not None and b.name != b.storage and not numbers[name]:
                numbers[name] = last[b.storage] = last.get(b.storage, 0) + 1
    return numbers


def names(tg: TaskGraph, tasks: Sequence[int] | np.ndarray, limit: int = 3) -> str:
    """Tasks in the words of the model."""
    shown = ", ".join(f"{task_name(tg, tg.tasks[int(t)])} (t{int(t)})" for t in tasks[:limit])
    return shown + (f" and {len(tasks) - limit} more" if len(tasks) > limit else "")
