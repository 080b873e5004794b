"""Who waited for whom, on programs whose answer is known by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from records import predicted
from small_programs import task

from mpk_dynamo.passes.schedule.timeline import SIGNALLED, Timeline
from mpk_dynamo.profiler.waiting import critical_path, waiting


def timed(made: Timeline, *rows: tuple[float, ...]) -> Timeline:
    return dataclasses.replace(made, clock=np.array(rows, float))


PAIR = [task(writes=["a[0:32]"], node=0), task(writes=["a[32:64]"], node=0),
        task(["a[0:64]"], ["b[0:32]"], node=1), task(["a[0:64]"], ["b[32:64]"], node=1)]  # fmt: skip
SLOW_SECOND = (
    (0, 1, 1, 1, 4, 5),  # worker 0
    (0, 1, 1, 1, 9, 10),  # worker 1: the one that both others wait for
    (5, 12, 12, 12, 20, 21),
    (10, 12.5, 12.5, 12.5, 16, 17),
)


def test_a_wait_is_charged_to_the_producer_that_came_last():
    found = waiting(timed(predicted(*PAIR, flagged=False), *SLOW_SECOND))
    assert found.producer.tolist() == [-1, -1, 1, 1]
    assert found.wait.tolist() == [0, 0, 4, 0], "from 5 until 9; the other worker had its own task until 10"
    assert found.latency.tolist() == [1, 1, 3, 2.5]


def test_the_critical_path_goes_through_the_slow_producer():
    made = timed(predicted(*PAIR, flagged=False), *SLOW_SECOND)
    path = critical_path(made, waiting(made))
    assert [(link.task, link.via >= 0) for link in path] == [(1, False), (2, True)]
    assert [(link.start, link.inputs, link.stop) for link in path] == [(0, 1, 9), (9, 12, 21)]


def test_a_task_that_had_to_wait_for_its_worker_hangs_on_the_queue():
    rows = (*SLOW_SECOND[:2], (5, 12, 12, 12, 13, 14), (10, 12.5, 12.5, 12.5, 16, 17))
    made = timed(predicted(*PAIR, flagged=False), *rows)
    assert [link.task for link in critical_path(made, waiting(made))] == [1, 3]
    assert critical_path(made, waiting(made))[1].via == -1


@pytest.mark.parametrize("flagged", [True, False])
def test_a_path_has_no_gaps(flagged: bool):
    chain = [
        task([f"v{step}[0:64]"] if step else (), [f"v{step + 1}[{16 * w}:{16 * w + 16}]"], node=step)
        for step in range(20)
        for w in range(4)
    ]
    made = predicted(*chain, workers=4, flagged=flagged)
    path = critical_path(made, waiting(made))
    assert path[0].start == 0 and path[-1].stop == made.clock[:, SIGNALLED].max() == made.makespan
    assert all(a.stop == b.start for a, b in zip(path, path[1:]))
    assert all(link.start <= link.inputs <= link.stop for link in path)
    assert len(path) == 20
