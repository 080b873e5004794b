"""Join Linears of one input, so that it is prepared once and their weights stream without a gap."""

from __future__ import annotations

import os.path
from dataclasses import replace

from ...ir.graph import Graph, Linear
from .flow import Flow


def merge_linears(graph: Graph) -> Graph:
    """Linears with the same x become one Linear with the parts of all, in order, unless one waits for another."""
    flow = Flow(graph)
    groups: dict[object, list[int]] = {}
    for i, node in flow:
        if isinstance(node, Linear):
            groups.setdefault((node.x, node.t, node.k, node.transposed), []).append(i)
    for first, *rest in groups.values():
        for i in rest:
            node, other = flow[first], flow[i]
            assert isinstance(node, Linear) and isinstance(other, Linear)
            if not flow.can_join((first, i)):
                continue
            merged = replace(node, parts=node.parts + other.parts, origin=common_origin(node.origin, other.origin))
            flow.join((i,), first, merged)
    return flow.graph("merge_linears")


def common_origin(a: str, b: str) -> str:
    """The module that holds both: `model.layers.0.mlp` for its gate_proj and up_proj."""
    if not a or not b or a == b:
        return a or b
    return ".".join(os.path.commonprefix([a.split("."), b.split(".")]))
