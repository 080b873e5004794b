"""The race detector agrees with the verifier, and with brute force, on valid programs and on broken ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scale import Sizes, qwen3_8b_like
from verify import mutate, oracle, programs

from mpk_dynamo.errors import VerificationError
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import choose_flagged, derive_events
from mpk_dynamo.reference import interleave
from mpk_dynamo.reference.races import find_races
from mpk_dynamo.verify import verify_schedule

SMALL = Sizes(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ff=96, vocab=200, capacity=32, splits=2)
ORDERS = [("round_robin", 0), ("program", 0), ("reversed", 0), ("random", 1), ("starved", 0), ("starved", 2)]


def decoder(flagged: bool = False, workers: int = 4) -> Schedule:
    tg = qwen3_8b_like(SMALL, workers=workers)
    return schedule(derive_events(choose_flagged(tg) if flagged else tg), workers)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("order, seed", ORDERS)
def test_a_valid_decoder_has_none_in_any_order(order, seed, flagged):
    s = decoder(flagged)
    assert not find_races(s, interleave(s, order, seed))


def test_a_race_is_found_in_every_order_and_named():
    s = decoder()
    gone = next(e for e in s.tasks.events if len(e.producers) > 1)
    kept = [replace(e, producers=e.producers[1:]) if e is gone else e for e in s.tasks.events]
    broken = replace(s, tasks=replace(s.tasks, events=tuple(kept)))
    for order, seed in ORDERS:
        found = find_races(broken, interleave(broken, order, seed))
        assert found and all("model.layers" in race.text or "embed" in race.text for race in found), order


def test_shared_arena_memory_is_watched_byte_by_byte():
    s = decoder()
    overlapping = replace(s, arena={**s.arena, "q0": s.arena["hidden"] + 64})
    assert not find_races(s, interleave(s)) and find_races(overlapping, interleave(overlapping))


def verdicts(s: Schedule) -> tuple[str, bool]:
    """The verifier's rule, and whether the detector finds nothing."""
    try:
        verify_schedule(s)
        rule = ""
    except VerificationError as error:
        rule = error.rule
    try:
        return rule, not find_races(s, interleave(s, "random", 5))
    except VerificationError:  # deadlock: not the detector's to say
        return rule, False


ORDERING = ("T4", "S2")
"""Rules about order alone. What else the verifier refuses, the detector may not even look at, or (S3 takes buffers
whole, the detector bytes) may find harmless."""


def agree(s: Schedule, wanted: int, choose) -> int:
    """The detector's and the verifier's verdict on mutants of queues, events and places; how many were compared."""
    compared = 0
    kept = ("exchanged", "moved to place", "loses", "placed on", "drop event", "becomes")
    mutants = [m for m in mutate.schedule_mutants(s) if any(word in m[0] for word in kept)]
    for what, mutant in choose(mutants, wanted):
        if not oracle.declared_fine(mutant.tasks) or "loses place" in what or mutant.tasks.flagged and "placed" in what:
            continue
        rule, quiet = verdicts(mutant)
        if rule in ("", *ORDERING):
            assert quiet == (rule == ""), f"{what}: {rule or 'accepted'}, races {not quiet}"
            compared += 1
    return compared


@pytest.mark.parametrize("flagged", [False, True])
def test_agrees_with_the_verifier_on_every_mutant_of_a_step(flagged):
    tg = programs.decoder_like()
    s = programs.schedule(programs.flagged(tg, ("h", "part")) if flagged else tg, 3, seed=5)
    assert agree(s, 10**6, lambda mutants, _: mutants) > 100


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans(), st.data())
def test_agrees_with_the_verifier_on_random_programs(seed, workers, flagged, data):
    tg = programs.random_tasks(seed)
    s = programs.schedule(programs.some_flagged(tg, seed) if flagged else tg, workers, seed)
    assert verdicts(s) == ("", True)
    agree(s, 25, lambda mutants, n: data.draw(st.lists(st.sampled_from(mutants), max_size=n)) if mutants else [])
