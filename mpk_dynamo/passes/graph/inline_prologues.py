"""Compute what a node needs inside that node: norms, rotary embedding, masks, positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import UnionType

from ...ir import expr as E
from ...ir.expr import Expr, Var
from ...ir.graph import Attention, Graph, Linear, Node, RowMap, expressions
from .flow import Flow
from .inline import inlined
from .policy import (
    DEPTH_LIMIT,
    FEW_READERS,
    PROLOGUE_DEPTH,
    PROLOGUE_WEIGHT,
    RECOMPUTE,
    SIZE_LIMIT,
    is_cheap,
    is_gathering,
    is_slow,
    weight,
    work,
)
from .rewrite import data_independent, plain_load


def inline_prologues(graph: Graph) -> Graph:
    """RowMaps become part of their reader when there is one reader, or of all readers when they are cheap (policy.py
    has the numbers). The others stay: rotary tables, embedding rows, norms that several nodes read, and whatever a
    reader has no place for."""
    flow = Flow(graph)
    inline_single_readers(flow, Node)
    inline_shared(flow)
    inline_single_readers(flow, Node)
    return flow.graph("inline_prologues")


def inline_single_readers(flow: Flow, kind: type | UnionType) -> None:
    """Inline RowMaps with one reader, of type `kind`. Readers first: a chain that forks and joins again inside one
    reader has one reader by the time its start is looked at."""
    known: dict[int, int] = {}

    def cost(i: int) -> int:
        if i not in known:
            known[i] = work_of(flow[i])
        return known[i]

    for i in reversed(flow.numbers()):
        node = flow[i]
        if not isinstance(node, RowMap) or not flow.is_internal(node.out):
            continue
        readers = flow.readers(node.out)
        if len(readers) != 1 or not isinstance(flow[readers[0]], kind):
            continue
        new = _fused(node, readers[0], flow)
        if new is None:
            continue
        after = work_of(new)
        again = 0 if is_slow(node.body) else RECOMPUTE * units(new)
        if after <= cost(readers[0]) + cost(i) + again:
            flow.replace(readers[0], new)
            flow.remove(i)
            known[readers[0]] = after


def inline_shared(flow: Flow) -> None:
    """Inline RowMaps into all of their readers, or into none: those that cost next to nothing, and for few readers
    small pointwise ones and statistics of rows."""
    for i, node in flow:
        if not isinstance(node, RowMap) or not flow.is_internal(node.out):
            continue
        readers = flow.readers(node.out)
        if not is_cheap(node.body) and not (len(readers) <= FEW_READERS and _is_light(node, readers, flow)):
            continue
        new = {r: _fused(node, r, flow) for r in readers}
        if all(n is not None and work_of(n) <= work_of(flow[r]) + RECOMPUTE * units(n) for r, n in new.items()):
            for r, n in new.items():
                assert n is not None
                flow.replace(r, n)
            flow.remove(i)


def _is_light(node: RowMap, readers: list[int], flow: Flow) -> bool:
    """Whether reading the result costs about as much as computing it again: one number for each row of what it reads
    (a mean; not a product with a matrix), or something pointwise that only RowMaps read."""
    if is_gathering(node.body) or is_slow(node.body):
        return False
    if node.body.reduces:
        return all(ld.free >= set(node.dims) for r in E.reductions(node.body) for ld in E.loads(r))
    return all(isinstance(flow[r], RowMap) for r in readers)


def _fused(node: RowMap, reader: int, flow: Flow) -> Node | None:
    old = flow[reader]
    if node.body.depth + max(e.depth for e in expressions(old)) > DEPTH_LIMIT:
        return None
    new = inlined(node, old, flow)
    return new if new is not None and fits(new, old) and flow.allows(reader, new) else None


def fits(new: Node, old: Node) -> bool:
    """Whether the expressions that are new in `new` can be computed where they stand."""
    pairs = zip(_places(new), _places(old), strict=True)
    return all(x is y or (x is not None and can_hold(x)) for (x, can_hold), (y, _) in pairs)


def _places(node: Node) -> list[tuple[Expr | None, Callable[[Expr], bool]]]:
    """The expressions of a node, each with what may be computed there."""
    if isinstance(node, RowMap):
        return [(node.body, _separate), *((e, _pointwise) for e in node.store)]
    if isinstance(node, Linear):
        outputs = [(e, _pointwise) for p in node.parts for e in (p.epilogue, *p.store)]
        return [(node.x, lambda x: _fits_depth(x, node)), *outputs]
    rows = frozenset((node.b, node.h, node.g))
    per_row: list[Expr | None] = [node.q]
    scalars = [node.mask, node.first, node.last]
    if node.append is not None:
        per_row += [node.append.key, node.append.value]
        scalars.append(node.append.position)
    return [
        *((e, lambda x: _separate(x, rows)) for e in per_row),
        *((e, _pointwise) for e in scalars),
        *((e, data_independent) for e in (*node.key_index, *node.value_index, *node.store)),
    ]


def _fits_depth(x: Expr, node: Linear) -> bool:
    """x may reduce over the whole depth. With several tokens it has to fit a worker's registers, or to be stored."""
    if node.t.size > 1 and not _fits_registers(x, node):
        return plain_load(x)
    over_depth = all(r.var.size == node.k.size and r.free <= {node.t} for r in E.reductions(x))
    return over_depth and _separate(x) and weight(x) <= PROLOGUE_WEIGHT


def _fits_registers(x: Expr, node: Linear) -> bool:
    alike = {r.var: node.k for r in E.reductions(x)}
    rows = {E.substitute(ld, alike) for ld in E.loads(x) if node.t in ld.free}
    depth = next((d for tokens, d in PROLOGUE_DEPTH if node.t.size <= tokens), 0)
    fits = node.k.size <= depth and sum(ld.dtype.itemsize for ld in rows) <= x.dtype.itemsize
    return x.dtype.is_narrow_float and fits


def _separate(x: Expr, rows: frozenset[Var] | None = None) -> bool:
    """Whether no reduction runs once per step of another (and each runs once per row), and x is not too large."""
    reductions = E.reductions(x)
    bound = {r.var for r in reductions}
    if any(r.free & bound or (rows is not None and not r.free <= rows) for r in reductions):
        return False
    return _is_small(x)


def _pointwise(x: Expr) -> bool:
    return not x.reduces and _is_small(x)


def _is_small(x: Expr) -> bool:
    return x.tree_size <= SIZE_LIMIT or sum(1 for _ in E.walk(x)) <= SIZE_LIMIT


def work_of(node: Node) -> int:
    """Operations of a node's expressions. The prologue of a Linear is bounded by itself (PROLOGUE_WEIGHT)."""
    if isinstance(node, RowMap):
        return work(node.body, node.dims)
    if isinstance(node, Linear):
        return sum(work(p.epilogue, (node.t, p.n)) for p in node.parts)
    total = work(node.q, (node.b, node.h, node.d))
    if node.append:
        total += sum(work(e, (node.b, node.g, node.d)) for e in (node.append.key, node.append.value))
    return total + (work(node.mask, (node.b, node.h, node.s)) if node.mask is not None else 0)


def units(node: Node) -> int:
    """Rows of a node that different workers can compute."""
    if isinstance(node, RowMap):
        return math.prod(v.size for v in node.dims[:-1])
    return node.b.size * node.g.size if isinstance(node, Attention) else 1
