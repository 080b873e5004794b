"""Find grouped-query attention behind repeated keys and values."""

from __future__ import annotations

from dataclasses import replace

from ...ir import expr as E
from ...ir.expr import Expr, Op, Var
from ...ir.graph import Attention, Graph


def group_heads(graph: Graph) -> Graph:
    """Where r neighbouring KV heads of an Attention are the same element of the cache (`repeat_interleave`, or
    `unsqueeze`, `expand`, `reshape`), make them one head: g becomes g' with g = g' * r."""
    nodes = tuple(_grouped(n) if isinstance(n, Attention) else n for n in graph.nodes)
    return graph.replace("group_heads", nodes=nodes)


def _grouped(node: Attention) -> Attention:
    index = (*node.key_index, *node.value_index)
    if node.append is not None or node.g.size == 1:
        return node
    divisors = {
        e.children[1].value
        for x in index
        for e in E.walk(x)
        if isinstance(e, Op) and e.name == "floordiv" and e.children[0] is node.g and isinstance(e.children[1], E.Const)
    }
    if not any(node.g in x.free for x in index):
        divisors.add(node.g.size)
    for r in sorted(divisors, reverse=True):
        if node.g.size % r:
            continue
        g = E.var("g", node.g.size // r)
        shared = _without_rest(node.key_index, node.g, g, r), _without_rest(node.value_index, node.g, g, r)
        if shared[0] is not None and shared[1] is not None:
            return replace(node, g=g, key_index=shared[0], value_index=shared[1])
    return node


def _without_rest(index: tuple[Expr, ...], old: Var, new: Var, r: int) -> tuple[Expr, ...] | None:
    """index at old = new * r + rest, when it is the same for every rest in [0, r)."""
    rest = E.var("rest", r)
    group: Expr = E.index(0) if new.size == 1 else E.op("mul", new, E.index(r))
    out = tuple(E.substitute(e, {old: E.op("add", group, rest)}) for e in index)
    return None if any(rest in e.free for e in out) else out
