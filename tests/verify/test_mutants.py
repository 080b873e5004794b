"""The verifier and a brute-force oracle agree on every mutant: all harmful ones are refused, no harmless one is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verify import mutate, oracle, programs

from mpk_dynamo.errors import VerificationError
from mpk_dynamo.verify import verify_schedule, verify_tasks


def refused(check, program) -> str:
    """The rule that a program breaks, or ''."""
    try:
        check(program)
    except VerificationError as error:
        return error.rule
    return ""


def agree(check, fine, mutants) -> Counter[str]:
    """Rules that killed mutants, and 'equivalent' for the harmless."""
    rules: Counter[str] = Counter()
    for what, mutant in mutants:
        rule, good = refused(check, mutant), fine(mutant)
        assert bool(rule) != good, f"{what}: the verifier finds {rule or 'nothing'}, brute force says {good}"
        rules[rule or "equivalent"] += 1
    return rules


def test_task_mutants_of_a_decode_step_are_killed():
    tg = programs.decoder_like()
    verify_tasks(tg)
    rules = agree(verify_tasks, oracle.tasks_fine, mutate.task_mutants(tg))
    print(dict(rules))
    assert {"T1", "T2", "T3", "T4", "T6", "T9", "T10", "T11"} <= set(rules)
    assert rules["equivalent"] < rules.total() / 5


@pytest.mark.parametrize("names", [("h", "q", "part", "dead"), ("h", "part"), ("q",)])
def test_task_mutants_of_a_decode_step_with_flagged_buffers_are_killed(names):
    tg = programs.flagged(programs.decoder_like(), names)
    verify_tasks(tg)
    rules = agree(verify_tasks, oracle.tasks_fine, mutate.task_mutants(tg))
    print(dict(rules))
    assert {"T1", "T2", "T3", "T4", "T9", "T10", "T11", "T12"} <= set(rules)
    assert rules["equivalent"] < rules.total() / 5


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_schedule_mutants_of_a_decode_step_are_killed(workers, flagged):
    tg = programs.decoder_like()
    s = programs.schedule(programs.flagged(tg, ("h", "part")) if flagged else tg, workers, seed=5)
    verify_schedule(s)
    rules = agree(verify_schedule, oracle.schedule_fine, mutate.schedule_mutants(s))
    print(dict(rules))
    assert {"S1", "S2", "S3", "S5", "S6", "S8", "T2", "T12"} <= set(rules)
    assert rules["equivalent"] < rules.total() / 2 or workers == 1  # on one worker the queue orders everything


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.data())
def test_verifier_and_oracle_agree_on_random_programs(seed, flagged, data):
    tg = programs.random_tasks(seed)
    tg = programs.some_flagged(tg, seed) if flagged else tg
    assert oracle.tasks_fine(tg)
    verify_tasks(tg)
    mutants = list(mutate.task_mutants(tg))
    chosen = data.draw(st.lists(st.sampled_from(mutants), max_size=20))
    agree(verify_tasks, oracle.tasks_fine, chosen)
    # a mutant of a mutant: mistakes that hide each other
    if chosen:
        again = list(mutate.task_mutants(chosen[0][1]))
        agree(verify_tasks, oracle.tasks_fine, data.draw(st.lists(st.sampled_from(again), max_size=10)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans(), st.data())
def test_verifier_and_oracle_agree_on_random_schedules(seed, workers, flagged, data):
    tg = programs.random_tasks(seed)
    s = programs.schedule(programs.some_flagged(tg, seed) if flagged else tg, workers, seed)
    assert oracle.schedule_fine(s)
    verify_schedule(s)
    chosen = data.draw(st.lists(st.sampled_from(list(mutate.schedule_mutants(s))), max_size=20))
    agree(verify_schedule, oracle.schedule_fine, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_all_mutants_of_random_programs(seed, flagged):
    tg = programs.random_tasks(seed)
    tg = programs.some_flagged(tg, seed) if flagged else tg
    agree(verify_tasks, oracle.tasks_fine, mutate.task_mutants(tg))
    for workers in (1, 2, 3):
        s = programs.schedule(tg, workers, seed)
        agree(verify_schedule, oracle.schedule_fine, mutate.schedule_mutants(s))
