"""What verify_tasks has proven of a TaskGraph is proven once, of that very object and for one schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scale import Sizes, qwen3_8b_like

from mpk_dynamo import verify
from mpk_dynamo.errors import VerificationError
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import derive_events
from mpk_dynamo.verify import verify_schedule, verify_tasks

SMALL = Sizes(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ff=96, vocab=200, capacity=32, splits=2)


@pytest.fixture
def tg():
    return derive_events(qwen3_8b_like(SMALL, workers=4))


def test_the_report_is_that_of_a_full_verification(tg):
    s = schedule(tg, 4)
    alone = verify_schedule(s)
    verify_tasks(tg)
    after = verify_schedule(s)
    assert set(after.rules) - set(alone.rules) <= {"T3"} and set(alone.rules) <= set(after.rules)
    assert after.counts == alone.counts


def test_the_same_object_is_not_checked_again_but_another_one_is(tg, monkeypatch):
    s = schedule(tg, 4)
    seen = []
    real = verify.check_storages
    monkeypatch.setattr(verify, "check_storages", lambda tg, *rest: (seen.append(tg), real(tg, *rest)))
    verify_tasks(tg)
    verify_schedule(s)
    assert len(seen) == 1
    verify_schedule(s)  # what is remembered serves once
    assert len(seen) == 2
    verify_tasks(tg)
    verify_schedule(replace(s, tasks=replace(tg)))
    assert len(seen) == 4


@pytest.mark.parametrize("number", range(6))
def test_an_edge_lost_after_verify_tasks_is_found(tg, number):
    verify_tasks(tg)
    s = schedule(tg, 4)
    event = tg.events[number]
    changed = replace(event, producers=event.producers[:-1])
    events = (*tg.events[:number], changed, *tg.events[number + 1 :])
    with pytest.raises(VerificationError, match="T[0-9]"):
        verify_schedule(replace(s, tasks=replace(tg, events=events)))


def test_nothing_is_remembered_of_what_failed(tg):
    broken = replace(tg, events=())
    with pytest.raises(VerificationError):
        verify_tasks(broken)
    s = schedule(tg, 4)
    # one worker's order alone does not make up for the events
    with pytest.raises(VerificationError):
        verify_schedule(replace(s, tasks=broken))
