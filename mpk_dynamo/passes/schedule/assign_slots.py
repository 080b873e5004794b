"""Which counter stands for which event."""

from __future__ import annotations

from ...ir.tasks import TaskGraph


def assign_slots(tg: TaskGraph) -> tuple[int, ...]:
    """One counter per event. Counters are monotonic over launches and never reset, so two events cannot share one:
    a waiter of the second would have to know how many of the first's producers have signalled."""
    return tuple(range(len(tg.events)))
