"""Which task is certain to be finished before which other one starts.

Two representations, both exact and cheap at whole-model scale:

- `EventOrder`, by events alone: bitsets of ancestors. Tasks that wait for the same events have the same ancestors,
  so there is one bitset per distinct set of waits rather than one per task.
- `QueueOrder`, by events and the order of the queues: vector clocks (Fidge 1988, Mattern 1989). Queues are chains,
  so ancestors are a prefix of each queue, and one number per worker says them all.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..ir.schedule import Schedule
from ..ir.tasks import TaskGraph


class Order(Protocol):
    def before(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Elementwise: is task a[i] finished before task b[i] starts, in every execution?"""
        ...


class EventOrder:
    """Order by events alone. Every event's producers must have lower ids than its waiters (rule T3)."""

    def __init__(self, tg: TaskGraph) -> None:
        n = len(tg.tasks)
        keys = [tuple(w) for w in tg.waits()]
        classes = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self._class = np.array([classes[k] for k in keys], dtype=np.int64)
        self._rows = np.zeros((len(classes), (n + 63) // 64), dtype=np.uint64)
        event_rows: dict[int, np.ndarray] = {}
        # ids ascend along edges, so the rows of an event's producers are complete when its first waiter is met
        for key, row in zip(classes, self._rows, strict=True):
            for e in key:
                if e not in event_rows:
                    event_rows[e] = self._row_of(tg.events[e].producers)
                np.bitwise_or(row, event_rows[e], out=row)

    def _row_of(self, producers: tuple[int, ...]) -> np.ndarray:
        p = np.array(producers, dtype=np.int64)
        row = np.bitwise_or.reduce(self._rows[np.unique(self._class[p])], axis=0)
        np.bitwise_or.at(row, p >> 6, np.uint64(1) << (p & 63).astype(np.uint64))
        return row

    def before(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        words = self._rows[self._class[b], a >> 6]
        return ((words >> (a & 63).astype(np.uint64)) & np.uint64(1)).astype(bool)


class QueueOrder:
    """Order by events and queues. `sequence` is one complete execution (from `replay.replay`).

    clocks[t, w]: how many tasks of worker w are finished before t starts, int32 [tasks, workers].
    """

    def __init__(self, s: Schedule, sequence: list[int]) -> None:
        n = len(s.tasks.tasks)
        self.worker, self.position = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        for w, queue in enumerate(s.queues):
            self.worker[list(queue)] = w
            self.position[list(queue)] = np.arange(len(queue))
        self.clocks = np.zeros((n, s.workers), dtype=np.int32)
        waits, event_clocks = s.tasks.waits(), {}
        for t in sequence:
            w, k = int(self.worker[t]), int(self.position[t])
            clock = self.clocks[t]
            if k:
                clock[:] = self.clocks[s.queues[w][k - 1]]
                clock[w] = k
            for e in waits[t]:
                if e not in event_clocks:
                    event_clocks[e] = self._clock_of(s.tasks.events[e].producers)
                np.maximum(clock, event_clocks[e], out=clock)

    def _clock_of(self, producers: tuple[int, ...]) -> np.ndarray:
        p = np.array(producers, dtype=np.int64)
        clock = self.clocks[p].max(axis=0)
        np.maximum.at(clock, self.worker[p], self.position[p].astype(np.int32) + 1)
        return clock

    def before(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.position[a] < self.clocks[b, self.worker[a]]
