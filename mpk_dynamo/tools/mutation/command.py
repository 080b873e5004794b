"""The run: mutants of every kind of every program, the verifier's answer, the judge's, and a table."""

from __future__ import annotations

import json
import random
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import VerificationError
from ...ir.tasks import TaskGraph
from . import break_tables, breakers, judge
from .subject import Subject, subject

MODELS = ("llama:1", "qwen3:1", "gemma2:2", "phi3:1", "gpt2:1", "olmo2:3", "cohere:1", "opt:2")
ATTEMPTS = 4
"""Draws per mutant wanted: some find nothing to break, some repeat an earlier one."""


@dataclass
class Tally:
    """Of one kind. rules: rule -> mutants that it refused. harmless: mutants let pass that the judge has shown to do
    what the valid program does. survivors: those let pass that do something else, each in words."""

    stage: str
    rules: Counter[str] = field(default_factory=Counter)
    harmless: int = 0
    survivors: list[str] = field(default_factory=list)

    @property
    def mutants(self) -> int:
        return self.rules.total() + self.harmless + len(self.survivors)


@dataclass(frozen=True)
class Kind:
    """A way to break programs: make(random, subject) -> (what, mutant), and the verifier's and the judge's function."""

    name: str
    stage: str
    make: Callable[[random.Random, Subject], "tuple[str, Any] | None"]
    verify: Callable[[Any, Subject], object]
    harm: Callable[[Any, Subject], str]


def kinds() -> list[Kind]:
    """All of them, by stage of the pipeline."""
    from ...verify import verify_graph, verify_program, verify_schedule, verify_tasks

    found = []

    def add(name: str, stage: str, make: Any, verify: Any, harm: Any) -> None:
        found.append(Kind(name, stage, make, verify, harm))

    for name, breaker in break_tables.GRAPH.items():
        add(name, "graph", lambda r, s, b=breaker: b(r, s.graph), lambda m, s: verify_graph(m),
            lambda m, s: judge.graph_harm(m, s.graph))  # fmt: skip
    for name, breaker in {**breakers.EVENTS, **breakers.TASKS, **breakers.REGIONS}.items():
        add(name, "tasks", lambda r, s, b=breaker: b(r, s.schedule.tasks), lambda m, s: verify_tasks(m),
            lambda m, s: judge.tasks_harm(m, s.schedule.tasks))  # fmt: skip
    for name, breaker in {**breakers.REGIONS, **breakers.TASKS}.items():
        add(name, "events derived anew", lambda r, s, b=breaker: _anew(b(r, s.schedule.tasks)),
            lambda m, s: verify_tasks(m), lambda m, s: judge.tasks_harm(m, s.schedule.tasks))  # fmt: skip
    for name, breaker in breakers.EVENTS.items():
        add(name, "schedule", lambda r, s, b=breaker: _scheduled(s, b(r, s.schedule.tasks)),
            lambda m, s: verify_schedule(m, s.target), lambda m, s: judge.schedule_harm(m, s.schedule))  # fmt: skip
    for name, breaker in breakers.SCHEDULE.items():
        add(name, "schedule", lambda r, s, b=breaker: b(r, s.schedule), lambda m, s: verify_schedule(m, s.target),
            lambda m, s: judge.schedule_harm(m, s.schedule))  # fmt: skip
    for name, breaker in break_tables.PROGRAM.items():
        add(name, "program", lambda r, s, b=breaker: b(r, s.program), lambda m, s: verify_program(m, s.target),
            lambda m, s: judge.program_harm(m, s.program))  # fmt: skip
    return found


def _anew(broken: tuple[str, TaskGraph] | None) -> tuple[str, TaskGraph] | None:
    """Events and flags as the passes derive them from the wrong declarations; as they were, where a pass cannot."""
    from ...passes.tasks import choose_flagged, derive_events

    if broken is None:
        return None
    try:
        return broken[0], derive_events(choose_flagged(broken[1]))
    except Exception:  # the passes may take declarations for granted, the verifier may not
        return None


def _scheduled(s: Subject, broken: tuple[str, TaskGraph] | None) -> "tuple[str, Any] | None":
    if broken is None:
        return None
    return broken[0], replace(s.schedule, tasks=broken[1], slots=tuple(range(len(broken[1].events))))


def mutate(
    subjects: list[Subject], count: int, seed: int, say: Callable[[str], None], chosen: Sequence[Kind] = ()
) -> dict[tuple[str, str], Tally]:
    """At least `count` mutants in all of some kinds (default: every one), where there are so many; by (stage, kind)."""
    tallies: dict[tuple[str, str], Tally] = {}
    chosen = chosen or kinds()
    each = -(-count // (len(subjects) * len(chosen)))
    for left in range(len(subjects), 0, -1):
        s = subjects[len(subjects) - left]
        for number, kind in enumerate(chosen):
            tally = tallies.setdefault((kind.stage, kind.name), Tally(kind.stage))
            for what, mutant in _draw(kind, s, each, random.Random(f"{seed} {s.name} {number}")):
                _answer(kind, s, what, mutant, tally)
            # kinds that found too little to break leave their share to the rest
            done, rest = sum(t.mutants for t in tallies.values()), left * len(chosen) - number - 1
            each = max(1, -(-(count - done) // max(rest, 1)))
        say(f"{s.name}: {sum(t.mutants for t in tallies.values())} mutants so far")
    return tallies


def _draw(kind: Kind, s: Subject, count: int, r: random.Random) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for _ in range(count * ATTEMPTS):
        made = kind.make(r, s)
        if made is not None and made[0] not in seen:
            seen.add(made[0])
            yield made
            if len(seen) == count:
                return


def _answer(kind: Kind, s: Subject, what: str, mutant: Any, tally: Tally) -> None:
    from ... import verify

    verify._proven.clear()  # each mutant by itself
    try:
        kind.verify(mutant, s)
    except VerificationError as error:
        tally.rules[error.rule] += 1
        return
    harm = kind.harm(mutant, s)
    if harm:
        tally.survivors.append(f"{s.name}: {what}: {harm}")
    else:
        tally.harmless += 1


def table(tallies: dict[tuple[str, str], Tally]) -> str:
    """Markdown: a row per kind, and the sum."""
    lines = ["| stage | broken | mutants | refused | by rules | harmless | survivors |", "|---" * 7 + "|"]

    def row(stage: str, name: str, ts: list[Tally], rules: str) -> str:
        killed, harmless = sum(t.rules.total() for t in ts), sum(t.harmless for t in ts)
        numbers = sum(t.mutants for t in ts), killed, rules, harmless, sum(len(t.survivors) for t in ts)
        return f"| {stage} | {name} | " + " | ".join(map(str, numbers)) + " |"

    for (stage, name), t in tallies.items():
        if t.mutants:
            rules = " ".join(f"{rule} {n}" for rule, n in sorted(t.rules.items(), key=lambda x: -x[1]))
            lines.append(row(stage, name, [t], rules))
    lines.append(row("all", "", list(tallies.values()), ""))
    return "\n".join(lines)


def run(arguments: Namespace) -> int:
    """The command. Exit status 1 when a harmful mutant was let pass."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", file=sys.stderr, flush=True)

    subjects = []
    for name in arguments.model or MODELS:
        subjects.append(subject(name, arguments.target))
        tg = subjects[-1].schedule.tasks
        say(f"{name}: {len(tg.tasks)} tasks, {len(tg.events)} events, {len(tg.flagged)} flagged buffers")
    tallies = mutate(subjects, arguments.mutants, arguments.seed, say)
    survivors = [text for t in tallies.values() for text in t.survivors]
    print(table(tallies))
    total, harmless = sum(t.mutants for t in tallies.values()), sum(t.harmless for t in tallies.values())
    killed = sum(t.rules.total() for t in tallies.values())
    rate = killed / (total - harmless) if total > harmless else 1
    seconds = time.perf_counter() - start
    print(f"\n{total} mutants of {len(subjects)} programs in {seconds:.0f} s: {killed} refused, {harmless} harmless to")
    print(f"the judge, {len(survivors)} survivors; {rate:.2%} of what is not harmless is refused")
    for (stage, name), t in tallies.items():
        for text in t.survivors[: arguments.show]:
            print(f"survivor ({stage}, {name}): {text}")
    if arguments.json:
        rows = [
            {"stage": stage, "kind": name, "rules": dict(t.rules), "harmless": t.harmless, "survivors": t.survivors}
            for (stage, name), t in tallies.items()
        ]
        with open(arguments.json, "w") as file:
            json.dump({"models": [s.name for s in subjects], "seed": arguments.seed, "kinds": rows}, file, indent=1)
    return 1 if survivors else 0
