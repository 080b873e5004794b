"""Profile records as a device would write them, from a timeline and a clock for each worker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpk_dynamo import abi
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.schedule.simulate import simulate
from mpk_dynamo.passes.schedule.timeline import Timeline
from mpk_dynamo.passes.tasks import choose_flagged, derive_events
from mpk_dynamo.targets import known, machine_of

EPOCH = 1_700_000_000_123_456_789
"""What the device's timer shows at the launch, in ns: as large as a real one."""


def records(timeline: Timeline, rates: Sequence[float], starts: Sequence[int]) -> np.ndarray:
    """rates: ticks per ns of each worker's clock; starts: what it shows at the launch. The timer counts in steps of
    32 ns."""
    workers = timeline.schedule.workers
    made = np.zeros(workers + len(timeline.clock), abi.PROFILE.dtype)
    end = timeline.makespan * 1e9 + 500
    for w in range(workers):
        first = float(timeline.begin[w] * 1e9)
        ticks = [starts[w] + round(first * rates[w]), starts[w] + round(end * rates[w])]
        timer = [EPOCH + round(t / 32) * 32 for t in (first, end)]
        made["clock"][w, :4] = [ticks[0], timer[0], ticks[1], timer[1]]
    for t, row in enumerate(timeline.clock):
        w = timeline.worker[t]
        made["clock"][workers + t] = [starts[w] + round(float(s) * 1e9 * rates[w]) for s in row]
    return made


def predicted(*tasks: tuple, workers: int = 2, flagged: bool = True) -> Timeline:
    """A simulated timeline of small_programs.task(...)s."""
    from small_programs import program

    tg = program(*tasks)
    return simulate(schedule(derive_events(choose_flagged(tg) if flagged else tg), workers), machine_of(known("h200")))
