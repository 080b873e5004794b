"""Attention of one query token, as one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.graph import Attention
from ..ir.types import DType
from .registry import Call, lowers
from .values import Index, Memory, View, broadcast, constant, convert, point, whole

if TYPE_CHECKING:
    from .importer import Importer

Stored = Callable[[Index], "tuple[str, Index]"]
"""Buffer and index of the key or value at a point (batch, head, token, element)."""


@lowers("scaled_dot_product_attention")
def attention(imp: Importer, call: Call) -> View:
    q, k, v = (call[x] for x in ("query", "key", "value"))
    if any(len(x.shape) != 4 for x in (q, k, v)):
        raise call.refuse(f"query of shape {list(q.shape)}; [batch, heads, tokens, width] is captured")
    batch, heads, tokens, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if tokens != 1:
        raise call.refuse(f"{tokens} query tokens", "only decode steps, of one query token, are captured", passing=True)
    if call["dropout_p"]:
        raise call.refuse(f"dropout_p={call['dropout_p']}", "call model.eval()")
    if v.shape != k.shape or k.shape[3] != width or k.shape[0] != batch or v.dtype is not q.dtype:
        raise call.refuse(f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}")
    if groups not in (1, heads) and not (call["enable_gqa"] and heads % groups == 0):
        raise call.refuse(f"{heads} query heads, {groups} key heads, enable_gqa={call['enable_gqa']}")
    if not q.dtype.is_float or q.dtype is DType.F64:
        raise call.refuse(f"attention in {q.dtype.value}")

    loops = b, h, s, d = E.var("b", batch), E.var("h", heads), E.var("s", keys), E.var("d", width)
    stored = _stored(imp.stored_part(k, call)), _stored(imp.stored_part(v, call))
    query = q.load((point(b), point(h), E.index(0), point(d)))
    scale = 1 / math.sqrt(width) if call["scale"] is None else float(call["scale"])
    return attend(imp, call, loops, groups, query, *stored, scale=scale, mask=_mask(call, b, h, s))


def attend(
    imp: Importer,
    call: Call,
    loops: tuple[E.Var, E.Var, E.Var, E.Var],
    shown: int,
    query: Expr,
    key_at: Stored,
    value_at: Stored,
    *,
    scale: float,
    mask: Expr | None,
    softcap: float | None = None,
) -> View:
    """An Attention with the call's result. `loops`: batch, query heads, keys, width. `shown`: key heads, as the
    tensors show them; those that are copies of each other are found here."""
    b, h, s, d = loops
    groups = _shared_groups(key_at, value_at, loops) if shown == h.size else shown
    g = E.var("g", groups)
    at = (point(b), op("mul", point(g), E.index(shown // groups)), point(s), point(d))
    (keys, key_index), (values, value_index) = key_at(at), value_at(at)
    name = imp.fresh(call.name)
    node = Attention(
        name=name, b=b, h=h, g=g, s=s, d=d, q=query,
        keys=keys, key_index=key_index, values=values, value_index=value_index,
        scale=constant(scale, DType.F32).value,  # as a model that writes attention out rounds it
        out=name, store=(point(b), point(h), E.index(0), point(d)), mask=mask, softcap=softcap, origin=call.origin,
    )  # fmt: skip
    imp.declare(name, call.dtype, call.shape, call.origin)
    imp.nodes.append(node)
    return whole(Memory(name, call.dtype, call.shape, buffer=name))


def _stored(view: View) -> Stored:
    def at(index: Index) -> tuple[str, Index]:
        found = view.resolve(index)
        assert found is not None
        return found

    return at


def _shared_groups(key_at: Stored, value_at: Stored, loops: tuple[E.Var, E.Var, E.Var, E.Var]) -> int:
    """The number of key heads that are really different: a repeated one (`repeat_kv`) reads the same elements
    whichever of its copies is asked for."""
    b, h, s, d = loops
    for groups in range(1, h.size):
        if h.size % groups:
            continue
        share = h.size // groups
        g, j = E.var("g", groups), E.var("j", share)
        at = (point(b), op("add", op("mul", point(g), E.index(share)), j), point(s), point(d))
        if all(j not in e.free for stored in (key_at, value_at) for e in stored(at)[1]):
            return groups
    return h.size


def _mask(call: Call, b: E.Var, h: E.Var, s: E.Var) -> Expr | None:
    mask: View | None = call["attn_mask"]
    if call["is_causal"]:
        if mask is not None:
            raise call.refuse("a mask together with is_causal")
        # torch aligns the triangle at the top left: the one query token sees key 0
        return op("eq", point(s), E.index(0)) if s.size > 1 else None
    if mask is None:
        return None
    full = (b.size, h.size, 1, s.size)
    element = mask.load(broadcast(mask.shape, full, (point(b), point(h), E.index(0), point(s))))
    return element if element.dtype is DType.BOOL else convert(element, DType.F32)
