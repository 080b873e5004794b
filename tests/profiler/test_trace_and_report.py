"""The trace is one that Perfetto can read, and the report adds up."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from records import predicted, records
from small_programs import task

from mpk_dynamo.passes.schedule.timeline import PHASES
from mpk_dynamo.profiler import Profile, decode, write_profile, write_trace
from mpk_dynamo.profiler.names import of_any_layer, operator_names, task_names

CHAIN = [
    task([f"v{step}[0:64]"] if step else (), [f"v{step + 1}[{16 * w}:{16 * w + 16}]"], node=step, nbytes=1000)
    for step in range(12)
    for w in range(4)
]


@pytest.fixture(scope="module")
def measured():
    made = predicted(*CHAIN, workers=4)
    return decode(records(made, [1.98, 1.97, 1.96, 1.95], [1, 2, 3, 4]), made.schedule), made


def test_a_trace_has_a_slice_per_task_and_none_overlap(measured, tmp_path: Path):
    timeline, _ = measured
    for name, opened in (("t.json", open), ("t.json.gz", gzip.open)):
        write_trace(tmp_path / name, timeline, "a title")
        with opened(tmp_path / name, "rt") as file:
            trace = json.load(file)
    assert trace["otherData"]["times"] == "measured"
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
    tasks = [e for e in slices if "args" in e]
    assert sorted(e["args"]["task"] for e in tasks) == list(range(48))
    assert {e["tid"] for e in slices} == set(range(4))
    assert {e["name"] for e in slices} - {e["name"] for e in tasks} <= set(PHASES)
    for track in range(4):
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in tasks if e["tid"] == track)
        assert all(stop <= start + 1e-6 for (_, stop), (start, _) in zip(own, own[1:])), "tasks of a worker overlap"
        inner = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == track and "args" not in e)
        assert all(stop <= start + 1e-6 for (_, stop), (start, _) in zip(inner, inner[1:])), "phases overlap"
        assert all(any(a - 1e-6 <= x and y <= b + 1e-6 for a, b in own) for x, y in inner), "a phase outside its task"
    arrows = [e for e in trace["traceEvents"] if e["ph"] in "sf"]
    assert {e["id"] for e in arrows if e["ph"] == "s"} == {e["id"] for e in arrows if e["ph"] == "f"}
    counted = [e["args"]["TB/s"] for e in trace["traceEvents"] if e["ph"] == "C"]
    assert sum(counted) / len(counted) * 1e12 * timeline.makespan == pytest.approx(48 * 1000, rel=0.1)


def test_shares_of_the_report_add_up_and_figures_compare(measured):
    timeline, made = measured
    profile = Profile(timeline, "a title", 1e12, "invented", made)
    figures = profile.figures()
    assert sum(s["mean"] for s in figures["shares"].values()) == pytest.approx(1.0, abs=1e-6)
    assert figures["times"] == "measured" and figures["bytes"] == 48_000
    assert figures["predicted_us"] == pytest.approx(made.makespan * 1e6)
    assert figures["makespan_us"] == pytest.approx(figures["predicted_us"], abs=0.1)
    total = sum(o["total_us"] for o in figures["operators"])
    assert total == pytest.approx(figures["makespan_us"]), "periods cover the step"
    path = figures["critical_path"]
    assert sum(p["us"] for p in path["parts"]) == pytest.approx(figures["makespan_us"], abs=0.1)
    longest = [w["waiting_us"] for w in figures["longest_waits"]]
    assert longest == sorted(longest, reverse=True) and longest[0] > 0
    charged = sum(e["waiting_us"] for e in figures["edges"])
    assert charged == pytest.approx(figures["shares"]["waiting"]["mean"] * figures["makespan_us"])
    text = str(profile)
    assert "measured" in text and "the simulator predicts" in text and "critical path: 12 tasks" in text
    assert re.search(r"map\d+ +map\d+ +flagged", text)
    assert "predicted" in str(Profile(made, "a title", 1e12, "invented")).splitlines()[0]


def test_files_are_numbered_and_never_overwritten(measured, tmp_path: Path):
    profile = Profile(measured[0], "a title", 1e12, "invented")
    first, second = (write_profile(tmp_path / "p", profile) for _ in range(2))
    assert (first.name, second.name) == ("profile-000.txt", "profile-001.txt")
    assert {p.name for p in first.parent.glob("profile-001*")} == {
        "profile-001.txt", "profile-001.json", "profile-001.trace.json.gz",
    }  # fmt: skip
    assert json.loads(second.with_suffix(".json").read_text())["title"] == "a title"


def test_names_are_those_of_the_model():
    from mpk_dynamo.ir import expr as ex
    from mpk_dynamo.ir.graph import Linear, LinearPart
    from mpk_dynamo.ir.types import DType
    from mpk_dynamo.profiler.names import _name

    def linear(*origins: str) -> Linear:
        part = [LinearPart((), 1, ex.acc(0), "y", (), o) for o in origins]
        return Linear("linear_7", ex.var("t", 1), ex.var("k", 4), ex.const(0, DType.F32), tuple(part), "args.0.m")

    assert _name(linear("args.0.model.layers.0.mlp.down_proj"), "linear") == "layers.0.mlp.down_proj"
    layer = "model.layers.3."
    assert _name(linear(layer + "mlp.down_proj"), "linear") == "layers.3.mlp.down_proj"
    joint = layer + "mlp.gate_proj & " + layer + "mlp.up_proj"
    assert _name(linear(joint), "linear") == "layers.3.mlp.gate_proj+up_proj"
    qkv = [f"{layer}self_attn.{x}_proj" for x in "qkv"]
    assert _name(linear(*qkv), "linear") == "layers.3.self_attn.q_proj+k_proj+v_proj"
    assert of_any_layer("layers.3.mlp.down_proj") == "layers.*.mlp.down_proj"
    made = predicted(*CHAIN[:8], workers=4).schedule.tasks
    assert task_names(made)[5] == f"{operator_names(made)[1, 'row_map']}[1]"
