"""Give internal buffers the shape that their writers and readers use: rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...ir import expr as E
from ...ir.expr import Expr, Op
from ...ir.graph import Attention, Graph, Linear, Node, RowMap, writes
from ...ir.types import buffer
from .flow import Flow
from .rewrite import flat_index, map_expressions, replace_loads

Reindex = Callable[[tuple[Expr, ...]], tuple[Expr, ...]]


def flatten_buffers(graph: Graph) -> Graph:
    """The result of a Linear becomes [tokens, rows], that of an Attention [sequences, heads * head size], that of a
    RowMap loses dimensions of size 1 (down to two). Indices are rewritten; memory stays as it is. Then what one
    Attention stores per head is, for the Linear that reads it, plainly row t and column k."""
    flow = Flow(graph)
    by_name = {w for _, n in flow if isinstance(n, Linear) for p in n.parts for w in p.weights}
    by_name |= {name for _, n in flow if isinstance(n, Attention) for name in (n.keys, n.values)}
    for i, node in flow:
        for name in writes(node):
            if flow.is_internal(name) and name not in by_name:
                _flatten(i, name, flow)
    return flow.graph("flatten_buffers")


def _flatten(i: int, name: str, flow: Flow) -> None:
    node, old = flow[i], flow.buffers[name]
    shape = _matrix(node, name, flow)
    if shape is None or shape == old.shape:
        return

    def reindex(index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        if isinstance(node, RowMap):
            kept = tuple(e for e, n in zip(index, old.shape, strict=True) if n != 1)
            return (*(E.index(0) for _ in range(len(shape) - len(kept))), *kept)
        at, columns = flat_index(index, old.strides), E.index(shape[-1])
        return E.op("floordiv", at, columns), E.op("mod", at, columns)

    grown = False

    def value(index: tuple[Expr, ...]) -> Expr:
        nonlocal grown
        new = reindex(index)
        grown |= _divisions(new) > _divisions(index)
        return E.load(name, new, old.dtype)

    readers = {r: map_expressions(flow[r], lambda x: replace_loads(x, {name: value})) for r in flow.readers(name)}
    if grown:
        return  # it would only move the arithmetic from the shape into the index
    flow.buffers[name] = buffer(name, old.dtype, shape, old.kind, origin=old.origin)
    for r, n in (*readers.items(), (i, _restored(node, name, reindex))):
        flow.replace(r, n)


def _matrix(node: Node, name: str, flow: Flow) -> tuple[int, ...] | None:
    shape = flow.buffers[name].shape
    if isinstance(node, Linear):
        rows = next(p.rows for p in node.parts if p.out == name)
        wanted: tuple[int, ...] = (node.t.size, rows)
    elif isinstance(node, Attention):
        wanted = (node.b.size, node.h.size * node.d.size)
    else:
        wide = tuple(n for n in shape if n != 1)
        wanted = (1,) * (2 - len(wide)) + wide
    total = 1
    for n in wanted:
        total *= n
    return wanted if total == flow.buffers[name].numel else None


def _restored(node: Node, name: str, reindex: Reindex) -> Node:
    """The node with the index of what it stores to `name` rewritten."""
    if isinstance(node, Linear):
        parts = (replace(p, store=reindex(p.store)) if p.out == name else p for p in node.parts)
        return replace(node, parts=tuple(parts))
    assert isinstance(node, (RowMap, Attention))
    return replace(node, store=reindex(node.store)) if node.out == name else node


def _divisions(index: tuple[Expr, ...]) -> int:
    return sum(isinstance(e, Op) and e.name in ("floordiv", "mod") for x in index for e in E.walk(x))
