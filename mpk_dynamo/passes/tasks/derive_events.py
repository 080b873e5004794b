"""From what tasks declare to the counters they signal and wait for."""

from __future__ import annotations

from ...ir.tasks import TaskGraph
from .coalesce_events import coalesce_events
from .order_conflicts import order_conflicts


def derive_events(tg: TaskGraph) -> TaskGraph:
    """The same tasks with events that order every conflicting pair, with few signals and waits per task. Accesses to
    flagged storages need none.

    Events that `tg` has are replaced. Producers have smaller ids than waiters; each task waits for one event at
    most, and tasks without predecessors for none.
    """
    return coalesce_events(order_conflicts(tg))
