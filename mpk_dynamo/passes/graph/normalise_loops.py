"""Bring loops to one form, so that equal computations are equal objects."""

from __future__ import annotations

from dataclasses import replace

from ...ir import expr as E
from ...ir.expr import Expr
from ...ir.graph import ExtensionNode, Graph, Node, RowMap
from .rewrite import map_expressions, name_reductions, variables


def normalise_loops(graph: Graph) -> Graph:
    """Drop loop variables of size 1 from expressions and from the dims of RowMaps, number those dims i0, i1, ... and
    name reduction variables by their nesting."""
    return graph.replace("normalise_loops", nodes=tuple(map(_normalised, graph.nodes)))


def _normalised(node: Node) -> Node:
    if isinstance(node, ExtensionNode):
        return node
    renamed: dict[E.Var, Expr] = {v: E.index(0) for v in variables(node) if v.size == 1}
    if isinstance(node, RowMap):
        kept = [v for v in node.dims if v.size != 1]
        dims = tuple(E.var(f"i{k}", v.size) for k, v in enumerate(kept))
        renamed.update((v, new) for v, new in zip(kept, dims, strict=True) if v is not new)
        node = replace(node, dims=dims)

    def form(x: Expr) -> Expr:
        return name_reductions(x if x.free.isdisjoint(renamed) else E.substitute(x, renamed))

    return map_expressions(node, form)
