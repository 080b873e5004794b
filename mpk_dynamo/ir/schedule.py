"""Schedule: which worker runs which task, in which order, and where every buffer and event lies."""

from __future__ import annotations

from dataclasses import dataclass

from .tasks import TaskGraph


@dataclass(frozen=True)
class Schedule:
    """queues[w]: task ids of worker w, in order. arena: byte offset of each SCRATCH storage (multiple of 256).
    slots[e]: index of event e's counter."""

    tasks: TaskGraph
    queues: tuple[tuple[int, ...], ...]
    arena: dict[str, int]
    arena_bytes: int
    slots: tuple[int, ...]

    @property
    def workers(self) -> int:
        return len(self.queues)
