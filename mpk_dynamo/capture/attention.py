"""Attention as one call: of one query token per sequence, or of a few that are so many heads more."""

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

MAX_QUERIES = 16
"""Query rows (sequences x tokens) of an attention that is captured. More is a prefill: work for matrix units, where
this operator reads every key again for each few rows."""

Stored = Callable[[Index], "tuple[str, Index]"]
"""Buffer and index of the key or value at a point (batch, head, token, element)."""


@lowers("scaled_dot_product_attention")
def attention(imp: Importer, call: Call) -> View:
    q, k, v = (call[x] for x in ("query", "key", "value"))
    if any(len(x.shape) != 4 for x in (q, k, v)):
        raise call.refuse(f"query of shape {list(q.shape)}; [batch, heads, tokens, width] is captured")
    batch, heads, tokens, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if tokens != 1 and batch * tokens > MAX_QUERIES:
        raise call.refuse(f"{tokens} query tokens of {batch} sequences", too_many_queries(), passing=True)
    if call["dropout_p"]:
        raise call.refuse(f"dropout_p={call['dropout_p']}", "call model.eval()")
    if v.shape != k.shape or k.shape[3] != width or k.shape[0] != batch or v.dtype is not q.dtype:
        raise call.refuse(f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}")
    if groups not in (1, heads) and not (call["enable_gqa"] and heads % groups == 0):
        raise call.refuse(f"{heads} query heads, {groups} key heads, enable_gqa={call['enable_gqa']}")
    if not q.dtype.is_float or q.dtype is DType.F64:
        raise call.refuse(f"attention in {q.dtype.value}")

    loops = b, h, s, d = E.var("b", batch), E.var("h", heads * tokens), E.var("s", keys), E.var("d", width)
    stored = _stored(imp.stored_part(k, call)), _stored(imp.stored_part(v, call))
    query = q.load((point(b), *head_and_token(h, tokens), point(d)))
    scale = 1 / math.sqrt(width) if call["scale"] is None else float(call["scale"])
    mask = _mask(call, loops, heads, tokens)
    return attend(imp, call, loops, tokens, groups, query, *stored, scale=scale, mask=mask)


def too_many_queries() -> str:
    return f"up to {MAX_QUERIES} query rows are captured; more, as in a prefill, go to the fallback"


def head_and_token(h: E.Var, tokens: int) -> Index:
    """(head, token) of a loop over heads * tokens. The tokens of a head are neighbours: all that share the keys of a
    group are."""
    if tokens == 1:
        return point(h), E.index(0)
    size = E.index(tokens)
    return op("floordiv", point(h), size) if h.size > tokens else E.index(0), op("mod", point(h), size)


def attend(
    imp: Importer,
    call: Call,
    loops: tuple[E.Var, E.Var, E.Var, E.Var],
    tokens: int,
    shown: int,
    query: Expr,
    key_at: Stored,
    value_at: Stored,
    *,
    scale: float,
    mask: Expr | None,
    softcap: float | None = None,
) -> View:
    """An Attention with the call's result. `loops`: batch, query heads * `tokens`, keys, width; `query` and `mask` are
    over these. `shown`: key heads, as the tensors show them; those that are copies of each other are found here."""
    b, h, s, d = loops
    heads = h.size // tokens
    groups = _shared_groups(key_at, value_at, (b, E.var("h", heads), s, d)) if shown == heads else shown
    g = E.var("g", groups)
    at = (point(b), op("mul", point(g), E.index(shown // groups)), point(s), point(d))
    (keys, key_index), (values, value_index) = key_at(at), value_at(at)
    name = imp.fresh(call.name)
    node = Attention(
        name=name, b=b, h=h, g=g, s=s, d=d, q=query,
        keys=keys, key_index=key_index, values=values, value_index=value_index,
        scale=constant(scale, DType.F32).value,  # as a model that writes attention out rounds it
        out=name, store=(point(b), *head_and_token(h, tokens), point(d)), mask=mask, softcap=softcap,
        origin=call.origin,
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


def _mask(call: Call, loops: tuple[E.Var, E.Var, E.Var, E.Var], heads: int, tokens: int) -> Expr | None:
    b, h, s, _ = loops
    head, token = head_and_token(h, tokens)
    mask: View | None = call["attn_mask"]
    if call["is_causal"]:
        if mask is not None:
            raise call.refuse("a mask together with is_causal")
        # torch aligns the triangle at the top left: the first query token sees key 0 alone
        return op("le", point(s), token) if s.size > 1 else None
    if mask is None:
        return None
    full = (b.size, heads, tokens, s.size)
    element = mask.load(broadcast(mask.shape, full, (point(b), head, token, point(s))))
    return element if element.dtype is DType.BOOL else convert(element, DType.F32)
