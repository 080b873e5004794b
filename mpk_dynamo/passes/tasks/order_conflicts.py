"""Exact events from declared accesses: order every conflicting pair of tasks, with no redundant dependency.

Two tasks conflict when one writes an element of a storage that the other may touch (read after write, write after
read, write after write). The order of the task list says which comes first. Of all the dependencies a task has,
only those are kept that no other one implies (the transitive reduction, which is unique for an acyclic relation:
Aho, Garey, Ullman 1972); tasks that need the same set of producers share one counter.

Sets of tasks are Python integers used as bitsets. What makes it fast for tens of thousands of tasks with
all-to-all dependencies: the set of producers is found once per distinct extent and state of the storage, and
reduced once per distinct set.

A read of a flagged storage waits for its data by itself. This brings no event, and implies none either: a poll that
has seen the data says nothing about other memory, so what two tasks share beside a flagged storage is ordered as if
that storage did not exist.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.region import Access
from ...ir.tasks import Event, TaskGraph
from .overlaps import Extent, Overlaps


class _Storage:
    """Tasks that wrote and read a storage so far, less those that a later write supersedes."""

    __slots__ = ("extents", "table", "tasks", "live", "state", "found")

    def __init__(self) -> None:
        self.extents: dict[Extent, tuple[_Storage, int]] = {}  # to what an access of that extent resolves to

    def prepare(self, tables: dict[tuple[Extent, ...], Overlaps]) -> None:
        keys = tuple(self.extents)
        if keys not in tables:
            tables[keys] = Overlaps(keys)
        n = len(keys)
        self.table = tables[keys]
        # index 0: writers, 1: readers
        self.tasks = ([0] * n, [0] * n)  # bitset of tasks, by extent
        self.live = [0, 0]  # bitset of extents that have any
        self.state = [0, 0]  # counts changes
        self.found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([(0, 0)] * n, [(0, 0)] * n)

    def conflicting(self, extent: int, role: int) -> int:
        """Earlier writers (role 0) or readers (role 1) that meet an access of that extent."""
        state, mask = self.found[role][extent]
        if state != self.state[role]:
            mask, tasks = 0, self.tasks[role]
            left = self.table.meets[extent] & self.live[role]
            while left:
                low = left & -left
                mask |= tasks[low.bit_length() - 1]
                left ^= low
            self.found[role][extent] = (self.state[role], mask)
        return mask

    def read(self, extent: int, task: int) -> None:
        self._add(extent, 1, task)

    def write(self, extent: int, task: int) -> None:
        # What conflicts with an access that this one covers also conflicts with this one, and this one is ordered
        # after it: the older access implies nothing more.
        for role in (0, 1):
            gone = self.table.covers[extent] & self.live[role]
            self.live[role] &= ~gone
            while gone:
                low = gone & -gone
                self.tasks[role][low.bit_length() - 1] = 0
                gone ^= low
        self.state[1] += 1
        self._add(extent, 0, task)

    def _add(self, extent: int, role: int, task: int) -> None:
        self.tasks[role][extent] |= task
        self.live[role] |= 1 << extent
        self.state[role] += 1


class _Frontier:
    """Tasks to wait for, none of which precedes another. closure: these and all that precede them."""

    __slots__ = ("producers", "bits", "closure")

    def __init__(self, producers: tuple[int, ...], closure: int) -> None:
        self.producers, self.closure = producers, closure
        self.bits = sum(1 << p for p in producers)


class _Reducer:
    """Reduces sets of predecessors to frontiers. `of[t]` is the frontier of task t, None when it waits for nothing."""

    def __init__(self, tasks: int) -> None:
        self.of: list[_Frontier | None] = [None] * tasks
        self._by_set: dict[int, _Frontier] = {}
        self._by_producers: dict[tuple[int, ...], _Frontier] = {}

    def reduce(self, predecessors: int) -> _Frontier:
        known = self._by_set.get(predecessors)
        if known is not None:
            return known
        producers, closure, left, last = [], predecessors, predecessors, None
        while left:
            # The latest of them precedes none of the others, and is preceded by whatever its own closure holds.
            task = left.bit_length() - 1
            producers.append(task)
            left ^= 1 << task
            before = self.of[task]
            if before is not None and before is not last:  # tasks of one node mostly share their frontier
                closure |= before.closure
                left &= ~before.closure
                last = before
        producers.reverse()
        key = tuple(producers)
        frontier = self._by_producers.get(key)
        if frontier is None:
            frontier = self._by_producers[key] = _Frontier(key, closure)
        self._by_set[predecessors] = frontier
        return frontier

    def combine(self, sets: list[int]) -> _Frontier | None:
        """The frontier of the union."""
        frontier = None
        for predecessors in sorted(sets, key=int.bit_length, reverse=True):
            if frontier is None:
                frontier = self.reduce(predecessors)
            elif predecessors | frontier.closure != frontier.closure:
                frontier = self.reduce(frontier.bits | predecessors)
        return frontier


def order_conflicts(tg: TaskGraph) -> TaskGraph:
    """The same tasks with events that order exactly the conflicting pairs: one event per task that has to wait.

    Existing events are replaced. Events are numbered by their first waiter.
    """
    accesses = _resolve(tg)
    reducer = _Reducer(len(tg.tasks))
    waiters: dict[_Frontier, list[int]] = {}
    for task, (reads, writes) in enumerate(accesses):
        sets = [storage.conflicting(extent, 0) for storage, extent in reads]
        for storage, extent in writes:
            sets += (storage.conflicting(extent, 0), storage.conflicting(extent, 1))
        frontier = reducer.of[task] = reducer.combine([s for s in sets if s])
        if frontier is not None:
            waiters.setdefault(frontier, []).append(task)
        if reads or writes:
            bit = 1 << task
            for storage, extent in reads:
                storage.read(extent, bit)
            for storage, extent in writes:
                storage.write(extent, bit)
    events = tuple(Event(i, f.producers, tuple(tasks)) for i, (f, tasks) in enumerate(waiters.items()))
    return replace(tg, events=events)


_Resolved = tuple[tuple[_Storage, int], ...]


def _resolve(tg: TaskGraph) -> list[tuple[_Resolved, _Resolved]]:
    """Accesses of each task as (storage, index of extent). Storages that no task writes are left out, and flagged
    ones: their readers poll."""
    storages: dict[str, _Storage] = {}
    for task in tg.tasks:
        for access in task.writes:
            name = tg.buffers[access.buffer].storage
            if name not in storages and name not in tg.flagged:
                storages[name] = _Storage()
    by_buffer = {name: storages[b.storage] for name, b in tg.buffers.items() if b.storage in storages}

    def resolve(accesses: tuple[Access, ...]) -> _Resolved:
        out = []
        for access in accesses:
            storage = by_buffer.get(access.buffer)
            if storage is not None:
                split = access.side is not None and access.partition
                extent: Extent = (access.box, access.partition, access.side) if split else (access.box, "", None)
                known = storage.extents.get(extent)
                if known is None:
                    known = storage.extents[extent] = (storage, len(storage.extents))
                out.append(known)
        return tuple(out)

    resolved = [(resolve(task.reads), resolve(task.writes)) for task in tg.tasks]
    tables: dict[tuple[Extent, ...], Overlaps] = {}
    for storage in storages.values():
        storage.prepare(tables)
    return resolved
