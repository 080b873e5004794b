"""Samples of the operators that have no device form: all others must compile and run on a GPU."""

from __future__ import annotations

from mpk_dynamo.ir.graph import Graph, Node
from mpk_dynamo.ops import OPERATORS

SAMPLES: dict[str, tuple[Node, Graph]] = {
    f"{operator.name}-{i}-{node.name}": (node, graph)
    for operator in OPERATORS.values()
    for i, (node, graph) in enumerate(operator.samples())
}

REFUSED: dict[str, str] = {
    "row_map-7-total": "a reduction inside another depends on its variable",
    "row_map-12-shift": "an in-place shift of a tensor has no device form yet",
    # graph passes leave the prologue of several tokens in fp32 to a RowMap
    "linear-13-qkv": "with several tokens",
}
"""Sample -> what the Unsupported that code generation raises for it must say."""
