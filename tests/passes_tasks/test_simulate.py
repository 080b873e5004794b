"""The timing model on programs whose answer is known by hand."""

from __future__ import annotations

import pytest
from small_programs import program, task

from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.schedule.simulate import Machine, simulate
from mpk_dynamo.passes.tasks import choose_flagged, derive_events

UNIT = Machine(bandwidth=20.0, edge=3.0, poll=2.0, task=1.0)  # with two workers: 10 bytes per second each


def run(*tasks, workers=2):
    return simulate(schedule(derive_events(program(*tasks)), workers), UNIT)


def test_a_wave_takes_as_long_as_its_biggest_task():
    both = run(task(writes=["a[0:1]"], node=0, nbytes=20), task(writes=["a[1:2]"], node=0, nbytes=50))
    assert both.start == (0, 0) and both.finish == (3, 6) and both.makespan == 6


def test_an_edge_to_another_worker_costs_and_one_on_the_same_worker_does_not():
    produce = [task(writes=[f"a[{i}:{i + 1}]"], node=0) for i in range(2)]
    consume = [task([f"a[{i}:{i + 1}]"], node=1) for i in range(2)]
    assert run(*produce, *consume).makespan == 2
    crossed = [task([f"a[{1 - i}:{2 - i}]"], node=1) for i in range(2)]
    assert run(*produce, *crossed).makespan == 5


def test_an_edge_through_flagged_data_costs_a_poll():
    tasks = [task(writes=["a[0:32]"], node=0), task(writes=["a[32:64]"], node=0)]
    crossed = [task(["a[32:64]"], node=1), task(["a[0:32]"], node=1)]
    tg = derive_events(choose_flagged(program(*tasks, *crossed)))
    assert tg.flagged == {"a"}
    assert simulate(schedule(tg, 2), UNIT).start == (0, 0, 3, 3)
    straight = derive_events(choose_flagged(program(*tasks, *crossed[::-1])))
    assert simulate(schedule(straight, 2), UNIT).start == (0, 0, 1, 1)


def test_a_queue_runs_one_task_at_a_time():
    assert run(task(nbytes=30), task(nbytes=30), workers=1).finish == pytest.approx((2.5, 5.0))
