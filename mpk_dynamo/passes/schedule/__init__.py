"""From a TaskGraph with events to a Schedule: tasks to workers, buffers to offsets, events to counters."""

from __future__ import annotations

from ...ir.schedule import Schedule
from ...ir.tasks import TaskGraph
from .assign_slots import assign_slots
from .order_queues import order_queues
from .place import place
from .plan_flagged import plan_flagged
from .plan_memory import plan_memory

__all__ = ["assign_slots", "order_queues", "place", "plan_flagged", "plan_memory", "schedule"]


def schedule(tg: TaskGraph, workers: int) -> Schedule:
    """A static schedule of `tg` on `workers` equal workers."""
    queues = order_queues(place(tg, workers), workers)
    arena, plain_bytes = plan_memory(tg, queues)
    places, start, size = plan_flagged(tg, plain_bytes)
    return Schedule(tg, queues, arena | places, start + 2 * size, assign_slots(tg), start, size)
