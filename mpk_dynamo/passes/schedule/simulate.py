"""Predict when each task of a schedule runs, to compare schedules without a device."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.schedule import Schedule


@dataclass(frozen=True)
class Machine:
    """bandwidth: device-memory bytes per second, shared equally by all workers. edge: seconds from a producer's last
    store until a waiter on another worker starts. task: seconds a task takes beyond its memory traffic."""

    bandwidth: float
    edge: float
    task: float


H200 = Machine(bandwidth=4.65e12, edge=0.88e-6, task=0.2e-6)
"""Bandwidth and edge as measured on one H200 with 132 workers streaming weights; the cost of a task is an estimate."""


@dataclass(frozen=True)
class Timeline:
    """start[t], finish[t]: seconds since the launch."""

    start: tuple[float, ...]
    finish: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """Seconds until the last task is done."""
        return max(self.finish, default=0.0)


def simulate(s: Schedule, machine: Machine = H200) -> Timeline:
    """Run the queues on a model in which a task starts when its worker is free and its events are complete, and
    then moves its bytes at the worker's share of the bandwidth.

    Workers do not lend each other bandwidth, and no load begins before its task: pessimistic for unbalanced waves,
    where prefetch fills the gaps; optimistic about arithmetic, which costs nothing.
    """
    tasks, waits, signals = s.tasks.tasks, s.tasks.waits(), s.tasks.signals()
    worker_of = {task: worker for worker, queue in enumerate(s.queues) for task in queue}
    rate = machine.bandwidth / max(s.workers, 1)
    free = [0.0] * s.workers
    # when the event's producers on each worker were last done
    done: list[dict[int, float]] = [{} for _ in s.tasks.events]
    start, finish = [0.0] * len(tasks), [0.0] * len(tasks)
    for task in tasks:
        worker = worker_of[task.id]
        begin = free[worker]
        for event in waits[task.id]:
            for producer, when in done[event].items():
                begin = max(begin, when + (machine.edge if producer != worker else 0.0))
        start[task.id] = begin
        end = finish[task.id] = free[worker] = begin + machine.task + task.bytes / rate
        for event in signals[task.id]:
            done[event][worker] = end
    return Timeline(tuple(start), tuple(finish))
