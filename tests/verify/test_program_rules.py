"""P1 to P3, T7 and S4: every field of every table is corrupted; what changes the meaning is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from mpk_dynamo import abi, targets
from mpk_dynamo.codegen import generate
from mpk_dynamo.errors import Unsupported, VerificationError
from mpk_dynamo.ir.program import Program
from mpk_dynamo.ops import OPERATORS
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import derive_events, tile
from mpk_dynamo.passes.tasks.choose_flagged import flaggable
from mpk_dynamo.verify import verify_program

TARGET = targets.known("h100")


def programs() -> Iterator[Program]:
    for operator in OPERATORS.values():
        for _, graph in operator.samples():
            try:
                yield generate(schedule(derive_events(tile(graph, 3)), 3), TARGET)
            except Unsupported:
                continue


PROGRAMS = list(programs())
LINEAR = next(p for p in PROGRAMS if len(p.tables["runs"]) and len(p.tables["queues"]) > 1)
SPLIT = next(p for p in PROGRAMS if p.tables["waits"])


def flagged(p: Program) -> Program:
    tg = p.schedule.tasks
    tg = derive_events(replace(tg, flagged=flaggable(tg)))
    return generate(schedule(tg, p.schedule.workers), TARGET)


FLAGGED = flagged(SPLIT)


def tables(p: Program) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(p.tables[name], dtype=struct.dtype).copy() for name, struct in abi.TABLES}


def with_table(p: Program, name: str, table: np.ndarray) -> Program:
    return replace(p, tables={**p.tables, name: table.tobytes()})


def meaning(p: Program) -> object:
    """What the device would do, with every index followed; None when one leads nowhere."""
    t = tables(p)

    def rows(name: str, start: int, count: int) -> list | None:
        return t[name][start : start + count].tolist() if start + count <= len(t[name]) else None

    out = []
    for q in t["queues"]:
        tasks = rows("tasks", int(q["task"]), int(q["task_count"]))
        if tasks is None:
            return None
        runs = rows("runs", int(q["run"]), int(q["run_count"]))
        for op, ident, o, oc, w, wc, s, sc, arg in tasks:
            fields = (rows("operands", o, oc), sorted(rows("waits", w, wc) or []), sorted(rows("signals", s, sc) or []))
            is_linear = p.kinds[op].startswith("linear") if op < len(p.kinds) else False
            segments = rows("segments", arg[6], arg[7]) if is_linear else None
            args = tuple(arg)[:6] if is_linear else tuple(arg)
            segments = [x[:3] for x in segments] if segments else None
            inside = w + wc <= len(t["waits"]) and s + sc <= len(t["signals"])
            out.append((op, ident, *fields, inside, segments, args))
        out.append(runs)
    return out


def test_accepts_generated_programs():
    assert len(PROGRAMS) > 10
    for p in PROGRAMS:
        report = verify_program(p, TARGET)
        assert set(report.rules) == {"P1", "P2", "P3", "T7", "S4"}


def corruptions(p: Program) -> Iterator[tuple[str, Program]]:
    for name, table in tables(p).items():
        for field in table.dtype.names:
            if field == "pad":
                continue
            for row in range(len(table)):
                places = range(8) if field == "arg" else [None]
                for place in places:
                    for delta in (1, -1, 7):
                        changed = table.copy()
                        at = changed[field][row : row + 1] if place is None else changed[field][row : row + 1, place]
                        at += np.array(delta).astype(at.dtype)
                        what = f"{name}[{row}].{field}{'' if place is None else [place]} {delta:+}"
                        yield what, with_table(p, name, changed)
        if len(table):
            yield f"{name} cut short", with_table(p, name, table[:-1])


@pytest.mark.parametrize("p", [LINEAR, SPLIT, PROGRAMS[0], FLAGGED], ids=["linear", "attention", "row_map", "flagged"])
def test_every_corruption_that_changes_the_meaning_is_refused(p):
    want, rules = meaning(p), Counter()
    for what, mutant in corruptions(p):
        try:
            verify_program(mutant, TARGET)
        except VerificationError as error:
            rules[error.rule] += 1
            continue
        rules["same meaning"] += 1
        assert meaning(mutant) == want, f"{what} was accepted"
    print(dict(rules))
    assert rules["P1"] > 10 and rules["same meaning"] < rules.total() / 2


@pytest.mark.parametrize(
    "rule, change, text",
    [
        ("P1", lambda p: replace(p, tables={k: v for k, v in p.tables.items() if k != "waits"}), "missing"),
        ("P1", lambda p: replace(p, tables={**p.tables, "waits": b"x"}), "1 bytes, entries of 8"),
        ("P2", lambda p: replace(p, kinds=()), "opcode 0 of 0"),
        ("P2", lambda p: replace(p, kinds=tuple("other:" + k for k in p.kinds)), "which is other"),
        ("S4", lambda p: replace(p, shared_bytes=10**6), "shared memory"),
        ("S4", lambda p: replace(p, threads=1025), "threads"),
        ("S4", lambda p: replace(p, threads=2048), "threads"),
        ("S4", lambda p: replace(p, target="a100"), "is for a100"),
        ("P3", lambda p: replace(p, bindings=p.bindings[:-1]), "refers to|copies|not bound"),
        ("P3", lambda p: replace(p, bindings=(*p.bindings, p.bindings[0])), "twice"),
        ("P3", lambda p: replace(p, bindings=(*p.bindings, "nothing")), "no tensor of the caller"),
        ("S4", lambda p: replace(p, bindings=p.bindings * 4000), "bindings"),
    ],
)
def test_refuses(rule, change, text):
    with pytest.raises(VerificationError, match=text) as error:
        verify_program(change(SPLIT), TARGET)
    assert error.value.rule == rule


@pytest.mark.parametrize("ref", [abi.ARENA_REF | 1 << 30, 999 << 40, 1 << 39, abi.ARENA_REF - 1])
def test_p3_refuses_references_outside_memory(ref):
    table = tables(SPLIT)["operands"]
    table["ref"][0] = ref
    with pytest.raises(VerificationError, match="operand 0 .* refers to") as error:
        verify_program(with_table(SPLIT, "operands", table), TARGET)
    assert error.value.rule == "P3"


@pytest.mark.parametrize("p", [SPLIT, FLAGGED], ids=["plain", "flagged"])
def test_p3_refuses_a_reference_that_denies_or_invents_a_flag(p):
    """A flagged buffer read as plain memory is read too early; a plain one polled and moved by a set is not there."""
    refs = tables(p)["operands"]["ref"]
    arena = np.flatnonzero((refs & np.uint64(abi.ARENA_REF) != 0) & (refs != np.uint64(abi.NO_REF)))
    assert len(arena) == 4  # partial sums and statistics, of attention and of its combination
    assert ((refs[arena] & np.uint64(abi.FLAGGED_REF) != 0) == bool(p.schedule.tasks.flagged)).all()
    for k in arena.tolist():
        table = tables(p)["operands"]
        table["ref"][k] ^= np.uint64(abi.FLAGGED_REF)
        with pytest.raises(VerificationError, match="byte .* of an arena of .*, where no such buffer starts") as error:
            verify_program(with_table(p, "operands", table), TARGET)
        assert error.value.rule == "P3"


@pytest.mark.parametrize("copy", [0, 8, 24])
def test_p3_refuses_uneven_copies(copy):
    table = tables(LINEAR)["runs"]
    table["copy"][0] = copy
    with pytest.raises(VerificationError, match="bytes at a time"):
        verify_program(with_table(LINEAR, "runs", table), TARGET)


def test_t7_refuses_a_partial_count():
    table = tables(SPLIT)["waits"]
    table["count"][0] -= 1
    with pytest.raises(VerificationError, match="waits for .* signals in slot") as error:
        verify_program(with_table(SPLIT, "waits", table), TARGET)
    assert error.value.rule == "T7"
