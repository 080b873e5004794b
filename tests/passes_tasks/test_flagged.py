"""Which buffers are flagged, what this leaves to events, and where flagged memory lies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scale import Sizes, qwen3_8b_like
from small_programs import closure, conflicts, edges, program, programs, task

from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import RowMap
from mpk_dynamo.ir.types import BufferKind, DType
from mpk_dynamo.passes.schedule import plan_flagged, plan_memory, schedule
from mpk_dynamo.passes.tasks import choose_flagged, derive_events
from mpk_dynamo.passes.tasks.choose_flagged import MAX_BYTES

PIPE = (
    task(writes=["a[0:32]"], node=0),
    task(writes=["a[32:64]"], node=0),
    task(["a[0:64]"], ["b[0:64]"], node=1),
    task(["b[0:64]"], ["out[0:64]"], node=2),
)


def changed(tg, name, **fields):
    return replace(tg, buffers={**tg.buffers, name: replace(tg.buffers[name], **fields)})


def flagged(tg):
    return set(choose_flagged(tg).flagged)


def test_scratch_that_is_written_once_and_read_is_flagged():
    tg = program(*PIPE)
    assert flagged(tg) == {"a", "b"}  # nobody reads out
    assert derive_events(choose_flagged(tg)).events == ()
    assert flagged(changed(tg, "a", dtype=DType.BF16)) == {"a", "b"}


@pytest.mark.parametrize("dtype", [DType.I64, DType.I32, DType.U8, DType.BOOL, DType.F64])
def test_a_type_without_a_spare_value_is_not_flagged(dtype):
    assert flagged(changed(program(*PIPE), "a", dtype=dtype)) == {"b"}


@pytest.mark.parametrize("kind", [k for k in BufferKind if k is not BufferKind.SCRATCH])
def test_only_scratch_is_flagged(kind):
    assert flagged(changed(program(*PIPE), "a", kind=kind)) == {"b"}


def test_an_element_written_twice_or_never_is_not_flagged():
    twice = (*PIPE[:1], task(writes=["a[31:64]"], node=0), *PIPE[2:])
    assert flagged(program(*twice)) == {"b"}
    hole = (*PIPE[:1], task(writes=["a[33:64]"], node=0), *PIPE[2:])
    assert flagged(program(*hole)) == {"b"}


def test_a_place_that_only_the_device_knows_is_not_flagged():
    tg = program(*PIPE)
    i = ex.var("i0", 64)
    for index, expected in ((i, {"a", "b"}), (ex.load("pos", (), DType.I64), {"b"})):
        node = RowMap("n0", (i,), ex.const(0, DType.F32), "a", (index,))
        assert flagged(replace(tg, graph=replace(tg.graph, nodes=(node, *tg.graph.nodes[1:])))) == expected
    sides = (*PIPE[:1], task(writes=["a[32:64] at p"], node=0), *PIPE[2:])
    assert flagged(program(*sides)) == {"b"}


def test_versions_own_reads_other_writers_and_large_buffers_are_not_flagged():
    version = task(["a[0:64]"], ["a@1[0:64]"], node=1)
    assert flagged(program(*PIPE[:2], version, task(["a@1[0:64]"], ["b[0:64]"], node=2))) == set()
    own = (*PIPE[:1], task(["a[0:32]"], ["a[32:64]"], node=0), *PIPE[2:])
    assert flagged(program(*own)) == {"b"}
    foreign = (*PIPE[:1], task(writes=["a[32:64]"], node=0, op="sample"), *PIPE[2:])
    assert flagged(program(*foreign)) == {"b"}
    limit = MAX_BYTES // 4
    for size, expected in ((limit, {"a"}), (limit + 1, set())):
        tg = program(task(writes=[f"a[0:{size}]"]), task([f"a[0:{size}]"], ["b[0:1]"]), size=size)
        assert flagged(tg) == expected


def test_other_memory_is_ordered_without_help_of_a_flagged_edge():
    """Task 2 runs after task 0 in any case, since it polls b; but polling b does not show what 0 wrote to plain."""
    tg = program(
        task(writes=["plain[0:1]"]),
        task(["plain[0:1]"], ["b[0:64]"]),
        task(["b[0:64]", "plain[0:1]"], ["c[0:1]"]),
    )
    tg = changed(tg, "plain", dtype=DType.I64)
    assert edges(derive_events(tg)) == {(0, 1), (1, 2)}
    tg = derive_events(choose_flagged(tg))
    assert tg.flagged == {"b"} and edges(tg) == {(0, 1), (0, 2)}


def test_a_counter_waits_for_all_readers_of_its_old_value():
    """Nothing else that is ordered implies it any more, so its readers signal; nothing else does."""
    tg = derive_events(choose_flagged(qwen3_8b_like(Sizes(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ff=96,
                                                          vocab=200, capacity=32, splits=2), workers=4)))  # fmt: skip
    assert {b.storage for b in tg.buffers.values() if b.kind is BufferKind.SCRATCH} == tg.flagged
    assert len(tg.events) == 3
    for e in tg.events:
        (counter,) = e.waiters
        assert tg.tasks[counter].writes[0].buffer.startswith("counter")
        assert {tg.tasks[p].op for p in e.producers} == {"attention"} and len(e.producers) == 4
    assert max(map(len, tg.signals())) == 1 and max(map(len, tg.waits())) == 1


@given(programs(), st.sets(st.sampled_from("abz")))
@settings(max_examples=80, deadline=None)
def test_events_are_those_of_the_program_without_the_flagged_accesses(tg, names):
    """The definition: every conflict on other memory is ordered by events alone."""
    tg = replace(tg, flagged=frozenset(names))
    rest = tuple(
        replace(t, reads=tuple(a for a in t.reads if a.buffer not in names),
                writes=tuple(a for a in t.writes if a.buffer not in names)) for t in tg.tasks
    )  # fmt: skip
    bare = replace(tg, tasks=rest, flagged=frozenset())
    got = derive_events(tg)
    assert edges(got) == edges(derive_events(bare)) and got.flagged == names
    assert conflicts(bare) <= closure(edges(got))


@given(programs(), st.sets(st.sampled_from("abz")), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_flagged_memory_is_apart_and_never_reused(tg, names, start):
    tg = derive_events(replace(tg, flagged=frozenset(names)))
    s = schedule(tg, 3)
    sizes = {b.storage: b.nbytes for b in tg.buffers.values()}
    held = sorted((s.arena[n], s.arena[n] + sizes[n]) for n in names if n in sizes)
    assert all(stop <= begin for (_, stop), (begin, _) in zip(held, held[1:]))
    assert all(begin % 128 == 0 for begin, _ in held)
    assert s.flagged_start % 256 == 0 == s.flagged_bytes % 256
    assert all(s.flagged_start <= a and b <= s.flagged_start + s.flagged_bytes for a, b in held)
    assert s.arena_bytes == s.flagged_start + 2 * s.flagged_bytes
    plain = {n: at for n, at in s.arena.items() if n not in names}
    assert all(at + sizes[n] <= s.flagged_start for n, at in plain.items())
    assert plain == plan_memory(tg, s.queues)[0]
    places, first, size = plan_flagged(tg, start)
    assert first >= start and first % 256 == 0 and bool(size) == bool(places)


def test_plain_memory_is_reused_only_between_tasks_that_events_order():
    """What a chain of flagged edges orders in time it does not order in memory."""
    chain = [
        task(writes=["p[0:64]"]),
        task(["p[0:64]"], ["a[0:64]"]),
        task(["a[0:64]"], ["q[0:64]"]),
        task(["q[0:64]"]),
    ]
    tg = program(*chain)
    assert plan_memory(derive_events(tg))[1] == 2 * 256
    tg = derive_events(replace(tg, flagged=frozenset("a")))
    arena, size = plan_memory(tg)
    assert arena.keys() == {"p", "q"} and size == 2 * 256
    assert plan_memory(tg, ((0, 1, 2, 3),))[1] == 256


def test_without_flagged_storages_nothing_changes():
    s = schedule(derive_events(program(*PIPE)), 2)
    assert s.flagged_bytes == 0 and s.flagged_start == s.arena_bytes
