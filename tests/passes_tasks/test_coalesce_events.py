"""Coalescing: fewer signals, never less order, never an edge backwards."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import closure, conflicts, edges, program, programs, task

from mpk_dynamo.passes.tasks import coalesce_events, derive_events, order_conflicts

BIG = 1 << 20


def pairs(tg):
    return [(e.producers, e.waiters) for e in tg.events]


@given(programs(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_order_is_kept_and_edges_go_forward(tg, max_signals):
    exact = order_conflicts(tg)
    tg = coalesce_events(exact, max_signals)
    assert conflicts(tg) <= closure(edges(tg))
    assert all(p < w for p, w in edges(tg))
    assert all(len(w) <= 1 for w in tg.waits())
    assert len(tg.events) <= len(exact.events)
    assert [e.id for e in tg.events] == list(range(len(tg.events)))
    assert [e.waiters for e in tg.events] == sorted(e.waiters for e in tg.events)
    assert all(list(e.producers) == sorted(set(e.producers)) for e in tg.events)


def test_a_cheap_leaf_waits_for_an_event_that_is_there_anyway():
    """The length counter is raised after its readers; the tasks after them already count those readers."""
    readers = [task(["n[]"], [f"a[{i}:{i + 1}]"], node=0, nbytes=BIG) for i in range(4)]
    middle = task(["a[0:4]"], ["b[0:1]"], node=1, nbytes=BIG)
    counter = task(["n[]"], ["n@1[]"], node=2, nbytes=16)
    last = task(["b[0:1]"], ["c[0:1]"], node=3, nbytes=BIG)
    exact = order_conflicts(program(*readers, middle, counter, last))
    assert pairs(exact) == [((0, 1, 2, 3), (4, 5)), ((4,), (6,))]
    two = [task(["a[0:2]"], ["b[0:1]"], node=1), task(["a[2:4]"], ["b[1:2]"], node=1)]
    tg = program(*readers, *two, counter, task(["b[0:2]"], ["c[0:1]"], node=3))
    assert pairs(order_conflicts(tg)) == [((0, 1), (4,)), ((2, 3), (5,)), ((0, 1, 2, 3), (6,)), ((4, 5), (7,))]
    assert pairs(derive_events(tg)) == [((0, 1), (4,)), ((2, 3), (5,)), ((4, 5), (6, 7))]


def test_a_heavy_leaf_keeps_its_own_event():
    readers = [task(["n[]"], [f"a[{i}:{i + 1}]"], node=0) for i in range(2)]
    middle = task(["a[0:1]"], ["b[0:1]"], node=1), task(["a[1:2]"], ["b[1:2]"], node=1)
    heavy = task(["a[0:2]"], ["d[0:1]"], node=2, nbytes=BIG)
    tg = program(*readers, *middle, heavy, task(["b[0:2]"], ["c[0:1]"], node=3))
    assert ((0, 1), (4,)) in pairs(derive_events(tg))


def test_a_leaf_never_waits_for_a_later_task():
    """The only event that implies the leaf's comes from tasks after it."""
    readers = [task(["n[]"], [f"a[{i}:{i + 1}]"], node=0) for i in range(2)]
    counter = task(["n[]"], ["n@1[]"], node=1)
    middle = task(["a[0:1]"], ["b[0:1]"], node=2), task(["a[1:2]"], ["b[1:2]"], node=2)
    tg = derive_events(program(*readers, counter, *middle, task(["b[0:2]"], ["c[0:1]"], node=3)))
    assert ((0, 1), (2,)) in pairs(tg)


def test_neighbouring_events_of_one_consumer_are_merged_until_the_limit_holds():
    count = 8
    produce = [task(writes=[f"a[{i}:{i + 1}]"], node=0) for i in range(count)]
    consume = [task([f"a[{i}:{count}]"], [f"b[{i}:{i + 1}]"], node=1, nbytes=BIG) for i in range(count)]
    tg = program(*produce, *consume)
    assert max(map(len, order_conflicts(tg).signals())) == count
    limited = coalesce_events(order_conflicts(tg), 4)
    assert max(map(len, limited.signals())) == 4
    assert pairs(limited)[0] == (tuple(range(8)), (8, 9))
    barrier = coalesce_events(order_conflicts(tg), 1)
    assert pairs(barrier) == [(tuple(range(8)), tuple(range(8, 16)))]


def test_events_stay_numbered_by_first_waiter():
    """Events are grouped by consuming node on the way; the numbers do not show it."""
    tasks = [task(writes=[f"a[{i}:{i + 1}]"], node=0) for i in range(4)]
    tasks += [task([f"a[{i}:{i + 2}]"], [f"b[{i}:{i + 1}]"], node=1 + i % 2, nbytes=BIG) for i in range(3)]
    tg = coalesce_events(order_conflicts(program(*tasks)))
    assert [e.waiters[0] for e in tg.events] == [4, 5, 6]


def test_the_limit_must_leave_one_signal():
    with pytest.raises(ValueError, match="at least one signal"):
        coalesce_events(program(task()), 0)


def test_events_of_interleaved_tasks_are_not_merged():
    """The union would make task 1 wait for task 2, which comes after it."""
    tasks = [task(writes=["a[0:1]", "b[0:1]"], node=0), task(["a[0:1]"], node=0, nbytes=BIG)]
    tasks += [task(writes=["c[0:1]"], node=0), task(["b[0:1]", "c[0:1]"], node=0, nbytes=BIG)]
    assert pairs(coalesce_events(order_conflicts(program(*tasks)), 1)) == [((0,), (1,)), ((0, 2), (3,))]
