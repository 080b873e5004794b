"""Who waited for whom, and the chain of tasks that set the pace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..passes.schedule.timeline import COMPUTED, INPUTS, SIGNALLED, WAITS, Edge, Timeline, edges_of


@dataclass(frozen=True)
class Waiting:
    """For each task [tasks]: edge: index of the edge whose data came last, -1 without one; producer: the task that
    computed last for it; came: when that was (seconds); wait: seconds from the beginning of the wait until then;
    latency: seconds from then (or from the beginning of the wait, if later) until the inputs were there."""

    edges: list[Edge]
    edge: np.ndarray
    producer: np.ndarray
    came: np.ndarray
    wait: np.ndarray
    latency: np.ndarray


def waiting(timeline: Timeline) -> Waiting:
    """Each task's wait, charged to the one edge it depended on."""
    clock, edges = timeline.clock, edges_of(timeline.schedule)
    edge, producer = np.full(len(clock), -1), np.full(len(clock), -1)
    came = np.zeros(len(clock))
    for i, e in enumerate(edges):
        last = e.producers[np.argmax(clock[e.producers, COMPUTED])]
        later = e.waiters[clock[last, COMPUTED] > came[e.waiters]]
        edge[later], producer[later], came[later] = i, last, clock[last, COMPUTED]
    begin, end = clock[:, WAITS], clock[:, INPUTS]
    wait = np.clip(np.minimum(came, end) - begin, 0.0, None)
    return Waiting(edges, edge, producer, came, wait, end - begin - wait)


@dataclass(frozen=True)
class Link:
    """One task of the critical path. via: index of the edge it depended on, -1: its worker's task before, or nothing.
    start: when what it depended on was done; inputs: when it had its inputs; stop: when it was done itself. Seconds."""

    task: int
    via: int
    start: float
    inputs: float
    stop: float


def critical_path(timeline: Timeline, found: Waiting) -> list[Link]:
    """From the task that ends last back to the launch: each link is the task that the next one depended on latest,
    the last producer of its last edge or the task before it in its queue. In order of time."""
    clock, path = timeline.clock, list[Link]()
    task = int(np.argmax(clock[:, SIGNALLED])) if len(clock) else -1
    stop = float(clock[task, SIGNALLED]) if len(clock) else 0.0
    while task >= 0:
        before, producer = int(timeline.previous[task]), int(found.producer[task])
        queue = clock[before, SIGNALLED] if before >= 0 else timeline.begin[timeline.worker[task]]
        # clocks of two SMs may differ by the timer's step, and a task reads what it needs as soon as it is there
        crossed = producer >= 0 and found.came[task] > queue and producer not in (task, before)
        start = min(float(found.came[task] if crossed else queue), stop)
        inputs = float(np.clip(clock[task, INPUTS], start, stop))
        path.append(Link(task, int(found.edge[task]) if crossed else -1, start, inputs, stop))
        if len(path) > len(clock):
            raise AssertionError("the critical path has a cycle")
        task, stop = producer if crossed else before, start
    return path[::-1]
