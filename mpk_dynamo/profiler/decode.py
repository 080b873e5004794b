"""From the records of one launch to times on one clock.

Every SM has a clock of its own that starts anywhere, and the clocks of different parts of the chip run at slightly
different rates (0.3 % on an H200: 2 us over a step of 700 us, more than an edge takes). A worker's record holds its
clock together with the device's timer at its start and at its end: its times lie on the line between the two."""

from __future__ import annotations

import numpy as np

from ..errors import ProfileError
from ..ir.schedule import Schedule
from ..passes.schedule.timeline import COMPUTED, INPUTS, READY, SIGNALLED, STREAMED, WAITS, Timeline


def decode(records: np.ndarray, schedule: Schedule) -> Timeline:
    """`records`: as abi.PROFILE, one per worker, then one per task, of a finished launch that was recorded whole.

    Raises ProfileError when records are missing or run backwards.
    """
    workers, tasks = schedule.workers, len(schedule.tasks.tasks)
    if len(records) != workers + tasks:
        raise ProfileError(f"{len(records)} records for {workers} workers and {tasks} tasks")
    clock = records["clock"].astype(np.int64)
    ends, raw = clock[:workers, :4], clock[workers:].copy()
    _check_written(ends, raw)
    raw[:, INPUTS] = np.where(raw[:, INPUTS] == 0, raw[:, READY], raw[:, INPUTS])
    raw[:, STREAMED] = np.where(raw[:, STREAMED] == 0, raw[:, INPUTS], raw[:, STREAMED])
    worker = np.zeros(tasks, np.int64)
    for w, queue in enumerate(schedule.queues):
        worker[list(queue)] = w
    # whole numbers until clocks are differences: as fp64, 64-bit clocks would lose what matters
    ticks = raw - ends[worker, 0][:, None]
    if (ticks < 0).any() or (ends[:, 2:] <= ends[:, :2]).any() or (np.diff(ticks, axis=1) < 0).any():
        raise ProfileError("clocks run backwards", remedy="record one launch, and read when it has finished")
    rate = (ends[:, 3] - ends[:, 1]) / (ends[:, 2] - ends[:, 0])  # ns per tick
    begin = ends[:, 1] - ends[:, 1].min()
    nanoseconds = ticks * rate[worker][:, None] + begin[worker][:, None]
    return Timeline(schedule, nanoseconds * 1e-9, begin * 1e-9)


def _check_written(ends: np.ndarray, raw: np.ndarray) -> None:
    missing = int((raw[:, [WAITS, READY, COMPUTED, SIGNALLED]] == 0).any(axis=1).sum())
    if missing or (ends == 0).any():
        raise ProfileError(
            f"{missing} of {len(raw)} tasks left no record",
            remedy="record one whole launch: set the records to zero, launch, wait for its end",
        )
