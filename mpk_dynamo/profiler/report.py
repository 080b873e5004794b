"""What a timeline says, as figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..passes.schedule.timeline import COMPUTED, PHASES, SIGNALLED, Timeline
from .names import of_any_layer, operator_names, task_names
from .text import render
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
            "longest_waits": _longest(self.timeline, found),
            "critical_path": _path(self.timeline, found),
        }

    def __str__(self) -> str:
        return render(self.figures())


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


def _longest(timeline: Timeline, found: Waiting, count: int = 8) -> list[dict[str, Any]]:
    """The operators, each of its own layer, whose tasks waited longest for what others had not computed, and the task
    that came last for most of them."""
    tg, names = timeline.schedule.tasks, task_names(timeline.schedule.tasks)
    waits, last = dict[tuple[int, str], float](), dict[tuple[int, str], list[int]]()
    for t in map(int, np.flatnonzero(found.wait)):
        key = tg.tasks[t].node, tg.tasks[t].op
        waits[key] = waits.get(key, 0.0) + float(found.wait[t])
        last.setdefault(key, []).append(int(found.producer[t]))
    of, rows = operator_names(tg), []
    for key in sorted(waits, key=lambda k: -waits[k])[:count]:
        latest = max(set(last[key]), key=last[key].count)
        each = waits[key] * 1e6 / timeline.schedule.workers
        rows.append({"operator": of[key], "waiting_us": each, "for": names[latest]})
    return rows


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
