"""A timeline as a trace in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.schedule.timeline import INPUTS, PHASES, SIGNALLED, WAITS, Timeline
from .names import task_names
from .waiting import critical_path, waiting

_WORKERS, _PATH = 1, 2
_BINS = 500


def write_trace(path: str | os.PathLike[str], timeline: Timeline, title: str) -> None:
    """Writes a JSON file, compressed when its name ends in .gz. One track per worker: a slice per task, its phases
    inside. One for the critical path, with arrows from task to task, and a counter of the bytes per second."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "predicted" if timeline.predicted else "measured"
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ns","otherData":')
        json.dump({"title": title, "times": kind, "makespan_us": timeline.makespan * 1e6}, file)
        file.write(',"traceEvents":[\n')
        for i, event in enumerate(_events(timeline, f"{title} ({kind})")):
            file.write((",\n" if i else "") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")


def _events(timeline: Timeline, title: str) -> Iterator[dict[str, Any]]:
    tasks, names = timeline.schedule.tasks.tasks, task_names(timeline.schedule.tasks)
    yield _named("process_name", _WORKERS, 0, title)
    yield _named("process_name", _PATH, 0, "critical path")
    for worker in range(timeline.schedule.workers):
        yield _named("thread_name", _WORKERS, worker, f"worker {worker}")
    # whole nanoseconds, so that slices of a track meet and never overlap
    ns = np.rint(timeline.clock * 1e9).astype(np.int64)
    for task in tasks:
        worker, marks = int(timeline.worker[task.id]), ns[task.id]
        about = {"task": task.id, "kind": task.op, "bytes": task.bytes}
        yield _slice(names[task.id], _WORKERS, worker, marks[WAITS], marks[SIGNALLED], about)
        for phase, start, stop in zip(PHASES[1:], marks, marks[1:]):
            if stop > start:
                yield _slice(phase, _WORKERS, worker, start, stop)
    found = waiting(timeline)
    links = critical_path(timeline, found)
    for number, link in enumerate(links):
        start, inputs, stop = (int(round(t * 1e9)) for t in (link.start, link.inputs, link.stop))
        if inputs > start:
            how = "queue" if link.via < 0 else "flagged" if found.edges[link.via].flagged else "event"
            yield _slice(f"{how} edge" if link.via >= 0 else "queue", _PATH, 0, start, inputs)
        if stop > inputs:
            yield _slice(names[link.task], _PATH, 0, inputs, stop)
        if link.via >= 0 and number:
            arrow = {"name": "needs", "cat": "path", "id": number, "pid": _WORKERS}
            source = links[number - 1].task
            yield {**arrow, "ph": "s", "tid": int(timeline.worker[source]), "ts": (start - 1) / 1e3}
            at = int(ns[link.task, INPUTS])
            yield {**arrow, "ph": "f", "bp": "e", "tid": int(timeline.worker[link.task]), "ts": at / 1e3}
    yield from _bandwidth(timeline)


def _bandwidth(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Bytes per second over time: each task's bytes, spread evenly from its inputs to its end."""
    if not timeline.makespan:
        return
    width = timeline.makespan / _BINS
    edges = np.arange(_BINS + 1) * width
    size = np.array([t.bytes for t in timeline.schedule.tasks.tasks], float)
    start, stop = timeline.clock[:, INPUTS], timeline.clock[:, SIGNALLED]
    span = np.maximum(stop - start, 1e-9)
    done = [float((size * np.clip((t - start) / span, 0.0, 1.0)).sum()) for t in edges]
    for t, moved in zip(edges, np.diff(done)):
        rate = {"TB/s": round(moved / width / 1e12, 3)}
        yield {"name": "bandwidth", "ph": "C", "pid": _WORKERS, "ts": round(t * 1e6, 3), "args": rate}


def _slice(name: str, pid: int, tid: int, start: int, stop: int, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """Times in ns; the format counts in us."""
    event = {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": int(start) / 1e3, "dur": int(stop - start) / 1e3}
    return {**event, "args": args} if args else event


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
