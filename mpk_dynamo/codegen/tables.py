"""Descriptors of every task, packed as the device reads them (abi.py). References, not addresses."""

from __future__ import annotations

import numpy as np

from .. import abi
from ..errors import Unsupported
from ..ir.graph import Attention, Linear
from ..ir.schedule import Schedule
from ..ir.types import Buffer, BufferKind
from ..ops.linear import segments
from .bodies import Body
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
    schedule: Schedule, references: References, opcodes: dict[tuple[int, str], int], bodies: dict[tuple[int, str], Body]
) -> dict[str, bytes]:
    """The tables of abi.TABLES. opcodes, bodies: by (node index, task kind)."""
    tg = schedule.tasks
    nodes, buffers = tg.graph.nodes, tg.buffers
    rows: dict[str, list[tuple]] = {name: [] for name, _ in abi.TABLES}
    waits, signals = tg.waits(), tg.signals()
    operand_start: dict[tuple[int, str], int] = {}
    for queue in schedule.queues:
        first_task, first_run = len(rows["tasks"]), len(rows["runs"])
        for task_id in queue:
            task = tg.tasks[task_id]
            node, key = nodes[task.node], (task.node, task.op)
            body = bodies[key]
            if key not in operand_start:
                operand_start[key] = len(rows["operands"])
                rows["operands"] += [(references.of(buffers[name]),) for name in body.operands]
            arg = [0] * 8
            if isinstance(node, Linear):
                arg[6], arg[7] = len(rows["segments"]), len(task.tile) // 3
                _add_linear(node, task.tile, buffers, references, rows)
            elif isinstance(node, Attention):
                arg[: len(task.tile)] = task.tile
                if task.op == "attention_combine":
                    arg[3] = buffers[f"{node.name}.partial"].shape[2]
                if f"{node.name}.partial" in body.operands:
                    arg[4] = body.operands.index(f"{node.name}.partial")
                    arg[5] = body.operands.index(f"{node.name}.stats")
            else:
                arg[: len(task.tile)] = task.tile
            if len(waits[task_id]) > abi.MAX_WAITS:
                raise AssertionError(f"task {task_id} waits for {len(waits[task_id])} events")
            rows["tasks"].append(
                (opcodes[key], task_id, operand_start[key], len(body.operands), len(rows["waits"]), len(waits[task_id]),
                 len(rows["signals"]), len(signals[task_id]), tuple(arg))
            )  # fmt: skip
            rows["waits"] += [(schedule.slots[e], len(tg.events[e].producers)) for e in waits[task_id]]
            rows["signals"] += [(schedule.slots[e],) for e in signals[task_id]]
        rows["queues"].append((first_task, len(rows["tasks"]) - first_task, first_run, len(rows["runs"]) - first_run))
    return {name: np.array(rows[name], dtype=struct.dtype).tobytes() for name, struct in abi.TABLES}


def _add_linear(
    node: Linear,
    tile: tuple[int, ...],
    buffers: dict[str, Buffer],
    references: References,
    rows: dict[str, list[tuple]],
) -> None:
    weight = buffers[node.parts[0].weights[0]]
    joint = max(len(p.weights) for p in node.parts)
    geometry = linear_geometry(node.k.size, node.t.size, weight.dtype, joint, node.origin)
    row_bytes = node.k.size * weight.dtype.itemsize
    cut = segments(tile)
    if len(cut) > abi.MAX_SEGMENTS:
        raise Unsupported(f"{len(cut)} weights share one input; {abi.MAX_SEGMENTS} are supported", origin=node.origin)
    for part, row, count in cut:
        rows["segments"].append((part, row, count, 0))
        weights = [buffers[w] for w in node.parts[part].weights]
        for first in range(0, count, geometry.block_rows or count):
            n = min(geometry.block_rows or count, count - first)
            bases = [references.of(w, (row + first) * row_bytes) for w in weights]
            second = bases[1] if len(bases) > 1 else abi.NO_REF
            rows["runs"].append((bases[0], second, n, row_bytes, geometry.copy_bytes, int(geometry.tiled)))
