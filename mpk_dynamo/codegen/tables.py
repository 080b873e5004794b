"""Descriptors of every task, packed as the device reads them (abi.py). References, not addresses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import abi
from ..errors import Unsupported
from ..ir.graph import Attention, Linear
from ..ir.schedule import Schedule
from ..ir.tasks import TaskGraph
from ..ir.types import Buffer, BufferKind
from ..ops.attention import partial_names
from ..ops.linear import segments
from .body import Body
from .geometry import linear_geometry


class References:
    """Buffer name -> 64-bit reference: a binding, or an offset into the arena."""

    def __init__(self, schedule: Schedule) -> None:
        self.buffers = schedule.tasks.buffers
        self.arena, self.flagged = schedule.arena, schedule.tasks.flagged
        storages = {b.storage: b for b in self.buffers.values() if b.kind is not BufferKind.SCRATCH}
        self.bindings = tuple(storages)
        self._binding = {name: i for i, name in enumerate(self.bindings)}
        if len(self.bindings) > abi.MAX_BINDINGS:
            raise Unsupported(f"{len(self.bindings)} tensors: one launch carries {abi.MAX_BINDINGS} pointers")

    def of(self, buffer: Buffer, offset_bytes: int = 0) -> int:
        if buffer.kind is BufferKind.SCRATCH:
            flag = abi.FLAGGED_REF if buffer.storage in self.flagged else 0
            return abi.ARENA_REF | flag | (self.arena[buffer.storage] + offset_bytes)
        if offset_bytes >= 1 << 40:
            raise Unsupported(f"{buffer.name} is larger than 1 TiB")
        return self._binding[buffer.storage] << 40 | offset_bytes


def build_tables(
    schedule: Schedule,
    references: References,
    opcodes: dict[tuple[int, str], int],
    bodies: dict[tuple[int, str], Body],
    most: int,
) -> dict[str, bytes]:
    """The tables of abi.TABLES. opcodes, bodies: by (node index, task kind). most: as for `linear_geometry`."""
    tg = schedule.tasks
    rows: dict[str, list[tuple]] = {name: [] for name, _ in abi.TABLES}
    tasks, operands, wait_rows, signal_rows = rows["tasks"], rows["operands"], rows["waits"], rows["signals"]
    waits, signals = tg.waits(), tg.signals()
    slots, counts = schedule.slots, [len(e.producers) for e in tg.events]
    common: dict[tuple[int, str], tuple[int, int, int, _Arguments]] = {}
    for queue in schedule.queues:
        first_task, first_run = len(tasks), len(rows["runs"])
        for task_id in queue:
            task = tg.tasks[task_id]
            key = task.node, task.op
            if key not in common:
                body = bodies[key]
                arguments_of = _arguments(tg, key, body, references, most)
                common[key] = opcodes[key], len(operands), len(body.operands), arguments_of
                operands += [(references.of(tg.buffers[name]),) for name in body.operands]
            opcode, first_operand, operand_count, arguments = common[key]
            waited, signalled = waits[task_id], signals[task_id]
            if len(waited) > abi.MAX_WAITS:
                raise AssertionError(f"task {task_id} waits for {len(waited)} events")
            tasks.append(
                (opcode, task_id, first_operand, operand_count, len(wait_rows), len(waited),
                 len(signal_rows), len(signalled), arguments(task.tile, rows))
            )  # fmt: skip
            wait_rows += [(slots[e], counts[e]) for e in waited]
            signal_rows += [(slots[e],) for e in signalled]
        rows["queues"].append((first_task, len(tasks) - first_task, first_run, len(rows["runs"]) - first_run))
    return {name: np.array(rows[name], dtype=struct.dtype).tobytes() for name, struct in abi.TABLES}


MAX_TILE = 6
"""Arguments of a task that are its tile: the last two are a linear's segments."""

_Arguments = Callable[[tuple[int, ...], dict[str, list[tuple]]], tuple[int, ...]]
"""A task's eight arguments, by its tile; a linear's segments and runs are added to the rows of their tables."""


def _arguments(tg: TaskGraph, key: tuple[int, str], body: Body, references: References, most: int) -> _Arguments:
    """What the tasks of one node and kind have in common, looked up once."""
    node = tg.graph.nodes[key[0]]
    if isinstance(node, Linear):
        return _linear_arguments(node, tg.buffers, references, most)
    fixed = fixed_arguments(tg, key, body)

    def arguments(tile: tuple[int, ...], rows: dict[str, list[tuple]]) -> tuple[int, ...]:
        if len(tile) > MAX_TILE:
            text = f"{node.name}: a tile of {len(tile)} numbers; a task carries {MAX_TILE}"
            raise Unsupported(text, origin=node.origin)
        arg = [*tile, *(0,) * (8 - len(tile))]
        for place, value in fixed.items():
            arg[place] = value
        return tuple(arg)

    return arguments


def fixed_arguments(tg: TaskGraph, key: tuple[int, str], body: Body) -> dict[int, int]:
    """Arguments that all tasks of a node and kind share, by place: of attentions, where partial results are."""
    node, fixed = tg.graph.nodes[key[0]], {}
    if isinstance(node, Attention):
        partial, stats = partial_names(node)
        if key[1] == "attention_combine":
            fixed[3] = tg.buffers[partial].shape[2]
        if partial in body.operands:
            fixed |= {4: body.operands.index(partial), 5: body.operands.index(stats)}
    return fixed


def _linear_arguments(node: Linear, buffers: dict[str, Buffer], references: References, most: int) -> _Arguments:
    weight = buffers[node.parts[0].weights[0]]
    geometry = linear_geometry(node, buffers, most)
    row_bytes = node.k.size * weight.dtype.itemsize
    parts = []
    for p in node.parts:
        for w in p.weights:
            references.of(buffers[w], p.rows * row_bytes)  # refuses what is too large to address
        parts.append([references.of(buffers[w]) for w in p.weights])

    def arguments(tile: tuple[int, ...], rows: dict[str, list[tuple]]) -> tuple[int, ...]:
        cut, first_segment = segments(tile), len(rows["segments"])
        if len(cut) > abi.MAX_SEGMENTS:
            text = f"{len(cut)} weights share one input; {abi.MAX_SEGMENTS} are supported"
            raise Unsupported(text, origin=node.origin)
        for part, row, count in cut:
            rows["segments"].append((part, row, count, 0))
            if node.transposed:
                continue
            bases, step = parts[part], geometry.block_rows or count
            for first in range(0, count, step):
                offset = (row + first) * row_bytes
                second = bases[1] + offset if len(bases) > 1 else abi.NO_REF
                n = min(step, count - first)
                rows["runs"].append((bases[0] + offset, second, n, row_bytes, geometry.copy_bytes, geometry.slot_rows))
        return (0, 0, 0, 0, 0, 0, first_segment, len(cut))

    return arguments
