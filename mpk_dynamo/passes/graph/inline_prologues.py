"""Compute what a node needs inside that node: norms, rotary embedding, masks, positions."""

from __future__ import annotations

import math

from ...ir import expr as E
from ...ir.expr import Expr, Var
from ...ir.graph import Attention, Graph, Linear, Node, RowMap
from .flow import Flow
from .inline import inlined
from .policy import FEW_READERS, NESTED_LIMIT, PROLOGUE_WEIGHT, RECOMPUTE, is_cheap, is_gathering, is_slow, weight, work
from .rewrite import plain_load


def inline_prologues(graph: Graph) -> Graph:
    """RowMaps become part of their reader when there is one reader, or of all readers when they are cheap (policy.py
    has the numbers). The others stay: rotary tables, embedding rows, norms that several nodes read, and whatever a
    reader has no place for."""
    flow = Flow(graph)
    inline_single_readers(flow, Node)
    inline_shared(flow)
    inline_single_readers(flow, Node)
    return flow.graph("inline_prologues")


def inline_single_readers(flow: Flow, kind: object) -> None:
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
        if len(readers) != 1 or not isinstance(flow[readers[0]], kind):  # type: ignore[arg-type]
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
    if E.reductions(node.body):
        return all(ld.free >= set(node.dims) for r in E.reductions(node.body) for ld in E.loads(r))
    return all(isinstance(flow[r], RowMap) for r in readers)


def _fused(node: RowMap, reader: int, flow: Flow) -> Node | None:
    old = flow[reader]
    new = inlined(node, old, flow)
    return new if new is not None and fits(new, old) and flow.allows(reader, new) else None


def fits(new: Node, old: Node) -> bool:
    """Whether the expressions that are new in `new` can be computed where they stand."""
    if isinstance(new, RowMap) and isinstance(old, RowMap):
        return _changed((new.body,), (old.body,), _separate) and _changed(new.store, old.store, _pointwise)
    if isinstance(new, Linear) and isinstance(old, Linear):
        if new.x is not old.x and not _fits_depth(new):
            return False
        pairs = list(zip(new.parts, old.parts, strict=True))
        return all(_changed((p.epilogue, *p.store), (q.epilogue, *q.store), _pointwise) for p, q in pairs)
    assert isinstance(new, Attention) and isinstance(old, Attention)
    rows = frozenset((new.b, new.h, new.g))
    if (new.key_index, new.value_index, new.store) != (old.key_index, old.value_index, old.store):
        return False
    appended = [(), ()]
    if new.append and old.append:
        appended = [(a.key, a.value) for a in (new.append, old.append)]
        if not _changed((new.append.position,), (old.append.position,), _pointwise):
            return False
    masks = [tuple(e for e in (n.mask, n.first, n.last) if e is not None) for n in (new, old)]
    return _changed((new.q, *appended[0]), (old.q, *appended[1]), lambda x: _separate(x, rows)) and _changed(
        masks[0], masks[1], _pointwise
    )


def _fits_depth(node: Linear) -> bool:
    """With one token, x may reduce over the whole depth. With several, tiles of x are read again and again by tensor
    cores, so x has to be stored."""
    if node.t.size > 1:
        return plain_load(node.x)
    reductions = E.reductions(node.x)
    over_depth = all(r.var.size == node.k.size and r.free <= {node.t} for r in reductions)
    return over_depth and _separate(node.x) and weight(node.x) <= PROLOGUE_WEIGHT


def _changed(new: tuple[Expr, ...], old: tuple[Expr, ...], check: object) -> bool:
    return all(check(a) for a, b in zip(new, old, strict=True) if a is not b)  # type: ignore[operator]


def _separate(x: Expr, rows: frozenset[Var] | None = None) -> bool:
    """Whether no reduction runs once per step of another (and each runs once per row), and x is not too large."""
    reductions = E.reductions(x)
    bound = {r.var for r in reductions}
    if any(r.free & bound or (rows is not None and not r.free <= rows) for r in reductions):
        return False
    return sum(1 for _ in E.walk(x)) <= NESTED_LIMIT


def _pointwise(x: Expr) -> bool:
    return not E.reductions(x) and sum(1 for _ in E.walk(x)) <= NESTED_LIMIT


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
