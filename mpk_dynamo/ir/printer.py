"""Stable text forms of every stage, for dumps, diffs and tests."""

from __future__ import annotations

from .expr import render
from .graph import Attention, ExtensionNode, Graph, Linear, Node, RowMap, reads, writes
from .program import Program
from .region import Access
from .schedule import Schedule
from .tasks import TaskGraph
from .types import Buffer


def print_buffer(b: Buffer) -> str:
    shape = ",".join(map(str, b.shape))
    alias = f" of {b.storage}" if b.storage != b.name else ""
    return f"{b.kind.value} {b.name}: {b.dtype.value}[{shape}]{alias}" + (f"  # {b.origin}" if b.origin else "")


def print_node(node: Node) -> str:
    where = f"  # {node.origin}" if node.origin else ""
    if isinstance(node, RowMap):
        dims = ", ".join(f"{v.name}<{v.size}" for v in node.dims)
        store = ", ".join(map(render, node.store))
        return f"{node.name} = row_map({dims}) {node.out}[{store}] = {render(node.body)}{where}"
    if isinstance(node, Linear):
        kind = "linear_columns" if node.transposed else "linear"
        lines = [f"{node.name} = {kind}(t<{node.t.size}, k<{node.k.size}) x = {render(node.x)}{where}"]
        for p in node.parts:
            store = ", ".join(map(render, p.store))
            out = f"{p.out}[{store}] = {render(p.epilogue)}"
            lines.append(f"  [{' & '.join(p.weights)}] n<{p.rows}: {out}  # {p.origin}")
        return "\n".join(lines)
    if isinstance(node, ExtensionNode):
        kind = type(node).__name__.lower()
        lines = [f"{node.name} = {kind}({', '.join(reads(node))}) -> {', '.join(writes(node))}{where}"]
        return "\n".join([*lines, *(f"  {render(e)}" for e in node.expressions())])
    assert isinstance(node, Attention)
    sizes = ", ".join(f"{v.name}<{v.size}" for v in (node.b, node.h, node.g, node.s, node.d))
    cap = "" if node.softcap is None else f" softcap={node.softcap!r}"
    lines = [f"{node.name} = attention({sizes}) scale={node.scale!r}{cap}{where}", f"  q = {render(node.q)}"]
    for label, name, idx in (("K", node.keys, node.key_index), ("V", node.values, node.value_index)):
        lines.append(f"  {label} = {name}[{', '.join(map(render, idx))}]")
    for label, e in (("mask", node.mask), ("first", node.first), ("last", node.last)):
        if e is not None:
            lines.append(f"  {label} = {render(e)}")
    if node.append:
        a = node.append
        lines.append(f"  append at {render(a.position)} -> {a.keys}, {a.values}")
        lines += [f"    key = {render(a.key)}", f"    value = {render(a.value)}"]
    lines.append(f"  {node.out}[{', '.join(map(render, node.store))}]")
    return "\n".join(lines)


def print_graph(graph: Graph) -> str:
    lines = [f"graph after {' '.join(graph.provenance) or 'nothing'}"]
    lines += [print_buffer(b) for b in graph.buffers.values()]
    lines += [print_node(n) for n in graph.nodes]
    outs = (o.buffer if o.buffer is not None else repr(o.constant) for o in graph.outputs)
    return "\n".join([*lines, f"return {', '.join(outs)}"]) + "\n"


def print_access(a: Access) -> str:
    box = ", ".join(f"{s}:{e}" for s, e in a.box)
    return f"{a.buffer}[{box}]" + (f" {a.side.value} {a.partition}" if a.side else "")


def print_tasks(tg: TaskGraph) -> str:
    waits, signals = tg.waits(), tg.signals()
    lines = [f"{len(tg.tasks)} tasks, {len(tg.events)} events"]
    if tg.flagged:
        lines.append(f"flagged {' '.join(sorted(tg.flagged))}")
    for t in tg.tasks:
        lines.append(
            f"t{t.id} {tg.graph.nodes[t.node].name}.{t.op}{list(t.tile)} wait {waits[t.id]} signal {signals[t.id]}"
            f" reads {'; '.join(map(print_access, t.reads))} writes {'; '.join(map(print_access, t.writes))}"
        )
    for e in tg.events:
        lines.append(f"e{e.id} count {len(e.producers)} from {list(e.producers)} to {list(e.waiters)}")
    return "\n".join(lines) + "\n"


def print_schedule(s: Schedule) -> str:
    lines = [f"{s.workers} workers, arena {s.arena_bytes} bytes, {len(set(s.slots))} event slots"]
    lines += [f"worker {w}: {' '.join(f't{t}' for t in q)}" for w, q in enumerate(s.queues)]
    if s.flagged_bytes:
        sets = f"{s.flagged_start} and {s.flagged_start + s.flagged_bytes}"
        lines.append(f"flagged: sets of {s.flagged_bytes} bytes at {sets}")
    for name, offset in s.arena.items():
        lines.append(f"arena {name} at {offset}" + (" flagged" if name in s.tasks.flagged else ""))
    return "\n".join(lines) + "\n"


def print_program(p: Program) -> str:
    lines = [f"program for {p.target}: {p.threads} threads, {p.shared_bytes} bytes of shared memory"]
    lines += [f"opcode {i}: {k}" for i, k in enumerate(p.kinds)]
    lines += [f"table {name}: {len(data)} bytes" for name, data in p.tables.items()]
    lines += [f"binding {i}: {b}" for i, b in enumerate(p.bindings)]
    return "\n".join(lines) + "\n" + p.source
