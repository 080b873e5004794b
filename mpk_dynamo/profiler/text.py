"""The figures of a profile as a text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..passes.schedule.timeline import PHASES

_EDGE = ("waiting_us", "latency_us", "median_latency_us")


def render(f: dict[str, Any]) -> str:
    """The figures that Profile.figures gives, as tables."""
    stream = f["bandwidth"]
    share = f["floor_us"] / f["makespan_us"] if f["makespan_us"] else 0.0
    lines = [
        f"{f['title']}: {f['makespan_us']:.1f} us {f['times']}, {f['bytes'] / 1e6:.1f} MB, "
        f"{share:.0%} of {stream['TB/s']:.2f} TB/s ({stream['source']})"
    ]
    if f["predicted_us"]:
        off = f["predicted_us"] / f["makespan_us"] - 1
        lines.append(f"the simulator predicts {f['predicted_us']:.1f} us ({off:+.1%})")
    lines += ["", "share of a worker's time, mean (lowest to highest):"]
    lines += _table((k, f"{s['mean']:.1%}", f"({s['min']:.1%} to {s['max']:.1%})") for k, s in f["shares"].items())
    heads = ("operator", "times", "tasks", "MB", "period us", "TB/s", "of stream", *PHASES)
    heads += ("predicted us",) if f["predicted_us"] else ()
    lines += ["", "operators, each time: period since the one before had ended, phases as mean of its tasks (us)"]
    lines += _table([heads, *map(_operator, f["operators"])])
    lines += ["", "edges by waiting, per worker in all; latency: from its last producer's end to its inputs"]
    rows = [(e["from"], e["to"], e["kind"], str(e["times"]), *(f"{e[k]:.2f}" for k in _EDGE)) for e in f["edges"]]
    lines += _table([("from", "to", "kind", "times", "waiting us", "latency us", "median us"), *rows[:12]], left=3)
    lines += ["", "longest waits, mean of the workers, and for whom"]
    rows = [(w["operator"], f"{w['waiting_us']:.2f}", w["for"]) for w in f["longest_waits"]]
    lines += _table([("operator", "us", "last to come"), *rows])
    path = f["critical_path"]
    lines += ["", f"critical path: {path['tasks']} tasks, {path['edges']} edges between workers"]
    rows = [(p["what"], str(p["times"]), f"{p['us']:.1f}", f"{p['share']:.1%}") for p in path["parts"]]
    return "\n".join([*lines, *_table([("part", "times", "us", "share"), *rows[:14]])])


def _operator(o: dict[str, Any]) -> tuple[str, ...]:
    cells = (o["operator"], str(o["times"]), str(o["tasks"]), f"{o['bytes'] / 1e6:.2f}", f"{o['period_us']:.2f}")
    cells += (f"{o['TB/s']:.2f}", f"{o['share']:.0%}", *(f"{v:.2f}" for v in o["phases_us"].values()))
    return (*cells, f"{o['predicted_us']:.2f}") if "predicted_us" in o else cells


def _table(rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Columns, the first `left` of them to the left."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
