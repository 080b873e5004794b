"""The timing model on programs whose answer is known by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from small_programs import program, task

from mpk_dynamo.ops.attention import AttentionOperator
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.schedule.simulate import simulate
from mpk_dynamo.passes.schedule.timeline import COMPUTED, INPUTS, READY, STREAMED
from mpk_dynamo.passes.tasks import choose_flagged, derive_events
from mpk_dynamo.passes.tasks.tile import tile
from mpk_dynamo.targets import known, machine_of
from mpk_dynamo.targets.machine import Machine

UNIT = Machine(
    bandwidth=20.0, spread=0.0, ring=30.0, waiting=10.0, fma=40.0, mma=40.0, task=1.0, event=3.0, poll=2.0,
    prologue=0.5, normed=4.0, plain=8.0, finish=0.25, signal=0.125, small=1.0, query=4.0, attend=5.0, gather=10.0,
    fetched=0.0,
)  # fmt: skip
"""With two workers, each streams 10 bytes per second."""


def run(*tasks, workers=2, flagged=False, machine=UNIT):
    tg = program(*tasks)
    return simulate(schedule(derive_events(choose_flagged(tg) if flagged else tg), workers), machine)


def test_a_queue_runs_one_task_at_a_time():
    assert run(task(), task(), workers=1).clock[:, COMPUTED] == pytest.approx([2, 4])


def test_an_edge_to_another_worker_costs_and_one_on_the_same_worker_does_not():
    produce = [task(writes=[f"a[{i}:{i + 1}]"], node=0) for i in range(2)]
    straight = [task([f"a[{i}:{i + 1}]"], node=1) for i in range(2)]
    crossed = [task([f"a[{1 - i}:{2 - i}]"], node=1) for i in range(2)]
    # computed at 2, signalled at 2.125, the worker is free for the next at 3.125; an event has crossed at 5
    assert run(*produce, *straight).clock[2:, READY] == pytest.approx([3.125, 3.125])
    assert run(*produce, *crossed).clock[2:, READY] == pytest.approx([5, 5])


def test_an_edge_through_flagged_data_costs_a_poll():
    tasks = [task(writes=["a[0:32]"], node=0), task(writes=["a[32:64]"], node=0)]
    crossed = [task(["a[32:64]"], node=1), task(["a[0:32]"], node=1)]
    timeline = run(*tasks, *crossed, flagged=True)
    assert timeline.schedule.tasks.flagged == {"a"}
    assert timeline.clock[2:, READY] == pytest.approx([3, 3])  # no event to wait for, none to signal
    assert timeline.clock[2:, INPUTS] == pytest.approx([4, 4])
    assert run(*tasks, *crossed[::-1], flagged=True).clock[2:, INPUTS] == pytest.approx([3, 3])


def test_an_attention_takes_the_time_of_its_keys():
    found = run(task(op="attention", nbytes=20), workers=1)
    assert found.clock[0, COMPUTED] == pytest.approx(1 + 4 + 5 + 2)
    early = dataclasses.replace(UNIT, fetched=50.0)  # the first 50 bytes come while the query is awaited
    for nbytes, wanted in ((20, 1 + 4 + 5), (50, 1 + 5 + 5), (80, 1 + 5 + 3 + 5)):
        found = run(task(op="attention", nbytes=nbytes), workers=1, machine=early)
        assert found.clock[0, COMPUTED] == pytest.approx(wanted)


def linear_chain(weights_rows, tokens=1, normed=False):
    """Linears of one worker each, one after the other; K = 4 floats, so a row has 16 bytes."""
    from mpk_dynamo.ir import expr as ex
    from mpk_dynamo.ir.graph import Graph, Linear, LinearPart
    from mpk_dynamo.ir.region import Access
    from mpk_dynamo.ir.tasks import Task, TaskGraph
    from mpk_dynamo.ir.types import BufferKind, DType, buffer

    nodes, tasks, buffers = [], [], {}
    for i, rows in enumerate(weights_rows):
        weight, out = f"w{i}", f"y{i}"
        buffers[weight] = buffer(weight, DType.F32, (rows, 4), BufferKind.PARAM)
        buffers[out] = buffer(out, DType.F32, (rows,), BufferKind.OUTPUT)
        n = ex.var("n", rows)
        part = LinearPart((weight,), rows, ex.acc(0), out, (n,))
        k = ex.var("k", 4)
        x = ex.reduce("sum", k, ex.cast(k, DType.F32)) if normed else ex.const(0, DType.F32)
        nodes.append(Linear(f"linear{i}", ex.var("t", tokens), k, x, (part,)))
        reads = (Access(weight, ((0, rows), (0, 4))),)
        tasks.append(Task(i, i, "linear", (0, rows), reads, (Access(out, ((0, rows),)),), rows * 16, 0))
    return TaskGraph(Graph(tuple(nodes), dict(buffers), ()), buffers, tuple(tasks))


def test_a_loader_runs_ahead_of_its_worker_until_the_ring_is_full():
    """One worker with 20 bytes per second; its first inputs are there at 1.5 s, when 15 bytes are in the ring."""
    timeline = simulate(schedule(linear_chain([4]), 1), UNIT)
    assert timeline.clock[0, [READY, INPUTS, STREAMED, COMPUTED]] == pytest.approx([1, 1.5, 1.5 + 49 / 20, 4.2])
    late = dataclasses.replace(UNIT, task=100.0)
    assert simulate(schedule(linear_chain([4]), 1), late).clock[0, STREAMED] == pytest.approx(100.5 + 34 / 20)
    slow = dataclasses.replace(UNIT, fma=8.0)  # bytes per second: now the body is the limit
    assert simulate(schedule(linear_chain([4]), 1), slow).clock[0, STREAMED] == pytest.approx(1.5 + 8)


def test_several_tokens_are_fetched_and_perhaps_normed():
    """x of 3 tokens, 4 floats each: 48 bytes, at 8 per second, or at 4 with a norm."""
    for normed, wanted in ((False, 1.5 + 6), (True, 1.5 + 12)):
        assert simulate(schedule(linear_chain([4], 3, normed), 1), UNIT).clock[0, INPUTS] == pytest.approx(wanted)


def test_an_attention_reads_the_keys_that_are_there():
    """Of 1100 keys in two splits: all, half, or the least number that a split has."""
    node, graph = next((n, g) for n, g in AttentionOperator().samples() if n.s.size == 1100)
    made = schedule(derive_events(tile(graph, 2 * node.b.size * node.g.size)), 4)
    reading = next(t for t in made.tasks.tasks if t.op == "attention" and t.tile[3] == 2)
    for live, share in ((None, 1.0), (4000, 1.0), (550, 0.5), (100, 128 * 2 / 1100)):
        clock = simulate(made, UNIT, live).clock[reading.id]
        assert clock[COMPUTED] - clock[INPUTS] == pytest.approx(5 + share * reading.bytes / 10)


def test_predictions_repeat_and_machines_differ():
    made = schedule(linear_chain([64] * 8), 4)
    h200, a100 = (machine_of(known(name)) for name in ("h200", "a100"))
    first = simulate(made, h200)
    assert np.array_equal(first.clock, simulate(made, h200).clock) and first.predicted
    assert (np.diff(first.clock, axis=1) >= 0).all()
    large = schedule(linear_chain([1 << 14] * 264), 132)
    assert simulate(large, a100).makespan > 1.5 * simulate(large, h200).makespan
