"""Which worker runs which task."""

from __future__ import annotations

from itertools import groupby

from ...ir.tasks import Task, TaskGraph

TASK_BYTES = 16 * 1024
"""Cost of a task beyond its memory traffic, in bytes its worker could have streamed: about half a microsecond."""


def place(tg: TaskGraph, workers: int) -> list[int]:
    """The worker of each task.

    A wave is a run of tasks of one node and one kind; they become ready at about the same time. As long as a wave
    has a task for every worker, its i-th goes to worker i, so a loader streams tiles that follow each other. What
    is left (all of a small node) goes to different workers, those with the least to do so far, the biggest task to
    the least busy. As every task counts, the small waves of successive layers rotate over all workers.
    """
    if workers < 1:
        raise ValueError(f"place: {workers} workers; at least one is needed")
    placed = [0] * len(tg.tasks)
    busy = [0] * workers
    for _, wave in groupby(tg.tasks, key=lambda t: (t.node, t.op)):
        tasks = list(wave)
        full = len(tasks) - len(tasks) % workers
        for i, task in enumerate(tasks[:full]):
            _assign(task, i % workers, placed, busy)
        rest = sorted(tasks[full:], key=lambda t: (-t.bytes, t.id))
        free = sorted(range(workers), key=lambda w: (busy[w], w))
        for task, worker in zip(rest, free):
            _assign(task, worker, placed, busy)
    return placed


def _assign(task: Task, worker: int, placed: list[int], busy: list[int]) -> None:
    placed[task.id] = worker
    busy[worker] += task.bytes + TASK_BYTES
