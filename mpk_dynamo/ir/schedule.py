"""Schedule: which worker runs which task, in which order, and where every buffer and event lies."""

from __future__ import annotations

from dataclasses import dataclass

from .tasks import TaskGraph


@dataclass(frozen=True)
class Schedule:
    """queues[w]: task ids of worker w, in order. arena: byte offset of each SCRATCH storage (multiple of 256).
    slots[e]: index of event e's counter.

    Flagged storages lie in [flagged_start, flagged_start + flagged_bytes), none sharing a byte with another. A second
    set follows, flagged_bytes further: launches alternate between the two, each clearing the other one."""

    tasks: TaskGraph
    queues: tuple[tuple[int, ...], ...]
    arena: dict[str, int]
    arena_bytes: int
    slots: tuple[int, ...]
    flagged_start: int = 0
    flagged_bytes: int = 0

    @property
    def workers(self) -> int:
        return len(self.queues)
