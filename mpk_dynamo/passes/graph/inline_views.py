"""Fold views, copies and constants into whatever reads them."""

from __future__ import annotations

from ...ir.graph import Graph, RowMap
from .flow import Flow
from .inline import inlined
from .policy import CHEAP, weight
from .rewrite import data_independent, plain_load


def inline_views(graph: Graph) -> Graph:
    """Readers of a RowMap that only moves elements (its body is one load, at an index that does not depend on data)
    or that only counts (no load, cheap) compute it themselves. A reader for which the element may be overwritten by
    then keeps reading the copy."""
    flow = Flow(graph)
    for i, node in flow:
        if not isinstance(node, RowMap) or not flow.is_internal(node.out):
            continue
        moves = plain_load(node.body)
        if not moves and not (data_independent(node.body) and weight(node.body) <= CHEAP):
            continue
        for r in flow.readers(node.out):
            reader = inlined(node, flow[r], flow)
            if reader is not None and flow.allows(r, reader):
                flow.replace(r, reader)
        if not flow.readers(node.out):
            flow.remove(i)
    return flow.graph("inline_views")
