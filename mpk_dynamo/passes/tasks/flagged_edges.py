"""Who waits for whom through flagged storages."""

from __future__ import annotations

from ...ir.tasks import TaskGraph
from .overlaps import Extent, Overlaps

Edges = tuple[tuple[int, ...], tuple[int, ...]]
"""(writers, readers): each reader goes on when all writers have written."""


def flagged_edges(tg: TaskGraph) -> list[Edges]:
    """The dependencies that polling imposes: the tasks that read one box, and those that write elements of it.

    They say which task can finish before which, and nothing about memory. A task that reads what it writes itself
    is in both lists: it waits for ever.
    """
    extents: dict[str, dict[Extent, tuple[list[int], list[int]]]] = {name: {} for name in sorted(tg.flagged)}
    for task in tg.tasks:
        for role, accesses in enumerate((task.writes, task.reads)):
            for access in accesses:
                known = extents.get(tg.buffers[access.buffer].storage)
                if known is not None:
                    extent: Extent = (access.box, access.partition, access.side)
                    users = known.get(extent)
                    if users is None:
                        users = known[extent] = ([], [])
                    users[role].append(task.id)
    edges: list[Edges] = []
    tables: dict[tuple[Extent, ...], Overlaps] = {}
    for known in extents.values():
        keys = tuple(known)
        table = tables.get(keys)
        if table is None:  # layers repeat
            table = tables[keys] = Overlaps(keys)
        users = list(known.values())
        writing = sum(1 << i for i, (writers, _) in enumerate(users) if writers)
        for i, (_, readers) in enumerate(users):
            left = table.meets[i] & writing if readers else 0
            writers: set[int] = set()
            while left:
                low = left & -left
                writers.update(users[low.bit_length() - 1][0])
                left ^= low
            if writers:
                edges.append((tuple(sorted(writers)), tuple(dict.fromkeys(readers))))
    return edges
