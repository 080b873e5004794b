"""Compute a RowMap's result where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir import expr as E
from ...ir.expr import Expr, Var
from ...ir.graph import Attention, Linear, Node, RowMap
from .flow import Flow
from .rewrite import is_identity, map_expressions, plain_load, replace_loads


def inlined(node: RowMap, reader: Node, flow: Flow) -> Node | None:
    """`reader` with every load of node.out replaced by the computation. None where that cannot be written."""
    at = solve_store(node)
    if at is None:
        return None

    def value(index: tuple[Expr, ...]) -> Expr:
        return E.substitute(node.body, at(index))

    reader = map_expressions(reader, lambda x: replace_loads(x, {node.out: value}))
    if isinstance(reader, Attention):
        for buffer_field, index_field in (("keys", "key_index"), ("values", "value_index")):
            if getattr(reader, buffer_field) == node.out:
                found = value(getattr(reader, index_field))
                if not plain_load(found):
                    return None
                assert isinstance(found, E.Load)
                reader = replace(reader, **{buffer_field: found.buffer, index_field: found.index})
    elif isinstance(reader, Linear) and any(node.out in p.weights for p in reader.parts):
        source = _whole_copy(node, flow)
        if source is None:
            return None
        parts = (replace(p, weights=tuple(source if w == node.out else w for w in p.weights)) for p in reader.parts)
        reader = replace(reader, parts=tuple(parts))
    return reader


class _AtIndex:
    """Values of a RowMap's dims at an element of its result."""

    def __init__(self, where: Mapping[Var, int]) -> None:
        self.where = where

    def __call__(self, index: tuple[Expr, ...]) -> dict[Var, Expr]:
        return {v: index[k] for v, k in self.where.items()}


def solve_store(node: RowMap) -> _AtIndex | None:
    """How to find a RowMap's dims from the index of an element of its result, when each element is one point."""
    where = {e: k for k, e in enumerate(node.store) if isinstance(e, Var)}
    rest = [e for e in node.store if not isinstance(e, (Var, E.Const))]
    if rest or any(v not in where for v in node.dims if v.size != 1):
        return None
    return _AtIndex({v: where[v] for v in node.dims if v in where})


def _whole_copy(node: RowMap, flow: Flow) -> str | None:
    """The buffer that node.out equals, element for element."""
    body = node.body
    if not isinstance(body, E.Load) or body.index != node.store:
        return None
    source, copy = flow.buffers[body.buffer], flow.buffers[node.out]
    same = source.shape == copy.shape and source.strides[-1:] == (1,)
    return body.buffer if same and _covers(node, copy.shape) else None


def _covers(node: RowMap, shape: tuple[int, ...]) -> bool:
    wide = [(e, n) for e, n in zip(node.store, shape, strict=True) if n != 1]
    return is_identity(tuple(e for e, _ in wide), node.dims, tuple(n for _, n in wide))
