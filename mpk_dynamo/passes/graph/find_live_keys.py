"""Find, once per step, which keys a mask leaves alive."""

from __future__ import annotations

from dataclasses import replace

from ...ir import expr as E
from ...ir.expr import Expr
from ...ir.graph import Attention, Graph, RowMap
from ...ir.types import Buffer, BufferKind, DType, buffer
from .flow import Flow

IGNORED = -1e30
"""Added to a score, a number at most this leaves the key no weight, unless no key has more."""


def find_live_keys(graph: Graph) -> Graph:
    """For each distinct mask, one RowMap that computes (first live key, last live key + 1), for all Attentions with
    that mask: they read only the keys between. A key is live when any head may see it. Where none is, the range is
    empty for a bool mask, (number of keys, 0), and has all keys for one that is added: then all count."""
    flow = Flow(graph)
    known: dict[object, tuple[str, bool]] = {}
    for i, node in flow:
        if not isinstance(node, Attention) or node.mask is None or node.first is not None or node.s.size == 1:
            continue
        key = (node.mask, node.b, node.h, node.s)
        if key not in known:
            per_sequence = node.b in node.mask.free
            made, row_map = _range(node, per_sequence, flow)
            flow.add(row_map, (made,), before=flow.numbers()[0])
            known[key] = made.name, per_sequence
        name, per_sequence = known[key]
        b: Expr = node.b if per_sequence else E.index(0)
        first, last = (E.load(name, (b, E.index(k)), DType.I32) for k in (0, 1))
        flow.replace(i, replace(node, first=first, last=last))
    return flow.graph("find_live_keys")


def _range(node: Attention, per_sequence: bool, flow: Flow) -> tuple[Buffer, RowMap]:
    assert node.mask is not None
    keys = node.s.size
    heads = node.h.size if node.h in node.mask.free else 1
    name = _fresh("live_keys", flow)
    made = buffer(name, DType.I32, (node.b.size if per_sequence else 1, 2), BufferKind.SCRATCH, origin=node.origin)
    dims = (E.var("i0", node.b.size), E.var("i1", 2)) if per_sequence else (E.var("i0", 2),)
    step = E.var("r0", heads * keys)
    key: Expr = E.op("mod", step, E.index(keys))
    at: dict[E.Var, Expr] = {node.s: key, node.h: E.op("floordiv", step, E.index(keys))}
    if per_sequence:
        at[node.b] = dims[0]
    added = node.mask.dtype is not DType.BOOL
    live = E.substitute(node.mask, at)
    if added:
        live = E.op("gt", E.cast(live, DType.F32), E.const(IGNORED, DType.F32))
    number, behind = E.cast(key, DType.I32), E.cast(E.op("add", key, E.index(1)), DType.I32)
    first = E.reduce("min", step, E.where(live, number, E.const(keys, DType.I32)))
    last = E.reduce("max", step, E.where(live, behind, E.const(0, DType.I32)))
    if added:
        none = E.op("eq", last, E.const(0, DType.I32))
        first = E.where(none, E.const(0, DType.I32), first)
        last = E.where(none, E.const(keys, DType.I32), last)
    body = E.where(E.op("eq", dims[-1], E.index(0)), first, last)
    store = (dims[0] if per_sequence else E.index(0), dims[-1])
    return made, RowMap(name, dims, body, name, store, node.origin)


def _fresh(name: str, flow: Flow) -> str:
    out, k = name, 0
    while out in flow.buffers:
        k += 1
        out = f"{name}.{k}"
    return out
