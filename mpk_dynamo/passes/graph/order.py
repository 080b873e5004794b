"""Put the nodes in an order in which running them one by one is right."""

from __future__ import annotations

from ...ir.graph import Graph
from .flow import Flow


def order(graph: Graph) -> Graph:
    """Stable topological order over data flow and in-place writes. Raises Unsupported when there is none."""
    return Flow(graph).graph("order")
