"""Compute once what is computed twice."""

from __future__ import annotations

from ...ir import expr as E
from ...ir.expr import Expr
from ...ir.graph import Attention, Graph, Linear, RowMap
from .flow import Flow
from .rewrite import map_expressions, replace_loads


def merge_duplicates(graph: Graph) -> Graph:
    """RowMaps with equal loops, body and store become one, for whoever reads them."""
    flow = Flow(graph)
    first: dict[object, str] = {}
    for i, node in flow:
        if not isinstance(node, RowMap) or not flow.is_internal(node.out):
            continue
        kept = first.setdefault((node.dims, node.body, node.store, flow.buffers[node.out].shape), node.out)
        if kept == node.out:
            continue
        for r in flow.readers(node.out):
            reader = flow[r]
            by_name = isinstance(reader, Attention) and node.out in (reader.keys, reader.values)
            by_name |= isinstance(reader, Linear) and any(node.out in p.weights for p in reader.parts)
            if by_name:
                continue

            def value(index: tuple[Expr, ...], kept: str = kept, dtype: E.DType = node.body.dtype) -> Expr:
                return E.load(kept, index, dtype)

            flow.replace(r, map_expressions(reader, lambda x: replace_loads(x, {node.out: value})))  # noqa: B023
        if not flow.readers(node.out):
            flow.remove(i)
    return flow.graph("merge_duplicates")
