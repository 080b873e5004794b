"""Placement, queues, memory and slots."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import closure, edges, program, programs, queue_edges, task

from mpk_dynamo.ir.types import BufferKind
from mpk_dynamo.passes.schedule import order_queues, place, plan_memory, schedule
from mpk_dynamo.passes.schedule.plan_memory import ALIGNMENT, tightest_gap
from mpk_dynamo.passes.tasks import derive_events


def wave(node: int, sizes: list[int], op: str = "linear") -> list[tuple]:
    return [task(writes=[f"n{node}{op}[{i}:{i + 1}]"], node=node, op=op, nbytes=n) for i, n in enumerate(sizes)]


def test_a_full_wave_keeps_tile_i_on_worker_i():
    tg = program(*wave(0, [1, 1, 9]), *wave(1, [5] * 7), *wave(2, [100, 1, 1]))
    placed = place(tg, 3)
    assert placed[:3] == [0, 1, 2]
    assert placed[3:9] == [0, 1, 2, 0, 1, 2]
    assert placed[10:] == [0, 1, 2]


def test_a_small_wave_goes_to_the_least_busy_workers_biggest_first():
    mib = 1 << 20
    tg = program(*wave(0, [3 * mib, 1 * mib, 2 * mib, 4 * mib]), *wave(1, [mib // 4, mib]))
    assert place(tg, 4)[4:] == [2, 1]


def test_small_waves_rotate_over_equally_busy_workers():
    tg = program(*[t for node in range(4) for t in wave(node, [64, 64])])
    assert place(tg, 4) == [0, 1, 2, 3, 0, 1, 2, 3]
    one_by_one = program(*[t for node in range(5) for t in wave(node, [64])])
    assert place(one_by_one, 4) == [0, 1, 2, 3, 0]


def test_tasks_of_one_small_wave_never_share_a_worker():
    tg = program(*wave(0, [1 << 30, 0, 0, 0]), *wave(1, [0, 0, 0], "attention"), *wave(1, [0, 0, 0], "combine"))
    placed = place(tg, 4)
    assert len(set(placed[4:7])) == 3 and len(set(placed[7:])) == 3


def test_queues_are_in_order_of_id_and_idle_workers_have_empty_ones():
    assert order_queues([2, 0, 2, 0], 4) == ((1, 3), (), (0, 2), ())


def test_memory_is_reused_once_all_users_are_done_and_not_before():
    chain = [task([f"{'abcdef'[i - 1]}[0:64]"] if i else [], [f"{'abcdef'[i]}[0:64]"]) for i in range(6)]
    arena, size = plan_memory(derive_events(program(*chain)))
    assert size == 2 * 256  # only neighbours are alive together
    apart = [task(writes=["a[0:64]"]), task(writes=["b[0:64]"]), task(["a[0:64]"]), task(["b[0:64]"])]
    arena, size = plan_memory(derive_events(program(*apart)))
    assert size == 2 * 256 and arena["a"] != arena["b"]


def test_the_order_of_the_task_list_alone_does_not_free_memory():
    """b comes after a in the list, but nothing orders it: only a queue does."""
    tg = derive_events(program(task(writes=["a[0:64]"]), task(["a[0:64]"]), task(writes=["b[0:64]"])))
    assert plan_memory(tg, ((0, 1), (2,)))[1] == 2 * 256
    assert plan_memory(tg, ((0, 1, 2),))[1] == 256


def test_order_by_a_queue_counts_for_a_task_that_also_waits_for_an_event():
    tasks = [task(writes=["a[0:64]"]), task(writes=["x[0:64]"]), task(["x[0:64]"], ["b[0:64]"])]
    arena, _ = plan_memory(derive_events(program(*tasks)), ((0, 2), (1,)))
    assert arena["b"] == arena["a"] != arena["x"]


def test_a_long_storage_behind_short_ones_blocks_its_whole_range():
    assert tightest_gap([(0, 1024), (256, 512)], 256) == 1024
    assert tightest_gap([(0, 256), (1024, 1280), (1536, 1792)], 256) == 1280  # the tighter of two gaps
    assert tightest_gap([(512, 1024)], 256) == 0
    assert tightest_gap([], 256) == 0


def test_a_reader_of_another_branch_keeps_memory_alive():
    tasks = [
        task(writes=["a[0:64]"]),
        task(["a[0:64]"], ["b[0:64]"]),
        task(["a[0:64]"]),
        task(["b[0:64]"], ["c[0:64]"]),
    ]
    arena, _ = plan_memory(derive_events(program(*tasks)))
    assert arena["c"] != arena["a"]
    arena, _ = plan_memory(derive_events(program(*tasks[:2], tasks[3])))
    assert arena["c"] == arena["a"]


def test_only_scratch_is_in_the_arena_by_storage_and_rounded_up():
    tg = program(task(writes=["a[0:64]", "b[0:1]"]), task(["a@1[0:64]"]), size=65)
    kept = replace(tg.buffers["b"], kind=BufferKind.OUTPUT)
    arena, size = plan_memory(replace(tg, buffers={**tg.buffers, "b": kept}))
    assert arena == {"a": 0} and size == 512
    assert plan_memory(program(task(["w[0:1]"]), kind=BufferKind.PARAM)) == ({}, 0)


@given(programs(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_schedules_of_random_programs_hold(tg, workers):
    tg = derive_events(tg)
    s = schedule(tg, workers)
    assert s.workers == workers
    assert sorted(t for q in s.queues for t in q) == list(range(len(tg.tasks)))
    assert all(list(q) == sorted(q) for q in s.queues)
    assert len(set(s.slots)) == len(tg.events) == len(s.slots)
    assert s == schedule(tg, workers)

    scratch = {b.storage: b.nbytes for b in tg.buffers.values() if b.kind is BufferKind.SCRATCH}
    assert set(s.arena) == set(scratch)
    users = {
        name: {t.id for t in tg.tasks for a in (*t.reads, *t.writes) if tg.buffers[a.buffer].storage == name}
        for name in scratch
    }
    before = closure(edges(tg) | queue_edges(s.queues))
    for name, start in s.arena.items():
        assert start % ALIGNMENT == 0 and start + scratch[name] <= s.arena_bytes
    for a, b in combinations(scratch, 2):
        if s.arena[a] < s.arena[b] + scratch[b] and s.arena[b] < s.arena[a] + scratch[a]:
            pairs = {(x, y) for x in users[a] for y in users[b]}
            assert pairs <= before or {(y, x) for x, y in pairs} <= before, (a, b)


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        schedule(program(task()), 0)
