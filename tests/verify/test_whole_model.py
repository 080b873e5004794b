"""A program of Qwen3-8B's size: accepted, and one lost dependency among 25,000 tasks is found. Prints the times."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from scale import Sizes, qwen3_8b_like

from mpk_dynamo.errors import VerificationError
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import choose_flagged, derive_events
from mpk_dynamo.verify import verify_graph, verify_schedule, verify_tasks

SMALL = Sizes(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ff=96, vocab=200, capacity=32, splits=2)


def lost_edges(tg, count, seed):
    """Mutants that lose one producer or one waiter of a random event."""
    r = random.Random(seed)
    for _ in range(count):
        e = r.choice(tg.events)
        field = r.choice(("producers", "waiters"))
        members = getattr(e, field)
        gone = r.choice(members)
        changed = replace(e, **{field: tuple(t for t in members if t != gone)})
        yield e.id, field, gone, replace(tg, events=(*tg.events[: e.id], changed, *tg.events[e.id + 1 :]))


def reachable(tg, start):
    """Tasks ordered before `start`, by walking events backwards."""
    by_task = tg.waits()
    seen, stack = set(), [start]
    while stack:
        for e in by_task[stack.pop()]:
            new = [p for p in tg.events[e].producers if p not in seen]
            seen.update(new)
            stack += new
    return seen


def test_every_lost_edge_of_a_small_decoder_is_refused():
    tg = derive_events(qwen3_8b_like(SMALL, workers=4))
    verify_graph(tg.graph)
    verify_tasks(tg)
    refused = 0
    for e, field, gone, mutant in lost_edges(tg, 60, seed=1):
        try:
            verify_tasks(mutant)
        except VerificationError as error:
            assert error.rule in ("T2", "T4")
            refused += 1
            continue
        # harmless only if every pair that the edge ordered is ordered without it
        lost = [(p, w) for p in tg.events[e].producers for w in tg.events[e].waiters if gone in (p, w)]
        assert all(p in reachable(mutant, w) for p, w in lost), f"event {e} lost {gone} of {field}"
    assert refused > 50


@pytest.mark.slow
@pytest.mark.parametrize("flagged", [False, True])
def test_whole_model_is_verified_in_seconds_and_one_lost_edge_is_found(flagged):
    program = qwen3_8b_like()
    tg = derive_events(choose_flagged(program) if flagged else program)
    print(verify_graph(tg.graph), verify_tasks(tg), verify_schedule(schedule(tg, 132)), sep="\n")
    for e, field, gone, mutant in lost_edges(tg, 5, seed=2):
        with pytest.raises(VerificationError) as error:
            verify_tasks(mutant)
        assert error.value.rule in ("T2", "T4"), f"event {e} lost {gone} of {field}"
    for name in random.Random(3).sample(sorted(tg.flagged), min(3, len(tg.flagged))):
        with pytest.raises(VerificationError, match="T4"):
            verify_tasks(replace(tg, flagged=tg.flagged - {name}))


@pytest.mark.slow
def test_64_layers_in_the_shape_of_a_32b_model_are_verified_in_5_s():
    """Of this process, on one core. One access of a late layer that is wrong is found among those that are alike."""
    tg = derive_events(choose_flagged(qwen3_8b_like(Sizes(layers=64, hidden=5120, heads=64, kv_heads=8, ff=25600))))
    made = schedule(tg, 132)
    start = time.process_time()
    verify_graph(tg.graph)
    verify_tasks(tg)
    verify_schedule(made)
    assert time.process_time() - start < 5
    t = next(t for t in tg.tasks if t.writes and t.writes[0].buffer == "act60")
    (*axes, (first, last)), others = t.writes[0].box, t.writes[1:]
    for change in ((first, last - 1), (first, last + 1), (first + 1, last + 1)):
        writes = replace(t.writes[0], box=(*axes, change)), *others
        with pytest.raises(VerificationError, match="act60"):
            verify_tasks(replace(tg, tasks=(*tg.tasks[: t.id], replace(t, writes=writes), *tg.tasks[t.id + 1 :])))
