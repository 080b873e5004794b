"""Store what was rounded in the type it was rounded to."""

from __future__ import annotations

from dataclasses import replace

from ...ir import expr as E
from ...ir.expr import Expr, Op
from ...ir.graph import Attention, Graph, Linear, Node, RowMap
from .flow import Flow
from .rewrite import map_expressions, replace_loads


def narrow_buffers(graph: Graph) -> Graph:
    """An internal buffer whose elements were widened just before they are stored (`x.float()`) is stored as they were,
    and widened where it is read: the same values in half the bytes."""
    flow = Flow(graph)
    for i, node in flow:
        if isinstance(node, RowMap):
            narrow = _widened(node.body, node.out, flow)
            if narrow is not None:
                _store_as(narrow, i, replace(node, body=narrow), node.out, flow)
        elif isinstance(node, Linear):
            for k, part in enumerate(node.parts):
                narrow = _widened(part.epilogue, part.out, flow)
                if narrow is not None:
                    parts = (*node.parts[:k], replace(part, epilogue=narrow), *node.parts[k + 1 :])
                    node = replace(node, parts=parts)
                    _store_as(narrow, i, node, part.out, flow)
    return flow.graph("narrow_buffers")


def _widened(x: Expr, name: str, flow: Flow) -> Expr | None:
    if not (isinstance(x, Op) and x.name == "cast" and x.dtype.is_float and x.children[0].dtype.is_narrow_float):
        return None
    readers = [flow[r] for r in flow.readers(name)]
    return x.children[0] if flow.is_internal(name) and not any(_by_name(n, name) for n in readers) else None


def _by_name(node: Node, name: str) -> bool:
    """Whether a node reads the buffer other than by loads, or has to load it as it is (x of several tokens)."""
    if isinstance(node, Linear):
        return any(name in p.weights for p in node.parts) or (node.t.size > 1 and name in node.x.buffers)
    return isinstance(node, Attention) and name in (node.keys, node.values)


def _store_as(narrow: Expr, i: int, writer: Node, name: str, flow: Flow) -> None:
    wide = flow.buffers[name].dtype
    flow.buffers[name] = replace(flow.buffers[name], dtype=narrow.dtype)

    def value(index: tuple[Expr, ...]) -> Expr:
        return E.cast(E.load(name, index, narrow.dtype), wide)

    flow.replace(i, writer)
    for r in flow.readers(name):
        flow.replace(r, map_expressions(flow[r], lambda x: replace_loads(x, {name: value})))
