"""Rules P1 and P3 for the loader: segments and runs stream exactly the weight rows that a task declares. Transposed
weights have segments but no runs: their task loads them itself, in whole 16-byte vectors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import abi
from ..errors import VerificationError
from ..ir.graph import Linear
from ..ir.program import Program
from ..ir.tasks import Task
from ..ir.types import Buffer
from .accesses import names
from .program_rules import bound_buffers, span
from .tables import ARENA_OFFSET, BINDING_SHIFT, slices, split

Run = tuple[int, ...]
RUN_FIELDS = ("base0", "base1", "rows", "row_bytes", "copy", "tiled")

Segment = tuple[int, ...]
SEGMENT_FIELDS = ("part", "row", "rows")

SEGMENTS, SEGMENT_COUNT = 6, 7
"""Places in Task.arg of a linear task: its first segment, and how many."""


def check_loader(p: Program, tables: Mapping[str, np.ndarray], place: np.ndarray) -> None:
    """P1 for segments and the order of runs, P3 for what runs copy."""
    s = p.schedule
    start, length = slices(tables["queues"], "run", "run_count", tables["runs"], "runs of worker")
    check_copies(p, tables)
    bound = {name: i for i, name in enumerate(p.bindings)}
    # plain numbers: taking entries of numpy arrays one by one costs more than all the rest
    runs: list[Run] = list(zip(*(tables["runs"][f].tolist() for f in RUN_FIELDS), strict=True))
    segments = list(zip(*(tables["segments"][f].tolist() for f in SEGMENT_FIELDS), strict=True))
    args = tables["tasks"]["arg"][place][:, [SEGMENTS, SEGMENT_COUNT]].tolist()
    linears = [_Streams(p, bound, i, n) if isinstance(n, Linear) else None for i, n in enumerate(s.tasks.graph.nodes)]
    for w, queue in enumerate(s.queues):
        run, end = int(start[w]), int(start[w] + length[w])
        for t in (s.tasks.tasks[i] for i in queue):
            streams = linears[t.node]
            if streams is None:
                continue
            node = streams.node
            for segment in _segments(p, t, node, streams.weights, segments, *args[t.id]):
                if node.transposed:
                    _check_vectors(p, t, node, segment)
                elif run < end and runs[run] == streams.run(t.op, segment):
                    run += 1
                else:  # in several runs, or wrong
                    run = _follow(p, bound, t, node, segment, runs, run, end)
        if run != end:
            raise VerificationError("P1", f"worker {w} has {end - run} runs beyond those its tasks read")


class _Streams:
    """What a linear's tasks stream, by part: looked up once for a node, not for each of its tasks."""

    def __init__(self, p: Program, bound: Mapping[str, int], index: int, node: Linear) -> None:
        buffers = p.schedule.tasks.buffers
        self.node = node
        self.weights = {w for part in node.parts for w in part.weights}
        call = p.calls.get((index, "linear"))
        self._slots = {"linear": (call.copy_bytes, call.tiled)} if call else {}
        self._parts: list[list[tuple[int, int]]] = []  # of each weight: reference of its first row, bytes of a row
        for part in node.parts:
            weights = [buffers[w] for w in part.weights]
            steps = [w.strides[0] * w.dtype.itemsize for w in weights]
            self._parts.append([(bound.get(w.storage, -1) << BINDING_SHIFT, n) for w, n in zip(weights, steps)])

    def run(self, op: str, segment: Segment) -> Run | None:
        """The run that brings a whole segment; None where there is no such."""
        part, row, rows = segment
        slots = self._slots.get(op)
        if not rows or part >= len(self._parts) or slots is None:
            return None
        weights = self._parts[part]
        base, row_bytes = weights[0]
        second = weights[1][0] | row * weights[1][1] if len(weights) == 2 else abi.NO_REF
        return base | row * row_bytes, second, rows, row_bytes, *slots


def _segments(
    p: Program, t: Task, node: Linear, weights: set[str], segments: list[Segment], first: int, count: int
) -> list[Segment]:
    """The task's (part, row, rows), found equal to the weight rows it declares to read."""
    tg = p.schedule.tasks
    if not (0 <= first and 0 <= count <= abi.MAX_SEGMENTS and first + count <= len(segments)):
        raise VerificationError("P1", f"{names(tg, [t.id])} has segments {first}:{first + count}")
    found = segments[first : first + count]
    for part, row, rows in found:
        if part >= len(node.parts) or row + rows > node.parts[part].rows:
            text = f"a segment of {names(tg, [t.id])} has rows {row}:{row + rows} of part {part}"
            raise VerificationError("P3", text, origin=node.origin)
    # weights are read by whole rows, transposed ones by whole columns
    declared = [(a.buffer, *a.box[node.transposed]) for a in t.reads if a.buffer in weights]
    streamed = [(w, row, row + rows) for part, row, rows in found for w in node.parts[part].weights]
    if declared != streamed and _joined(sorted(declared)) != _joined(sorted(streamed)):
        text = f"{names(tg, [t.id])} streams rows {streamed}; it declares {declared}"
        raise VerificationError("P1", text, origin=node.origin)
    return found


def _check_vectors(p: Program, t: Task, node: Linear, segment: Segment) -> None:
    """P3 for a segment of transposed weights: its columns, and the next row's, begin at 16-byte boundaries."""
    part, row, rows = segment
    buffers = p.schedule.tasks.buffers
    for w in (buffers[name] for name in node.parts[part].weights):
        if any(n * w.dtype.itemsize % 16 for n in (row, rows, w.strides[0])):
            text = f"{names(p.schedule.tasks, [t.id])} reads columns {row}:{row + rows} of {w.name} with strides "
            raise VerificationError("P3", text + f"{w.strides}: no whole 16-byte vectors", origin=node.origin)


def _joined(rows: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Adjacent row ranges of one weight as one."""
    out: list[tuple[str, int, int]] = []
    for name, start, stop in rows:
        if out and out[-1][0] == name and out[-1][2] == start:
            start = out.pop()[1]
        out.append((name, start, stop))
    return out


def _follow(
    p: Program,
    bound: Mapping[str, int],
    t: Task,
    node: Linear,
    segment: Segment,
    runs: list[Run],
    run: int,
    end: int,
) -> int:
    """Match runs with the rows of one segment, in order. The run after the last."""
    tg = p.schedule.tasks
    part, row, rows = segment
    weights = [tg.buffers[w] for w in node.parts[part].weights]
    stop = row + rows
    while row < stop:
        if run >= end:
            raise VerificationError("P1", f"no run brings row {row} of {weights[0].name} to {names(tg, [t.id])}")
        base0, base1, count, row_bytes, *slots = runs[run]
        bases = [_reference(bound, w, row) for w in weights] + [abi.NO_REF] * (2 - len(weights))
        have = [base0, base1]
        if bases != have or count == 0 or row + count > stop:
            text = f"run {run} of {count} rows from {_show(p, have)} feeds {names(tg, [t.id])}, "
            text += f"which needs rows {row}:{stop} of {', '.join(w.name for w in weights)} from {_show(p, bases)}"
            raise VerificationError("P1", text, origin=node.origin)
        if row_bytes != weights[0].strides[0] * weights[0].dtype.itemsize:
            text = f"run {run} steps by {row_bytes} bytes; {weights[0].name} has strides {weights[0].strides}"
            raise VerificationError("P3", text, origin=node.origin)
        call = p.calls[t.node, t.op]
        if slots != [call.copy_bytes, call.tiled]:
            text = f"run {run} makes slots of {slots[0]} bytes{' a row piece' if slots[1] else ''}; the body of "
            text += f"{names(tg, [t.id])} expects {call.copy_bytes}{' a row piece' if call.tiled else ''}"
            raise VerificationError("P3", text, origin=node.origin)
        row += count
        run += 1
    return run


def _reference(bound: Mapping[str, int], w: Buffer, row: int) -> int:
    if w.storage not in bound:
        raise VerificationError("P3", f"weight {w.name} is not bound")
    return bound[w.storage] << BINDING_SHIFT | row * w.strides[0] * w.dtype.itemsize


def _show(p: Program, refs: list[int]) -> str:
    def one(ref: int) -> str:
        if ref == abi.NO_REF:
            return "none"
        if ref & abi.ARENA_REF:
            return f"arena+{ref & ARENA_OFFSET}"
        i = ref >> BINDING_SHIFT
        return f"{p.bindings[i] if i < len(p.bindings) else f'binding {i}'}+{ref & ((1 << BINDING_SHIFT) - 1)}"

    return " and ".join(map(one, refs))


def check_copies(p: Program, tables: Mapping[str, np.ndarray]) -> None:
    """P3: every copy lies inside memory that the caller handed in and that no task writes (the loader waits for no
    event), in whole 16-byte pieces."""
    s = p.schedule
    bound = bound_buffers(p, s.tasks.buffers)
    written = {s.tasks.buffers[a.buffer].storage for t in s.tasks.tasks for a in t.writes}
    runs = tables["runs"]
    size = runs["rows"].astype(np.int64) * runs["row_bytes"].astype(np.int64)
    copy, row, tiled = (runs[field].astype(np.int64) for field in ("copy", "row_bytes", "tiled"))
    uneven = (copy <= 0) | (copy % 16 != 0) | (row % 16 != 0)
    uneven |= (row % np.maximum(copy, 1) != 0) & (copy % np.maximum(row, 1) != 0) & (tiled == 0)
    # row pieces of a tiled run: no longer than a row, and 1, 2, 4 or 8 rows to a slot, which divide its tiles of 8
    uneven |= (tiled != 0) & ((copy > row) | (tiled > 8) | (tiled & (tiled - 1) != 0))
    if uneven.any():
        k = int(np.argmax(uneven))
        raise VerificationError("P3", f"run {k} copies {copy[k]} bytes at a time of rows of {row[k]}")
    # memory that may be copied, in bytes: of what a task writes not even an empty piece
    room = np.array([-1 if b.storage in written else span(b) for b in bound] + [0], dtype=np.int64)
    for field in ("base0", "base1"):
        arena, binding, offset = split(runs[field])
        known = ~arena & (binding < len(bound))
        wrong = ~known | (offset + size > room[np.where(known, binding, -1)])
        for k in np.flatnonzero(wrong & (runs[field] != np.uint64(abi.NO_REF))).tolist():
            b = bound[binding[k]] if known[k] else None
            if b is None or b.storage in written:
                text = f"run {k} copies from {'the arena' if arena[k] else f'binding {binding[k]}'}"
                text += ", which a task writes" if b is not None else ", which is no memory of the caller"
                raise VerificationError("P3", text)
            if offset[k] + size[k] > span(b):
                text = f"run {k} copies bytes {offset[k]}:{offset[k] + size[k]} of {b.name}, which has {span(b)}"
                raise VerificationError("P3", text)
