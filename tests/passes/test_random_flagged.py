"""Random programs with random flagged sets: verified, and every order of tasks and workers gives the same bits."""

from __future__ import annotations

from dataclasses import replace

import interpreter
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_random_graphs import Drawn

from mpk_dynamo.ir.types import BufferKind
from mpk_dynamo.passes.graph import PASSES
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import derive_events, tile
from mpk_dynamo.passes.tasks.choose_flagged import flaggable
from mpk_dynamo.reference import Executor, allocate, interleave, run_tasks
from mpk_dynamo.reference.races import find_races
from mpk_dynamo.verify import verify_schedule, verify_tasks

EXAMPLES = {"max_examples": 50, "deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(**EXAMPLES, derandomize=True)
@given(st.data())
def test_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    any_order(data)


@pytest.mark.slow
@settings(**{**EXAMPLES, "max_examples": 3000})
@given(st.data())
def test_any_order_gives_the_same_bits_thousands_of_times(data: st.DataObject) -> None:
    any_order(data)


def any_order(data: st.DataObject) -> None:
    drawn = Drawn(data.draw, data.draw(st.sampled_from((1, 3))))
    for _ in range(data.draw(st.integers(5, 16))):
        drawn.step()
    graph = drawn.graph()
    for graph_pass in PASSES if data.draw(st.booleans()) else ():
        graph = graph_pass(graph)
    workers = data.draw(st.integers(1, 6))
    bare = tile(graph, workers)
    inputs = interpreter.random_memory(graph)
    names = sorted(flaggable(bare))
    plain = data.draw(st.sets(st.sampled_from(names), max_size=2)) if names else set()
    chosen = frozenset(names) - plain
    event(f"{min(len(chosen), 3)} or more flagged")
    tg = derive_events(replace(bare, flagged=chosen))
    verify_tasks(tg)
    s = schedule(tg, workers)
    verify_schedule(s)

    def callers() -> dict[str, torch.Tensor]:
        kinds = (BufferKind.PARAM, BufferKind.INPUT, BufferKind.STATE)
        return {b.storage: inputs[b.storage].clone() for b in graph.buffers.values() if b.kind in kinds}

    def results(memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kinds = (BufferKind.OUTPUT, BufferKind.STATE)
        return {b.storage: memory[n] for n, b in tg.buffers.items() if b.kind in kinds}

    memory = allocate(tg.buffers, callers())
    run_tasks(replace(tg, events=(), flagged=frozenset()), memory)  # one by one, as listed
    want = results(memory)
    for order in ("round_robin", "random"):
        assert not find_races(s, interleave(s, order, 3))
    starving = data.draw(st.integers(0, workers - 1))
    tensors = callers()
    _same({**tensors, **Executor(s, order="starved", seed=starving, poison=True)(tensors)}, want)
    for order, seed in (("reversed", 0), ("random", 1), ("random", 2)):
        memory = allocate(tg.buffers, callers(), poison=True)
        run_tasks(tg, memory, order, seed)
        _same(results(memory), want)
        tensors = callers()
        outputs = Executor(s, order=order, seed=seed, poison=True)(tensors)
        _same({**tensors, **outputs}, want)


def _same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True)
