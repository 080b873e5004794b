"""The big operators: matrix products, attention, gathers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.graph import Attention, Linear, LinearPart
from ..ir.types import DType
from .mutate import wrapped
from .registry import Call, lowers
from .values import Memory, Shape, View, broadcast, convert, points, wide
from .values import whole as whole_view
from .views import unflatten

if TYPE_CHECKING:
    from .importer import Importer


# --- matrix products ---


@lowers("linear")
def linear(imp: Importer, call: Call) -> View:
    return product(imp, call, call["input"], call["weight"], call["bias"])


@lowers("addmm")
def addmm(imp: Importer, call: Call) -> View:
    if call["alpha"] != 1 or call["beta"] != 1:
        raise call.refuse(f"alpha={call['alpha']}, beta={call['beta']}")
    return product(imp, call, call["mat1"], _turned(call["mat2"]), call["self"])


@lowers("mm", "matmul", "bmm")
def matmul(imp: Importer, call: Call) -> View:
    left: View = call["self"]
    right: View = call.get("other", call.get("mat2"))
    if len(right.shape) == 2 and len(left.shape) >= 2 and left.shape[-1] != 1 and is_weight(imp, right):
        return product(imp, call, left, _turned(right), None)
    depth = left.shape[-1]
    if depth == 1 and len(left.shape) >= 2 and len(right.shape) >= 2:
        return _outer(imp, call, left, right)
    raise call.refuse(
        f"a product of two computed tensors {list(left.shape)} x {list(right.shape)}",
        "load the model with attn_implementation='sdpa'",
    )


def _turned(view: View) -> View:
    """A matrix transposed."""
    rows, columns = view.shape
    at = points((columns, rows))
    return view.through((columns, rows), (at[1], at[0]))


def is_weight(imp: Importer, view: View) -> bool:
    """Whether a tensor is a whole parameter of the module, possibly transposed."""
    memory = view.memory
    if not memory.caller or len(memory.shape) != 2:
        return False
    return imp.is_param(memory) and (view.whole or _turned(view).whole)


def _outer(imp: Importer, call: Call, left: View, right: View) -> View:
    """A product over one element: a broadcast multiplication, rounded once."""
    at, kind = points(call.shape), wide(call.dtype)
    batch = call.shape[:-2]
    row = (*broadcast(left.shape[:-2], batch, at[:-2]), at[-2], E.index(0))
    column = (*broadcast(right.shape[:-2], batch, at[:-2]), E.index(0), at[-1])
    body = op("mul", convert(left.load(row), kind), convert(right.load(column), kind))
    return imp.emit(call, convert(body, call.dtype))


def product(imp: Importer, call: Call, x: View, weight: View, bias: View | None) -> View:
    """x @ weight.T + bias, for weight [rows, depth]: a Linear, or a reduction where the weight cannot be streamed."""
    if len(weight.shape) != 2:
        raise call.refuse(f"the weight has shape {list(weight.shape)}")
    if x.dtype is not weight.dtype or not x.dtype.is_float:
        raise call.refuse(f"of {x.dtype.value} and {weight.dtype.value}")
    rows, depth = weight.shape
    lead = x.shape[:-1]
    out, dtype = call.shape, call.dtype
    if not is_weight(imp, weight) and not _is_cheap(lead, rows, depth):
        raise call.refuse(f"the weight {list(weight.shape)} is computed in the graph")
    streamed = is_weight(imp, weight) and weight.whole and imp.buffers[weight.memory.buffer].strides[-1] == 1
    if x.dtype is DType.F64 or not streamed:
        return _reduced(imp, call, x, weight, bias)
    t, k, n = E.var("t", math.prod(lead)), E.var("k", depth), E.var("n", rows)
    token = tuple(unflatten(_point(t), lead))
    result: Expr = E.acc(0)
    if bias is not None:
        added = bias.load(broadcast(bias.shape, (*lead, rows), (*token, _point(n))))
        result = op("add", result, convert(added, DType.F32))
    name = imp.fresh(call.name)
    imp.declare(name, dtype, out, call.origin)
    part = LinearPart((weight.memory.buffer,), rows, convert(result, dtype), name, (*token, _point(n)), call.origin)
    imp.nodes.append(Linear(name, t, k, x.load((*token, _point(k))), (part,), call.origin))
    return whole_view(Memory(name, dtype, out, buffer=name))


def _point(v: E.Var) -> Expr:
    return E.index(0) if v.size == 1 else v


def _is_cheap(lead: Shape, rows: int, depth: int) -> bool:
    return math.prod(lead) * rows * depth <= 1 << 20


def _reduced(imp: Importer, call: Call, x: View, weight: View, bias: View | None) -> View:
    """The product as a row reduction: for weights stored with the depth outermost, and for f64."""
    depth, kind = x.shape[-1], wide(call.dtype)
    at, r = points(call.shape), E.var("r0", depth)
    element = op("mul", convert(x.load((*at[:-1], _point(r))), kind), convert(weight.load((at[-1], _point(r))), kind))
    body = E.reduce("sum", r, element)
    if bias is not None:
        body = op("add", body, convert(bias.load(broadcast(bias.shape, call.shape, at)), kind))
    imp.note(f"{call.origin}: {call.op} is a plain reduction, slower than a linear: its weight is not [rows, depth]")
    return imp.emit(call, convert(body, call.dtype))


# --- gathers ---


def _position(view: View, at: tuple[Expr, ...]) -> Expr:
    return convert(view.load(at), DType.I64)


@lowers("embedding")
def embedding(imp: Importer, call: Call) -> View:
    table, ids = call["weight"], call["indices"]
    at = points(call.shape)
    row = _position(ids, at[: len(ids.shape)])
    return imp.emit(call, table.load((row, at[-1])))


@lowers("index_select")
def index_select(imp: Importer, call: Call) -> View:
    source, rows = call["self"], call["index"]
    at = list(points(call.shape))
    if source.shape:
        dim = call["dim"] % len(source.shape)
        at[dim] = _position(rows, (at[dim],) if rows.shape else ())
    return imp.emit(call, source.load(tuple(at)))


@lowers("gather")
def gather(imp: Importer, call: Call) -> View:
    source, index = call["self"], call["index"]
    at = list(points(call.shape))
    if source.shape:
        at[call["dim"] % len(source.shape)] = _position(index, tuple(at))
    return imp.emit(call, source.load(tuple(at)))


@lowers("index", "_unsafe_index")
def index(imp: Importer, call: Call) -> View:
    """tensor[i, :, j]: integer index tensors, broadcast together; their dimensions stand where the first index stood
    when the indexed dimensions are neighbours, else in front."""
    source: View = call["self"]
    given = {d: v for d, v in enumerate(call["indices"]) if v is not None}
    if any(v.dtype in (DType.BOOL, DType.U8) for v in given.values()):
        raise call.refuse("the shape of the result of a mask depends on data")
    joint: Shape = ()
    for v in given.values():
        joint = _broadcast_shape(joint, v.shape)
    dims = sorted(given)
    front = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    at = points(call.shape)
    chosen, rest = at[front : front + len(joint)], iter((*at[:front], *at[front + len(joint) :]))
    element = []
    for d, n in enumerate(source.shape):
        if d in given:
            element.append(wrapped(_position(given[d], broadcast(given[d].shape, joint, chosen)), n))
        else:
            element.append(next(rest))
    return imp.emit(call, source.load(tuple(element)))


def _broadcast_shape(a: Shape, b: Shape) -> Shape:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


# --- attention ---


@lowers("scaled_dot_product_attention")
def attention(imp: Importer, call: Call) -> View:
    q, k, v = (call[x] for x in ("query", "key", "value"))
    if any(len(x.shape) != 4 for x in (q, k, v)):
        raise call.refuse(f"query of shape {list(q.shape)}; [batch, heads, tokens, width] is captured")
    batch, heads, tokens, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if tokens != 1:
        raise call.refuse(f"{tokens} query tokens", "only decode steps, of one query token, are captured")
    if call["dropout_p"]:
        raise call.refuse(f"dropout_p={call['dropout_p']}", "call model.eval()")
    if v.shape != k.shape or k.shape[3] != width or k.shape[0] != batch or v.dtype is not q.dtype:
        raise call.refuse(f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}")
    if groups != heads and not (call["enable_gqa"] and heads % groups == 0):
        raise call.refuse(f"{heads} query heads, {groups} key heads, enable_gqa={call['enable_gqa']}")
    if not q.dtype.is_float or q.dtype is DType.F64:
        raise call.refuse(f"attention in {q.dtype.value}")

    b, h, s, d = E.var("b", batch), E.var("h", heads), E.var("s", keys), E.var("d", width)
    stored_k, stored_v = imp.stored_part(k, call), imp.stored_part(v, call)
    groups = _shared_groups(stored_k, stored_v, heads, b, s, d) if groups == heads else groups
    share = k.shape[1] // groups  # key heads, as the tensor shows them, per head that is really stored
    g = E.var("g", groups)
    at = (_point(b), op("mul", _point(g), E.index(share)), _point(s), _point(d))
    keys_at, values_at = _stored_at(stored_k, at), _stored_at(stored_v, at)

    scale = call["scale"]
    name = imp.fresh(call.name)
    node = Attention(
        name=name, b=b, h=h, g=g, s=s, d=d,
        q=q.load((_point(b), _point(h), E.index(0), _point(d))),
        keys=keys_at[0], key_index=keys_at[1],
        values=values_at[0], value_index=values_at[1],
        scale=1 / math.sqrt(width) if scale is None else float(scale),
        out=name, store=(_point(b), _point(h), E.index(0), _point(d)),
        mask=_mask(call, b, h, s), origin=call.origin,
    )  # fmt: skip
    imp.declare(name, q.dtype, call.shape, call.origin)
    imp.nodes.append(node)
    return whole_view(Memory(name, q.dtype, call.shape, buffer=name))


def _stored_at(view: View, at: tuple[Expr, ...]) -> tuple[str, tuple[Expr, ...]]:
    found = view.resolve(at)
    assert found is not None
    return found


def _shared_groups(k: View, v: View, heads: int, b: E.Var, s: E.Var, d: E.Var) -> int:
    """The number of key heads that are really different: a repeated one (`repeat_kv`) reads the same elements
    whichever of its copies is asked for."""
    for groups in range(1, heads):
        if heads % groups:
            continue
        share = heads // groups
        g, j = E.var("g", groups), E.var("j", share)
        head = op("add", op("mul", _point(g), E.index(share)), j)
        at = (_point(b), head, _point(s), _point(d))
        if all(j not in e.free for x in (k, v) for e in _stored_at(x, at)[1]):
            return groups
    return heads


def _mask(call: Call, b: E.Var, h: E.Var, s: E.Var) -> Expr | None:
    mask: View | None = call["attn_mask"]
    if call["is_causal"]:
        if mask is not None:
            raise call.refuse("a mask together with is_causal")
        # torch aligns the triangle at the top left: the one query token sees key 0
        return op("eq", _point(s), E.index(0)) if s.size > 1 else None
    if mask is None:
        return None
    full = (b.size, h.size, 1, s.size)
    element = mask.load(broadcast(mask.shape, full, (_point(b), _point(h), E.index(0), _point(s))))
    return element if element.dtype is DType.BOOL else convert(element, DType.F32)
