"""Matrix products and gathers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.graph import Linear, LinearPart
from ..ir.types import DType
from .contraction import contraction
from .mutate import wrapped
from .registry import Call, lowers
from .values import Memory, Shape, View, broadcast, convert, point, points, wide
from .values import whole as whole_view
from .views import unflatten

if TYPE_CHECKING:
    from .importer import Importer


MAX_TOKENS = 16
"""Rows that the body on tensor cores holds; more is a prefill's work."""
COLUMN_DEPTH = 1 << 15
"""Bytes of a row of x up to which a transposed weight is streamed: a worker keeps it in shared memory."""


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
    return contraction(imp, call, left, right)


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
    streamed = is_weight(imp, weight) and imp.buffers[weight.memory.buffer].strides[-1] == 1
    transposed = streamed and not weight.whole
    if transposed:  # in whole 16-byte vectors, and with room for a row of x
        streamed = not rows * x.dtype.itemsize % 16 and not depth * x.dtype.itemsize % 16
        streamed = streamed and depth * x.dtype.itemsize <= COLUMN_DEPTH
    if x.dtype is DType.F64 or not streamed:
        return _reduced(imp, call, x, weight, bias)
    if math.prod(lead) > MAX_TOKENS:
        raise call.refuse(f"a product of {math.prod(lead)} rows", f"up to {MAX_TOKENS} rows go to the kernel at a time")
    t, k, n = E.var("t", math.prod(lead)), E.var("k", depth), E.var("n", rows)
    token = tuple(unflatten(point(t), lead))
    result: Expr = E.acc(0)
    if bias is not None:
        added = bias.load(broadcast(bias.shape, (*lead, rows), (*token, point(n))))
        result = op("add", result, convert(added, DType.F32))
    name = imp.fresh(call.name)
    imp.declare(name, dtype, out, call.origin)
    part = LinearPart((weight.memory.buffer,), rows, convert(result, dtype), name, (*token, point(n)), call.origin)
    imp.nodes.append(Linear(name, t, k, x.load((*token, point(k))), (part,), call.origin, transposed))
    return whole_view(Memory(name, dtype, out, buffer=name))


def _is_cheap(lead: Shape, rows: int, depth: int) -> bool:
    return math.prod(lead) * rows * depth <= 1 << 20


def _reduced(imp: Importer, call: Call, x: View, weight: View, bias: View | None) -> View:
    """The product as a row reduction: for weights of layouts that no task body streams, and for f64."""
    depth, kind = x.shape[-1], wide(call.dtype)
    at, r = points(call.shape), E.var("r0", depth)
    element = op("mul", convert(x.load((*at[:-1], point(r))), kind), convert(weight.load((at[-1], point(r))), kind))
    body = E.reduce("sum", r, element)
    if bias is not None:
        body = op("add", body, convert(bias.load(broadcast(bias.shape, call.shape, at)), kind))
    imp.note(f"{call.origin}: {call.op} is a plain reduction, slower than a linear: its weight is of another layout")
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
