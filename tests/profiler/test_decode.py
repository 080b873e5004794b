"""Clocks that start anywhere and run at different rates, brought to one time."""

from __future__ import annotations

import numpy as np
import pytest
from records import predicted, records
from small_programs import task

from mpk_dynamo.errors import ProfileError
from mpk_dynamo.passes.schedule.timeline import COMPUTED, INPUTS, READY, STREAMED, edges_of
from mpk_dynamo.profiler import decode

CHAIN = [
    task([f"v{step}[0:64]"] if step else (), [f"v{step + 1}[{16 * w}:{16 * w + 16}]"], node=step)
    for step in range(60)
    for w in range(4)
]
RATES, STARTS = [1.980, 1.970, 1.9745, 1.985], [5, 1 << 44, 123_456_789_012, (1 << 63) - (1 << 40)]


def test_times_come_back_from_clocks_that_disagree():
    made = predicted(*CHAIN, workers=4)
    found = decode(records(made, RATES, STARTS), made.schedule)
    assert not found.predicted
    assert np.abs(found.clock - made.clock).max() < 50e-9, "the timer's step is 32 ns"
    apart = made.makespan * (max(RATES) - min(RATES)) / min(RATES)
    assert apart > 300e-9, "one rate for all workers would not pass this test"


def test_nobody_reads_before_it_is_written():
    made = predicted(*CHAIN, workers=4)
    found = decode(records(made, RATES, STARTS), made.schedule)
    for edge in edges_of(made.schedule):
        last = found.clock[edge.producers, COMPUTED].max()
        assert (found.clock[edge.waiters, edge.mark] > last - 50e-9).all()


def test_a_clock_that_a_body_does_not_take_is_that_of_the_phase_before():
    made = predicted(task(writes=["a[0:1]"]), workers=1)
    raw = records(made, [2.0], [77])
    raw["clock"][1, [INPUTS, STREAMED]] = 0
    found = decode(raw, made.schedule)
    assert found.clock[0, INPUTS] == found.clock[0, STREAMED] == found.clock[0, READY] > 0


def test_records_that_are_no_launch_are_refused():
    made = predicted(*CHAIN[:8], workers=4)
    good = records(made, RATES, STARTS)
    with pytest.raises(ProfileError, match="11 records for 4 workers and 8 tasks"):
        decode(good[:-1], made.schedule)
    lost = good.copy()
    lost["clock"][7] = 0
    with pytest.raises(ProfileError, match="1 of 8 tasks left no record.*set the records to zero"):
        decode(lost, made.schedule)
    mixed = good.copy()
    mixed["clock"][7, COMPUTED] = mixed["clock"][7, READY] - 1
    with pytest.raises(ProfileError, match="run backwards"):
        decode(mixed, made.schedule)
    with pytest.raises(ProfileError, match="no record"):
        decode(np.zeros_like(good), made.schedule)
