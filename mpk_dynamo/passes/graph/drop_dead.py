"""Remove nodes whose results nobody needs."""

from __future__ import annotations

from ...ir.graph import Graph, Node, reads, writes
from ...ir.types import BufferKind


def drop_dead(graph: Graph) -> Graph:
    """Keep what an output, or a write to the caller's memory, depends on."""
    needed = {o.buffer for o in graph.outputs if o.buffer is not None}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if any(name in needed or graph.buffers[name].kind is BufferKind.STATE for name in writes(node)):
            kept.append(node)
            needed.update(reads(node))
    return graph.replace("drop_dead", nodes=tuple(reversed(kept)))
