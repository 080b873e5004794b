"""In which order each worker runs its tasks."""

from __future__ import annotations

from collections.abc import Sequence


def order_queues(placed: Sequence[int], workers: int) -> tuple[tuple[int, ...], ...]:
    """Task ids of each worker, given the worker of each task.

    In order of id: events go from smaller to larger ids, so the task with the smallest id that is not done can
    always run, and no deadlock is possible.
    """
    queues: list[list[int]] = [[] for _ in range(workers)]
    for task, worker in enumerate(placed):
        queues[worker].append(task)
    return tuple(map(tuple, queues))
