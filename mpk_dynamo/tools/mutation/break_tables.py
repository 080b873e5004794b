"""Ways to break a valid Graph, and the tables of a valid Program. See breakers.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ... import abi
from ...ir.graph import Graph, RowMap, reads, writes
from ...ir.program import Program
from ...ir.types import BufferKind, DType

GraphBreaker = Callable[[random.Random, Graph], "tuple[str, Graph] | None"]
ProgramBreaker = Callable[[random.Random, Program], "tuple[str, Program] | None"]


def drop_node(r: random.Random, g: Graph) -> tuple[str, Graph]:
    gone = r.choice(g.nodes)
    return f"no {gone.name}", replace(g, nodes=tuple(n for n in g.nodes if n is not gone))


def repeat_node(r: random.Random, g: Graph) -> tuple[str, Graph]:
    node, at = r.choice(g.nodes), r.randint(0, len(g.nodes))
    return f"{node.name} also at place {at}", replace(g, nodes=(*g.nodes[:at], node, *g.nodes[at:]))


def exchange_nodes(r: random.Random, g: Graph) -> tuple[str, Graph]:
    a, b = r.sample(range(len(g.nodes)), 2)
    nodes = list(g.nodes)
    nodes[a], nodes[b] = nodes[b], nodes[a]
    return f"{nodes[b].name} and {nodes[a].name} exchanged", replace(g, nodes=tuple(nodes))


def change_type(r: random.Random, g: Graph) -> tuple[str, Graph] | None:
    used = sorted({n for node in g.nodes for n in (*reads(node), *writes(node))})
    b = g.buffers[r.choice(used)]
    dtype = r.choice([d for d in DType if d is not b.dtype])
    return f"{b.name} is {dtype.value}", replace(g, buffers={**g.buffers, b.name: replace(b, dtype=dtype)})


def shrink_buffer(r: random.Random, g: Graph) -> tuple[str, Graph] | None:
    """A buffer that a pointwise node writes whole lacks its last row: the store leaves it."""
    written = [n.out for n in g.nodes if isinstance(n, RowMap) and g.buffers[n.out].shape]
    written = [n for n in written if g.buffers[n].kind in (BufferKind.SCRATCH, BufferKind.OUTPUT)]
    if not written:
        return None
    b = g.buffers[r.choice(written)]
    wide = [d for d, n in enumerate(b.shape) if n > 1]
    if not wide:
        return None
    d = r.choice(wide)
    shape = (*b.shape[:d], b.shape[d] - 1, *b.shape[d + 1 :])
    return f"{b.name} has shape {shape}", replace(g, buffers={**g.buffers, b.name: replace(b, shape=shape)})


GRAPH: dict[str, GraphBreaker] = {
    "drop a node": drop_node,
    "repeat a node": repeat_node,
    "exchange nodes": exchange_nodes,
    "change an element type": change_type,
    "shrink a buffer": shrink_buffer,
}


def _field(table: str, fields: tuple[str, ...]) -> ProgramBreaker:
    """One field of one row of a table, by a little, by a bit, or to another row's value."""

    def breaker(r: random.Random, p: Program) -> tuple[str, Program] | None:
        struct = dict(abi.TABLES)[table]
        rows = np.frombuffer(p.tables[table], struct.dtype).copy()
        if not len(rows):
            return None
        row, field = r.randrange(len(rows)), r.choice(fields)
        column = rows[field]
        place = (row, r.randrange(column.shape[1])) if column.ndim > 1 else (row,)
        old = int(column[place])
        bits = 8 * column.dtype.itemsize
        other = int(column[(r.randrange(len(rows)), *place[1:])])
        new = r.choice([old + 1, old - 1, old ^ 1 << r.randrange(bits), other])
        if new == old:
            return None
        new &= (1 << bits) - 1
        column[place] = new - (1 << bits) if column.dtype.kind == "i" and new >> (bits - 1) else new
        what = f"{table}[{row}].{field}{list(place[1:]) or ''}: {int(column[place])} for {old}"
        return what, replace(p, tables={**p.tables, table: rows.tobytes()})

    return breaker


def exchange_operands(r: random.Random, p: Program) -> tuple[str, Program] | None:
    rows = np.frombuffer(p.tables["operands"], abi.OPERAND.dtype).copy()
    tasks = np.frombuffer(p.tables["tasks"], abi.TASK.dtype)
    task = tasks[r.randrange(len(tasks))]
    start, count = int(task["operands"]), int(task["operand_count"])
    if count < 2:
        return None
    a, b = r.sample(range(start, start + count), 2)
    if rows["ref"][a] == rows["ref"][b]:
        return None
    rows["ref"][a], rows["ref"][b] = int(rows["ref"][b]), int(rows["ref"][a])
    return f"operands {a} and {b} exchanged", replace(p, tables={**p.tables, "operands": rows.tobytes()})


def cut_table(r: random.Random, p: Program) -> tuple[str, Program] | None:
    name = r.choice([n for n, data in p.tables.items() if data])
    size = dict(abi.TABLES)[name].dtype.itemsize * r.choice([1, 1, 2]) if r.random() < 0.7 else r.randint(1, 7)
    return f"{name} lacks {size} bytes", replace(p, tables={**p.tables, name: p.tables[name][:-size]})


def exchange_bindings(r: random.Random, p: Program) -> tuple[str, Program] | None:
    if len(p.bindings) < 2:
        return None
    bindings = list(p.bindings)
    a, b = r.sample(range(len(bindings)), 2)
    bindings[a], bindings[b] = bindings[b], bindings[a]
    return f"bindings {a} and {b} exchanged", replace(p, bindings=tuple(bindings))


PROGRAM: dict[str, ProgramBreaker] = {
    "count of a wait": _field("waits", ("count",)),
    "counter of a wait": _field("waits", ("slot",)),
    "counter of a signal": _field("signals", ("slot",)),
    "opcode": _field("tasks", ("op",)),
    "id of a task": _field("tasks", ("id",)),
    "waits of a task": _field("tasks", ("waits", "wait_count")),
    "signals of a task": _field("tasks", ("signals", "signal_count")),
    "operands of a task": _field("tasks", ("operands", "operand_count")),
    "argument of a task": _field("tasks", ("arg",)),
    "reference of an operand": _field("operands", ("ref",)),
    "exchange operands": exchange_operands,
    "queue": _field("queues", ("task", "task_count", "run", "run_count")),
    "segment": _field("segments", ("part", "row", "rows")),
    "run": _field("runs", ("base0", "base1", "rows", "row_bytes", "copy", "tiled")),
    "cut a table": cut_table,
    "exchange bindings": exchange_bindings,
}
