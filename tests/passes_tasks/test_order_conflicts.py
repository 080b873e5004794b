"""Exact events: every conflict ordered, nothing else, nothing twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from small_programs import access, closure, conflicts, edges, program, programs, reduction, task

from mpk_dynamo.ir.region import boxes_overlap
from mpk_dynamo.passes.tasks import derive_events, order_conflicts
from mpk_dynamo.passes.tasks.overlaps import Overlaps


def derived(*specs):
    return edges(order_conflicts(program(*specs)))


@pytest.mark.parametrize(
    "first, second",
    [
        (task(writes=["a[0:4]"]), task(reads=["a[3:8]"])),
        (task(reads=["a[0:4]"]), task(writes=["a[3:8]"])),
        (task(writes=["a[0:4]"]), task(writes=["a[3:8]"])),
        (task(writes=["z[]"]), task(reads=["z[]"])),
        (task(writes=["keys[0:4]"]), task(reads=["keys@1[0:4]"])),  # versions share memory
        (task(writes=["a[0:8,2:3]"]), task(reads=["a[4:5,0:9]"])),
        (task(writes=["k[0:4] at p"]), task(reads=["k[0:4]"])),  # an unpartitioned access holds both sides
        (task(writes=["k[0:4] at p"]), task(writes=["k[0:4] at p"])),
        (task(writes=["k[0:4] at p"]), task(reads=["k[0:4] off q"])),  # different positions may differ
    ],
)
def test_conflicting_tasks_are_ordered(first, second):
    assert derived(first, second) == {(0, 1)}


@pytest.mark.parametrize(
    "first, second",
    [
        (task(reads=["a[0:4]"]), task(reads=["a[0:4]"])),
        (task(writes=["a[0:4]"]), task(reads=["a[4:8]"])),
        (task(writes=["a[0:4]"]), task(reads=["b[0:4]"])),
        (task(writes=["a[0:8,2:3]"]), task(reads=["a[0:8,3:4]"])),
        (task(writes=["k[0:4] at p"]), task(reads=["k[0:4] off p"])),
        (task(writes=["a[2:2]"]), task(reads=["a[0:4]"])),  # an empty box touches nothing
        (task(writes=["a[0:4]"]), task(reads=["a[2:2]"])),
    ],
)
def test_independent_tasks_wait_for_nothing(first, second):
    assert derived(first, second) == set()


def test_a_dependency_implied_by_others_is_left_out():
    chain = [task(writes=["a[0:1]"]), task(["a[0:1]"], ["b[0:1]"]), task(["a[0:1]", "b[0:1]"], ["c[0:1]"])]
    assert derived(*chain) == {(0, 1), (1, 2)}


def test_an_older_write_under_a_partial_overwrite_still_counts():
    tasks = [task(writes=["a[0:8]"]), task(writes=["a[0:4]"]), task(reads=["a[4:8]"]), task(reads=["a[2:6]"])]
    assert derived(*tasks) == {(0, 1), (0, 2), (1, 3)}


def test_a_write_at_the_position_does_not_supersede_the_rest():
    tasks = [task(writes=["k[0:8]"]), task(writes=["k[0:8] at p"]), task(reads=["k[0:8] off p"])]
    assert derived(*tasks) == {(0, 1), (0, 2)}


def test_equal_needs_share_an_event_and_different_ones_do_not():
    produce = [task(writes=[f"a[{i}:{i + 1}]"]) for i in range(4)]
    consume = [task(reads=["a[0:4]"]), task(reads=["a[0:4]"]), task(reads=["a[0:2]"])]
    events = order_conflicts(program(*produce, *consume)).events
    assert [(e.producers, e.waiters) for e in events] == [((0, 1, 2, 3), (4, 5)), ((0, 1), (6,))]
    assert [e.id for e in events] == [0, 1]


def test_caller_tensors_that_nothing_writes_order_nothing():
    assert derived(task(reads=["w[0:4]"], writes=["a[0:1]"]), task(reads=["w[0:4]"], writes=["a[1:2]"])) == set()


def test_existing_events_are_replaced():
    tg = program(task(writes=["a[0:1]"]), task(reads=["a[0:1]"]))
    once = derive_events(tg)
    assert derive_events(once) == once


@given(programs())
@settings(max_examples=80, deadline=None)
def test_events_are_the_transitive_reduction_of_the_conflicts(tg):
    """The reduction of an acyclic relation is unique: equality says sound, complete and minimal at once."""
    ordered = order_conflicts(tg)
    assert edges(ordered) == reduction(conflicts(tg))
    waits = ordered.waits()
    assert all(len(w) <= 1 for w in waits)
    assert len({e.producers for e in ordered.events}) == len(ordered.events)


@given(programs())
@settings(max_examples=50, deadline=None)
def test_removing_any_edge_loses_an_ordering(tg):
    needed, have = conflicts(tg), edges(order_conflicts(tg))
    assert all(not needed <= closure(have - {edge}) for edge in have)


def test_overlap_table_agrees_with_boxes_one_by_one():
    texts = ["[0:4,0:4]", "[4:8,0:4]", "[0:8,1:2]", "[2:6,3:7]", "[3:3,0:9]", "[0:9,0:9]", "[5:6,5:6]", "[0:4,0:4]"]
    boxes = [access(f"a{t}").box for t in texts]
    table = Overlaps([(b, "", None) for b in boxes])
    for i, a in enumerate(boxes):
        for j, b in enumerate(boxes):
            solid = all(s < e for s, e in (*a, *b))
            inside = all(x <= u and v <= y for (x, y), (u, v) in zip(a, b))
            assert bool(table.meets[i] >> j & 1) == (solid and boxes_overlap(a, b)), (i, j)
            assert bool(table.covers[i] >> j & 1) == (solid and inside), (i, j)
