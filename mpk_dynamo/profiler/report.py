"""What a timeline says, as figures and as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..passes.schedule.timeline import COMPUTED, PHASES, SIGNALLED, Timeline
from .names import of_any_layer, operator_names
from .waiting import Waiting, critical_path, waiting


@dataclass(frozen=True)
class Profile:
    """A timeline to report on. predicted: the simulator's, to compare a measured one with. bandwidth: bytes per second
    that a stream can reach, and where that figure is from."""

    timeline: Timeline
    title: str
    bandwidth: float
    source: str
    predicted: Timeline | None = None

    def figures(self) -> dict[str, Any]:
        """Everything the text shows, for a program to read. Times in us, bandwidth in TB/s."""
        found = waiting(self.timeline)
        moved = sum(t.bytes for t in self.timeline.schedule.tasks.tasks)
        return {
            "title": self.title,
            "times": "predicted" if self.timeline.predicted else "measured",
            "makespan_us": self.timeline.makespan * 1e6,
            "predicted_us": self.predicted.makespan * 1e6 if self.predicted else None,
            "bytes": moved,
            "bandwidth": {"TB/s": self.bandwidth / 1e12, "source": self.source},
            "floor_us": moved / self.bandwidth * 1e6,
            "shares": _shares(self.timeline, found),
            "operators": _operators(self.timeline, self.predicted, self.bandwidth),
            "edges": _edges(self.timeline, found),
            "critical_path": _path(self.timeline, found),
        }

    def __str__(self) -> str:
        f = self.figures()
        lines = [
            f"{self.title}: {f['makespan_us']:.1f} us {f['times']}, {f['bytes'] / 1e6:.1f} MB, "
            f"{f['floor_us'] / f['makespan_us']:.0%} of {self.bandwidth / 1e12:.2f} TB/s ({self.source})"
        ]
        if f["predicted_us"]:
            off = f["predicted_us"] / f["makespan_us"] - 1
            lines.append(f"the simulator predicts {f['predicted_us']:.1f} us ({off:+.1%})")
        lines += ["", "share of a worker's time, mean (lowest to highest):"]
        lines += _table(
            (name, f"{s['mean']:.1%}", f"({s['min']:.1%} to {s['max']:.1%})") for name, s in f["shares"].items()
        )
        heads = ("operator", "times", "tasks", "MB", "period us", "TB/s", "of stream", *PHASES)
        heads += ("predicted us",) if self.predicted else ()
        lines += ["", "operators, each time: period since the one before had ended, phases as mean of its tasks (us)"]
        lines += _table([heads, *(_operator_row(o) for o in f["operators"])])
        lines += ["", "edges by waiting, per worker in all; latency: from its last producer's end to its inputs"]
        heads = ("from", "to", "kind", "times", "waiting us", "latency us", "median us")
        rows = [(e["from"], e["to"], e["kind"], str(e["times"]), *(f"{e[k]:.2f}" for k in _EDGE)) for e in f["edges"]]
        lines += _table([heads, *rows[:12]], left=3)
        path = f["critical_path"]
        lines += ["", f"critical path: {path['tasks']} tasks, {path['edges']} edges between workers"]
        rows = [(p["what"], str(p["times"]), f"{p['us']:.1f}", f"{p['share']:.1%}") for p in path["parts"]]
        return "\n".join([*lines, *_table([("part", "times", "us", "share"), *rows[:14]])])


_EDGE = ("waiting_us", "latency_us", "median_latency_us")


def _shares(timeline: Timeline, found: Waiting) -> dict[str, dict[str, float]]:
    """busy: weights pass by, results, signals. waiting: for what others have not computed yet. loading: until it has
    come, with the prologue. fetch: between tasks. idle: before the first task and after the last."""
    phases = timeline.phases
    each = {
        "busy": phases[:, 3:].sum(axis=1),
        "waiting": found.wait,
        "loading": found.latency,
        "fetch": phases[:, 0],
    }
    total = max(timeline.makespan, 1e-12)
    shares = {k: _per_worker(timeline, v) / total for k, v in each.items()}
    shares["idle"] = np.clip(1.0 - sum(shares.values()), 0.0, 1.0)
    return {k: {"mean": float(v.mean()), "min": float(v.min()), "max": float(v.max())} for k, v in shares.items()}


def _per_worker(timeline: Timeline, values: np.ndarray) -> np.ndarray:
    return np.bincount(timeline.worker, values, minlength=timeline.schedule.workers)


def _groups(timeline: Timeline) -> list[tuple[str, np.ndarray]]:
    """(name, task ids) of each operator, in the order in which they end."""
    tg = timeline.schedule.tasks
    names, ids = operator_names(tg), dict[tuple[int, str], list[int]]()
    for task in tg.tasks:
        ids.setdefault((task.node, task.op), []).append(task.id)
    groups = [(names[key], np.array(i)) for key, i in ids.items()]
    return sorted(groups, key=lambda g: float(timeline.clock[g[1], COMPUTED].max()))


def _periods(timeline: Timeline) -> dict[str, list[tuple[float, np.ndarray]]]:
    """By name without layer: (seconds from the end of all operators before to the end of this one, its tasks)."""
    found: dict[str, list[tuple[float, np.ndarray]]] = {}
    last = 0.0
    for name, ids in _groups(timeline):
        end = float(timeline.clock[ids, SIGNALLED].max())
        found.setdefault(of_any_layer(name), []).append((max(end - last, 0.0), ids))
        last = max(last, end)
    return found


def _operators(timeline: Timeline, predicted: Timeline | None, bandwidth: float) -> list[dict[str, Any]]:
    tasks = timeline.schedule.tasks.tasks
    other = _periods(predicted) if predicted else {}
    rows = []
    for name, each in _periods(timeline).items():
        period = float(np.median([p for p, _ in each]))
        moved = float(np.median([sum(tasks[i].bytes for i in ids) for _, ids in each]))
        rate = moved / period if period > 1e-8 else 0.0
        row = {"operator": name, "times": len(each), "tasks": int(np.median([len(ids) for _, ids in each]))}
        row |= {"bytes": moved, "period_us": period * 1e6, "total_us": sum(p for p, _ in each) * 1e6}
        row |= {"TB/s": rate / 1e12, "share": rate / bandwidth}
        phases = np.median([timeline.phases[ids].mean(axis=0) for _, ids in each], axis=0) * 1e6
        row["phases_us"] = dict(zip(PHASES, map(float, phases)))
        if predicted:
            row["predicted_us"] = float(np.median([p for p, _ in other[name]])) * 1e6
        rows.append(row)
    return rows


def _operator_row(o: dict[str, Any]) -> tuple[str, ...]:
    cells = (o["operator"], str(o["times"]), str(o["tasks"]), f"{o['bytes'] / 1e6:.2f}", f"{o['period_us']:.2f}")
    cells += (f"{o['TB/s']:.2f}", f"{o['share']:.0%}", *(f"{v:.2f}" for v in o["phases_us"].values()))
    return (*cells, f"{o['predicted_us']:.2f}") if "predicted_us" in o else cells


def _edges(timeline: Timeline, found: Waiting) -> list[dict[str, Any]]:
    """Edges of like operators together, the most waited for first."""
    tg = timeline.schedule.tasks
    names = {key: of_any_layer(name) for key, name in operator_names(tg).items()}
    held = np.flatnonzero((found.edge >= 0) & (found.wait + found.latency > 0))
    groups: dict[tuple[str, str, str], list[int]] = {}
    for t in map(int, held):
        ends = (names[tg.tasks[i].node, tg.tasks[i].op] for i in (int(found.producer[t]), t))
        kind = "flagged" if found.edges[found.edge[t]].flagged else "event"
        groups.setdefault((*ends, kind), []).append(t)
    rows = []
    for (source, target, kind), ids in groups.items():
        row = {"from": source, "to": target, "kind": kind, "times": len({tg.tasks[t].node for t in ids})}
        each = {"waiting_us": found.wait[ids].sum(), "latency_us": found.latency[ids].sum()}
        row |= {k: float(v) * 1e6 / timeline.schedule.workers for k, v in each.items()}
        rows.append({**row, "median_latency_us": float(np.median(found.latency[ids])) * 1e6})
    return sorted(rows, key=lambda r: -(r["waiting_us"] + r["latency_us"]))


def _path(timeline: Timeline, found: Waiting) -> dict[str, Any]:
    tg, links = timeline.schedule.tasks, critical_path(timeline, found)
    names = {key: of_any_layer(name) for key, name in operator_names(tg).items()}
    parts: dict[str, list[float]] = {}
    for link in links:
        name = names[tg.tasks[link.task].node, tg.tasks[link.task].op]
        how = "its queue" if link.via < 0 else "a flagged edge" if found.edges[link.via].flagged else "an event"
        parts.setdefault(f"{name}: until its inputs are there, after {how}", []).append(link.inputs - link.start)
        parts.setdefault(f"{name}: from its inputs to its end", []).append(link.stop - link.inputs)
    total = max(timeline.makespan, 1e-12)
    rows = [{"what": k, "times": len(v), "us": sum(v) * 1e6, "share": sum(v) / total} for k, v in parts.items()]
    rows.sort(key=lambda r: -r["us"])
    return {"tasks": len(links), "edges": sum(link.via >= 0 for link in links), "parts": rows}


def _table(rows: Iterator[Sequence[str]] | Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns, the first `left` of them to the left."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
