"""`mutate` in small: broken programs of a real model are refused, and the command notices when they are not."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mpk_dynamo import verify
from mpk_dynamo.tools.cli import main
from mpk_dynamo.tools.mutation import command
from mpk_dynamo.tools.mutation.subject import Subject, subject


@pytest.fixture(scope="module")
def model() -> Subject:
    return subject("llama:1")


def run(model: Subject, count: int, seed: int = 7) -> dict[tuple[str, str], command.Tally]:
    return command.mutate([model], count, seed, lambda text: None)


def test_mutants_of_a_real_model_are_refused(model: Subject) -> None:
    tallies = run(model, 300)
    survivors = [text for t in tallies.values() for text in t.survivors]
    assert not survivors, survivors
    killed = sum((t.rules for t in tallies.values()), start=Counter())
    assert sum(t.mutants for t in tallies.values()) >= 300
    wanted = "G1 G2 T1 T2 T3 T4 T6 T7 T11 T12 S1 S2 S8 P1 P2 P3"
    assert set(wanted.split()) <= set(killed)
    assert killed.total() > 240, "most mutants do harm"


@pytest.mark.parametrize(
    "rule, stage, kind",
    [
        ("check_needed", "events derived anew", "read dropped"),
        ("check_storages", "tasks", "drop a wait"),
        ("check_operands", "program", "exchange operands"),
        ("check_arguments", "program", "argument of a task"),
        ("check_slots", "schedule", "share a counter"),
    ],
)
def test_a_rule_that_is_missing_shows(
    rule: str, stage: str, kind: str, model: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, rule, lambda *_: 0)
    chosen = [k for k in command.kinds() if (k.stage, k.name) == (stage, kind)]
    tallies = command.mutate([model], 120, 7, lambda text: None, chosen)
    assert any(t.survivors for t in tallies.values()), f"nothing got past the verifier without {rule}"


def test_the_valid_program_does_no_harm(model: Subject) -> None:
    from mpk_dynamo.tools.mutation import judge

    tg, s, p = model.schedule.tasks, model.schedule, model.program
    assert judge.graph_harm(model.graph, model.graph) == judge.tasks_harm(tg, tg) == ""
    assert judge.schedule_harm(s, s) == judge.program_harm(p, p) == ""


def test_every_kind_finds_something_to_break(model: Subject) -> None:
    r = random.Random(0)
    idle = [(k.stage, k.name) for k in command.kinds() if not any(k.make(r, model) for _ in range(50))]
    assert not idle


def test_an_unknown_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutate", "--model", "nothing:1"]) == 2
    assert "no model 'nothing:1'" in capsys.readouterr().err
