"""Timeline: when each task of a schedule went through its phases, measured or predicted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...ir.graph import Attention, Linear, writes
from ...ir.schedule import Schedule
from ...ir.tasks import TaskGraph
from ..tasks.flagged_edges import flagged_edges

WAITS, READY, INPUTS, STREAMED, COMPUTED, SIGNALLED = range(6)
"""Columns of Timeline.clock: the task begins to wait, its events have come, its inputs are there, it has read its last
slot of the ring, it has computed, it has signalled."""

PHASES = ("fetch", "wait", "load", "stream", "finish", "signal")
"""Phase i ends at clock i. fetch: from the end of the worker's task before to the wait for events. load: inputs,
polled where they are flagged, and the prologue. stream: weights pass by. finish: what is computed after the last of
them (everything, in a task without weights)."""


@dataclass(frozen=True)
class Timeline:
    """clock[t, m]: seconds since the launch began at which task t came to mark m; fp64 [tasks, 6], never decreasing
    along a row or a queue. begin[w]: when worker w began. predicted: by the simulator."""

    schedule: Schedule
    clock: np.ndarray
    begin: np.ndarray
    predicted: bool = False

    @property
    def makespan(self) -> float:
        """Seconds until the last task is done."""
        return float(self.clock[:, SIGNALLED].max(initial=0.0))

    @cached_property
    def worker(self) -> np.ndarray:
        """The worker of each task."""
        worker = np.zeros(len(self.clock), np.int64)
        for w, queue in enumerate(self.schedule.queues):
            worker[list(queue)] = w
        return worker

    @cached_property
    def previous(self) -> np.ndarray:
        """The task before each one in its queue, -1 for the first."""
        previous = np.full(len(self.clock), -1)
        for queue in self.schedule.queues:
            previous[list(queue[1:])] = queue[:-1]
        return previous

    @cached_property
    def phases(self) -> np.ndarray:
        """Seconds of each phase of each task, [tasks, 6]."""
        first = self.previous < 0
        before = np.where(first, self.begin[self.worker], self.clock[self.previous, SIGNALLED])
        return np.diff(np.column_stack([before, self.clock]), axis=1)


@dataclass(frozen=True)
class Edge:
    """Each waiter goes on when all producers have computed; `mark`: where it stands then at the latest. READY: it waits
    for an event. INPUTS or COMPUTED: it polls their data, in the prologue or later."""

    producers: np.ndarray
    waiters: np.ndarray
    mark: int

    @property
    def flagged(self) -> bool:
        return self.mark != READY


def edges_of(schedule: Schedule) -> list[Edge]:
    """Everything that tasks wait for besides their queues."""
    tg = schedule.tasks
    found = [Edge(np.array(e.producers), np.array(e.waiters), READY) for e in tg.events]
    marks: dict[tuple[int, int], int] = {}
    for writers, readers in flagged_edges(tg):
        ends = tg.tasks[writers[0]].node, tg.tasks[readers[0]].node
        if ends not in marks:
            marks[ends] = INPUTS if _in_prologue(tg, *ends) else COMPUTED
        found.append(Edge(np.array(writers), np.array(readers), marks[ends]))
    return found


def _in_prologue(tg: TaskGraph, writer: int, reader: int) -> bool:
    """Whether a node polls what another writes before it marks its inputs."""
    node = tg.graph.nodes[reader]
    if not isinstance(node, Linear):
        return isinstance(node, Attention)
    written = {tg.buffers[name].storage for name in writes(tg.graph.nodes[writer])}
    return any(tg.buffers[name].storage in written for name in node.x.buffers)
