"""Programs that were proven once come back as they were, for exactly what they were made of, or not at all."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import subprocess
import sys
import zlib
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from passes import graphs

from mpk_dynamo import pipeline, proven
from mpk_dynamo.dump import Dump
from mpk_dynamo.errors import Unsupported, VerificationError
from mpk_dynamo.ir import expr as E
from mpk_dynamo.ir.graph import Attention, Graph, Linear, RowMap
from mpk_dynamo.ir.program import Program
from mpk_dynamo.ir.structure import structure
from mpk_dynamo.loop import Feed, Sampling, append_loop
from mpk_dynamo.ops import OPERATORS
from mpk_dynamo.report import Report
from mpk_dynamo.runtime.cache import Cache
from mpk_dynamo.settings import Settings
from mpk_dynamo.targets import known

TARGET = known("sm_90a")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graphs.decoder(graphs.Model(layers=1, capacity=24))


def make(graph: Graph, folder: Path, workers: int = 4, **options: Any) -> tuple[Program, Report]:
    report = Report()
    settings = Settings.from_options({"cache_dir": str(folder), **options}, environ={})
    dump = Dump(settings.dump_dir, None, report)
    return pipeline.proven_program(graph, workers, TARGET, settings, report, dump), report


def test_it_comes_back_as_it_was(graph: Graph, tmp_path: Path) -> None:
    first, made = make(graph, tmp_path)
    again, stored = make(graph, tmp_path)
    assert again is not first and again == first and structure(again.schedule) == structure(first.schedule)
    assert {"fuse", "verify", "codegen"} <= set(made.seconds) and set(stored.seconds) == {"stored"}
    described = {f.name for f in dataclasses.fields(Report)} - {"seconds"}
    assert all(getattr(made, name) == getattr(stored, name) for name in described)
    x = next(n for n in again.schedule.tasks.graph.nodes if isinstance(n, Linear)).x
    assert x is next(n for n in first.schedule.tasks.graph.nodes if isinstance(n, Linear)).x, "expressions are interned"


def test_a_refused_program_is_not_stored(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise VerificationError("P1", "no")

    with monkeypatch.context() as patch:
        patch.setattr("mpk_dynamo.verify.verify_program", refuse)
        with pytest.raises(VerificationError):
            make(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "verify" in make(graph, tmp_path)[1].seconds


def test_a_dump_has_every_stage(graph: Graph, tmp_path: Path) -> None:
    make(graph, tmp_path / "c")
    assert "fuse" in make(graph, tmp_path / "c", dump_dir=str(tmp_path / "d"))[1].seconds


def test_the_key_depends_on_everything(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        proven.key_of(graph, 4, TARGET),
        proven.key_of(graph, 5, TARGET),
        proven.key_of(graph, 4, known("h200")),
        proven.key_of(graphs.decoder(graphs.Model(layers=1, capacity=25)), 4, TARGET),
    ]
    with monkeypatch.context() as patch:
        patch.setattr("mpk_dynamo.ops.linear.CACHED_WEIGHTS", 3)
        keys.append(proven.key_of(graph, 4, TARGET))
    with monkeypatch.context() as patch:
        patch.setattr("mpk_dynamo.passes.graph.PASSES", ())
        keys.append(proven.key_of(graph, 4, TARGET))
    with monkeypatch.context() as patch:
        patch.setattr("mpk_dynamo.passes.tasks.choose_flagged", lambda tg: tg)
        assert proven.key_of(graph, 4, TARGET) is None, "nobody knows what it does"
    assert keys[0] == proven.key_of(graph, 4, TARGET)
    monkeypatch.setattr(proven, "_sources", lambda: "edited")
    keys.append(proven.key_of(graph, 4, TARGET))
    assert None not in keys and len(set(keys)) == len(keys)


def test_sources_edited_meanwhile_store_nothing(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = lambda: "before"  # noqa: E731
    edited.__wrapped__ = lambda: "after"  # type: ignore[attr-defined]
    monkeypatch.setattr(proven, "_sources", edited)
    make(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []


def other_values(x: Any) -> list[Any]:
    """Values of the same type that differ from `x` in one place; none for what has no such."""
    if isinstance(x, bool):
        return [not x]
    if isinstance(x, (int, float)):
        return [x + 1]
    if isinstance(x, str):
        return [x + "_"]
    if isinstance(x, E.Expr):
        return [E.cast(x, E.DType.F64 if x.dtype is not E.DType.F64 else E.DType.F32)]
    if isinstance(x, tuple):
        return [(*x, *x[:1]), x[1:]] if x else []
    return []


def test_every_field_of_a_graph_is_in_its_structure(graph: Graph) -> None:
    """Each field of each node and buffer, changed by itself, changes the text."""
    own, seen, tried = structure(graph), {structure(graph)}, 0
    first = {type(node): k for k, node in reversed([*enumerate(graph.nodes)])}
    for k in first.values():
        node = graph.nodes[k]
        for f in dataclasses.fields(node):
            for value in other_values(getattr(node, f.name)):
                nodes = (*graph.nodes[:k], dataclasses.replace(node, **{f.name: value}), *graph.nodes[k + 1 :])
                seen.add(structure(dataclasses.replace(graph, nodes=nodes)))
                tried += 1
    for name, b in [*graph.buffers.items()][::5]:
        for f in dataclasses.fields(b):
            for value in other_values(getattr(b, f.name)):
                buffers = {**graph.buffers, name: dataclasses.replace(b, **{f.name: value})}
                seen.add(structure(dataclasses.replace(graph, buffers=buffers)))
                tried += 1
    assert set(first) == {RowMap, Linear, Attention} and tried > 60
    assert len(seen) == tried + 1 and structure(graph) == own


def test_expressions_that_differ_in_one_place_have_another_structure() -> None:
    i, j = E.var("i", 4), E.var("j", 4)
    one, half = E.const(1, E.DType.F32), E.const(0.5, E.DType.F32)
    x, y = E.load("x", (i,), E.DType.F32), E.load("x", (j,), E.DType.F32)
    made = [
        i, j, E.var("i", 5), one, half, E.const(1, E.DType.F64), E.const(1, E.DType.I64), E.const(True, E.DType.BOOL),
        x, y, E.load("y", (i,), E.DType.F32), E.load("x", (i,), E.DType.BF16), E.acc(0), E.acc(1),
        E.op("add", x, one), E.op("sub", x, one), E.op("add", one, x), E.op("add", x, half), E.op("sub", x, y),
        E.op("sub", y, x), E.cast(x, E.DType.F64), E.cast(x, E.DType.BF16), E.reduce("sum", i, x),
        E.reduce("max", i, x), E.reduce("sum", i, y), E.const(0.0, E.DType.F32), E.const(-0.0, E.DType.F32),
        (x, y), [x, y], (y, x), ((x,), y), {"x": x}, {"y": x}, None, "None", 1, 1.0, True, "1", frozenset("ab"),
    ]  # fmt: skip
    assert len({structure(v) for v in made}) == len(made)
    for v in made:
        assert structure(pickle.loads(pickle.dumps(v))) == structure(v)
    assert pickle.loads(pickle.dumps(made[18])) is made[18]


@pytest.mark.slow
def test_the_structure_is_the_same_in_every_process(graph: Graph) -> None:
    root = Path(__file__).resolve().parents[1]
    text = (
        f"import sys; sys.path[:0] = {[str(root), str(root / 'tests')]!r}\nfrom passes import graphs\n"
        "from mpk_dynamo import proven\nfrom mpk_dynamo.targets import known\n"
        "print(proven.key_of(graphs.decoder(graphs.Model(layers=1, capacity=24)), 4, known('sm_90a')))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == proven.key_of(graph, 4, TARGET)


def kept(graph: Graph, folder: Path) -> bool:
    """Whether the program of a graph comes back as it was when it is asked for a second time."""
    first, _ = make(graph, folder)
    again, report = make(graph, folder)
    return set(report.seconds) == {"stored"} and again == first and structure_of(again) == structure_of(first)


def structure_of(program: Program) -> str:
    return structure(program.schedule, proven.others_of(program.schedule.tasks.graph))


@pytest.mark.parametrize("kind", [*OPERATORS], ids=lambda kind: kind.__name__)
def test_programs_of_every_operator_are_kept(kind: type, tmp_path: Path) -> None:
    """Of every eighth sample, of those that have a body on the device."""
    found = []
    for k, (_, graph) in enumerate(OPERATORS[kind].samples()):
        if k % 8 == 0:
            with suppress(Unsupported):
                found.append(kept(graph, tmp_path / str(k)))
    assert found and all(found)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(True, 0.7, 20, 0.9, 0.1, 1.2, 3)], ids=["greedy", "drawn"])
def test_programs_of_the_decode_loop_are_kept(graph: Graph, tmp_path: Path, sampling: Sampling) -> None:
    assert kept(append_loop(graph, Feed("ids"), sampling), tmp_path)


def test_programs_of_registered_operators_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that they are made of: the module, what it imports, its constants, the body on the device."""
    folder = tmp_path / "site" / "apart"
    shutil.copytree(Path(__file__).parents[1] / "examples" / "add_an_op", folder)
    (folder / "helper.py").write_text("WIDTH = 3\n")
    source = folder / "margin.py"
    source.write_text(source.read_text().replace("import Path\n", "import Path\n\nfrom . import helper\n", 1))
    monkeypatch.syspath_prepend(folder.parent)
    margin = import_module("apart.margin")
    monkeypatch.delitem(OPERATORS, margin.Margin)  # it registers itself; this takes that back at the end
    operator = margin.MarginOperator()
    monkeypatch.setitem(OPERATORS, margin.Margin, operator)
    _, graph = operator.samples()[0]
    assert kept(graph, tmp_path / "cache")

    keys = [proven.key_of(graph, 4, TARGET)]
    for path, old, new in (
        (source, "class Margin(", "class  Margin("),
        (folder / "helper.py", "WIDTH = 3", "WIDTH = 4"),
        (folder / "margin.cuh", "namespace mpk", "namespace  mpk"),
    ):
        before = path.read_text()
        path.write_text(before.replace(old, new, 1))
        keys.append(proven.key_of(graph, 4, TARGET))
        path.write_text(before)
        assert before != before.replace(old, new, 1), path
    with monkeypatch.context() as patch:
        patch.setattr("apart.helper.WIDTH", 5)
        keys.append(proven.key_of(graph, 4, TARGET))
    assert None not in keys and len(set(keys)) == len(keys) and proven.key_of(graph, 4, TARGET) == keys[0]

    with monkeypatch.context() as patch:  # a module that nobody can look at
        patch.setitem(sys.modules, "apart.helper", ModuleType("apart.helper"))
        assert proven.key_of(graph, 4, TARGET) is None
    program = proven.load(Program, keys[0], tmp_path / "cache")
    assert program is not None
    monkeypatch.delitem(OPERATORS, margin.Margin)
    assert proven.load(Program, keys[0], tmp_path / "cache") is None, "only registered types come back"
    assert proven.key_of(graph, 4, TARGET) is None


def test_a_damaged_entry_is_made_anew(graph: Graph, tmp_path: Path) -> None:
    first, _ = make(graph, tmp_path)
    (entry,) = tmp_path.iterdir()
    data = bytearray(entry.read_bytes())
    data[-100] ^= 1
    entry.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="damaged"):
        again, report = make(graph, tmp_path)
    assert "verify" in report.seconds and again == first
    assert set(make(graph, tmp_path)[1].seconds) == {"stored"}


@pytest.mark.parametrize("value", [Path("/"), (1, 2), b"no pickle"])
def test_what_is_no_program_is_not_taken(graph: Graph, tmp_path: Path, value: Any) -> None:
    key = proven.key_of(graph, 4, TARGET)
    data = value if isinstance(value, bytes) else zlib.compress(pickle.dumps(value))
    Cache(tmp_path).put(key, data, {"kind": "Program"})
    assert proven.load(Program, key, tmp_path) is None
    assert "verify" in make(graph, tmp_path)[1].seconds
