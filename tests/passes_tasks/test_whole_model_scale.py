"""The passes at the size of Qwen3-8B: time, and what the derived program looks like."""

from __future__ import annotations

import time

import pytest
from scale import Sizes, qwen3_8b_like
from small_programs import closure, conflicts, edges

from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import choose_flagged, derive_events, order_conflicts


@pytest.fixture(scope="module")
def program():
    return qwen3_8b_like()


def test_events_and_schedule_take_seconds(program):
    """Meant to take 2 s; the bound is loose because machines are shared, yet a quadratic step would break it."""
    start = time.process_time()
    tg = derive_events(program)
    s = schedule(tg, 132)
    assert time.process_time() - start < 15
    assert sum(map(len, s.queues)) == len(program.tasks) > 24_000

    assert max(map(len, tg.waits())) == 1
    assert max(map(len, tg.signals())) <= 2
    assert len(tg.events) == 36 * (1 + 8 + 8 + 1 + 1 + 1) + 1

    moved = [sum(program.tasks[t].bytes for t in q) for q in s.queues]
    assert max(moved) * 132 <= 1.01 * sum(moved)
    # never more alive than a few activations and one node's partial results
    scratch = sorted((b.nbytes for b in program.buffers.values() if b.kind.value == "scratch"), reverse=True)
    assert s.arena_bytes <= 1.5 * scratch[0]


def test_flagged_buffers_leave_few_events(program):
    start = time.process_time()
    tg = derive_events(choose_flagged(program))
    s = schedule(tg, 132)
    assert time.process_time() - start < 15
    assert len(tg.flagged) == 36 * 9 + 1
    assert len(tg.events) == 36  # each layer's length counter
    assert max(map(len, tg.waits())) == max(map(len, tg.signals())) == 1
    scratch = sum(b.nbytes for b in program.buffers.values() if b.kind.value == "scratch")
    assert scratch <= s.flagged_bytes <= 1.01 * scratch and s.arena_bytes == 2 * s.flagged_bytes


def test_every_conflict_is_ordered_in_a_narrow_copy():
    """Same structure with 11 workers and two layers, against brute force."""
    tg = qwen3_8b_like(Sizes(layers=2, hidden=64, heads=8, kv_heads=2, head_dim=8, ff=96, vocab=200, splits=3), 11)
    needed = closure(conflicts(tg))
    assert closure(edges(order_conflicts(tg))) == needed
    assert closure(edges(derive_events(tg))) >= needed
