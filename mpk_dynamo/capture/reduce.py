"""Reductions over dimensions. Each is its own node; what needs several reductions becomes several nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.types import DType
from .registry import Call, lowers
from .values import DTYPES, Index, Shape, View, broadcast, constant, convert, point, points, wide
from .views import unflatten

if TYPE_CHECKING:
    from .importer import Importer


@dataclass(frozen=True)
class Rows:
    """The dimensions `dims` of a tensor, to be reduced: `shape` is the result's with them kept at size 1, `at` the
    point of the tensor that a result point and the variables `over` name: one that counts through all of them, or
    none for a tensor without dimensions."""

    dims: tuple[int, ...]
    shape: Shape
    over: tuple[E.Var, ...]
    at: Index

    @property
    def count(self) -> int:
        total = 1
        for v in self.over:
            total *= v.size
        return total

    def apply(self, name: str, body: Expr) -> Expr:
        for v in reversed(self.over):
            body = E.reduce(name, v, body)
        return body


def rows(shape: Shape, dims: Sequence[int] | int | None) -> Rows:
    rank = len(shape)
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    chosen = tuple(sorted(d % rank for d in dims)) if rank else ()
    sizes = tuple(shape[d] for d in chosen)
    over = (E.var("r0", math.prod(sizes)),) if chosen else ()
    kept = tuple(1 if d in chosen else n for d, n in enumerate(shape))
    at = list(points(kept))
    for v in over:
        for d, e in zip(chosen, unflatten(point(v), sizes)):
            at[d] = e
    return Rows(chosen, kept, over, tuple(at))


def _finish(imp: Importer, call: Call, r: Rows, body: Expr, shape: Shape | None = None) -> View:
    """Emit body, which is over the variables of `r.shape`, as the call's result, with or without the kept dims."""
    shape = call.shape if shape is None else shape
    if shape != r.shape:
        names = iter(points(shape))
        moved = {
            E.var(f"i{d}", n): (E.index(0) if d in r.dims else next(names)) for d, n in enumerate(r.shape)
        }
        body = E.substitute(body, moved)
    return imp.emit(call, body, shape=shape)


def _input(call: Call, r: Rows, dtype: DType) -> Expr:
    """The element that is reduced, converted by way of `dtype` to the type of accumulation."""
    return convert(convert(call["self"].load(r.at), dtype), wide(dtype))


@lowers("sum", "mean")
def sum_(imp: Importer, call: Call) -> View:
    r = rows(call["self"].shape, call.get("dim"))
    body = r.apply("sum", _input(call, r, call.dtype))
    if call.op == "mean":
        body = op("div", body, constant(r.count, body.dtype))
    return _finish(imp, call, r, convert(body, call.dtype))


@lowers("amax", "amin")
def extreme(imp: Importer, call: Call) -> View:
    r = rows(call["self"].shape, call["dim"])
    return _finish(imp, call, r, convert(r.apply(call.op[1:], _input(call, r, call.dtype)), call.dtype))


@lowers("max", "min")
def extreme_values(imp: Importer, call: Call) -> View | tuple[View, object]:
    if "other" in call.arguments:
        from .pointwise import lower

        return lower(imp, Call(call.node, f"{call.op}.other", call.arguments))
    source: View = call["self"]
    r = rows(source.shape, call.get("dim"))
    body = convert(r.apply(call.op, _input(call, r, source.dtype)), source.dtype)
    if "dim" not in call.arguments:
        return _finish(imp, call, r, body)
    if any(user.args[1] == 1 and user.users for user in call.node.users):
        raise call.refuse("positions of the extreme values are used")
    return _finish(imp, call, r, body, tuple(call.node.meta["val"][0].shape)), None


@lowers("any", "all")
def truth(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    r = rows(source.shape, call.get("dim"))
    element = E.cast(convert(source.load(r.at), wide(source.dtype)), DType.BOOL)
    body = r.apply("max" if call.op == "any" else "min", E.cast(element, DType.I32))
    return _finish(imp, call, r, convert(E.cast(body, DType.BOOL), call.dtype))


@lowers("cumsum")
def cumulative_sum(imp: Importer, call: Call) -> View:
    # a masked sum per element: quadratic, for the short rows of position arithmetic
    source: View = call["self"]
    r = rows(source.shape, call["dim"])
    if not r.over:
        return imp.emit(call, convert(source.load(()), call.dtype))
    if r.count > 4096:
        raise call.refuse(f"a running sum over {r.count} elements")
    last = points(source.shape)[r.dims[0]]
    element = convert(convert(source.load(_unreduced(r, source.shape)), call.dtype), wide(call.dtype))
    body = E.where(op("le", r.over[0], last), element, constant(0, element.dtype))
    return imp.emit(call, convert(r.apply("sum", body), call.dtype))


def _unreduced(r: Rows, shape: Shape) -> Index:
    """r.at for a result of the full shape: the other dimensions keep their variables."""
    at = list(points(shape))
    for v, d in zip(r.over, r.dims):
        at[d] = v if v.size != 1 else E.index(0)
    return tuple(at)


def _per_row(imp: Importer, call: Call, suffix: str, r: Rows, body: Expr) -> View:
    return imp.emit(call, body, shape=r.shape, suffix=suffix)


def _at_row(view: View, shape: Shape) -> Expr:
    return view.load(broadcast(view.shape, shape, points(shape)))


@dataclass(frozen=True)
class Softmax:
    """What a softmax was taken of: its element over the variables of `shape`, and the dimension."""

    element: Expr
    shape: Shape
    dim: int


@lowers("softmax", "_softmax", "log_softmax", "_log_softmax", "special_softmax", "_safe_softmax")
def softmax(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    if not call.dtype.is_float:
        raise call.refuse("of integers")
    r = rows(source.shape, call["dim"])
    calculated = wide(call.dtype)

    def element(at: Index) -> Expr:
        return convert(convert(source.load(at), call.dtype) if call.get("dtype") else source.load(at), calculated)

    high = _per_row(imp, call, ".max", r, r.apply("max", element(r.at)))
    total = _per_row(
        imp, call, ".sum", r, r.apply("sum", op("exp", op("sub", element(r.at), _at_row(high, r.shape))))
    )
    shape = call.shape
    centred = op("sub", element(points(shape)), _at_row(high, shape))
    if "log" in call.op:
        body = op("sub", centred, op("log", _at_row(total, shape)))
    else:
        body = op("div", op("exp", centred), _at_row(total, shape))
        if call.op == "_safe_softmax":
            dead = op("eq", _at_row(high, shape), constant(float("-inf"), calculated))
            body = E.where(dead, constant(0, calculated), body)
    out = imp.emit(call, convert(body, call.dtype))
    if "log" not in call.op and len(r.over) == 1:
        imp.softmaxes[out.memory.name] = Softmax(element(points(shape)), shape, r.dims[0])
    return out


@lowers("logsumexp")
def logsumexp(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    r = rows(source.shape, call["dim"])
    element = convert(source.load(r.at), wide(call.dtype))
    high = _per_row(imp, call, ".max", r, r.apply("max", element))
    body = r.apply("sum", op("exp", op("sub", element, _at_row(high, r.shape))))
    return _finish(imp, call, r, convert(op("add", op("log", body), _at_row(high, r.shape)), call.dtype))


def _moments(imp: Importer, call: Call, source: View, r: Rows, correction: float) -> tuple[View, Expr]:
    """Mean of each row, and the variance over the variables of r.shape, in the wide type."""
    element = convert(source.load(r.at), wide(source.dtype))
    mean = _per_row(imp, call, ".mean", r, op("div", r.apply("sum", element), constant(r.count, element.dtype)))
    centred = op("sub", element, _at_row(mean, r.shape))
    count = constant(max(r.count - correction, 0), element.dtype)
    return mean, op("div", r.apply("sum", op("mul", centred, centred)), count)


@lowers("var", "std")
def variance(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    if not source.dtype.is_float:
        raise call.refuse("of integers")
    correction = call.get("correction", 1 if call.get("unbiased", True) else 0)
    r = rows(source.shape, call.get("dim"))
    _, body = _moments(imp, call, source, r, 1 if correction is None else correction)
    return _finish(imp, call, r, convert(op("sqrt", body) if call.op == "std" else body, call.dtype))


@lowers("layer_norm", "native_layer_norm")
def layer_norm(imp: Importer, call: Call) -> View | tuple[View, None, None]:
    source: View = call["input"]
    r = rows(source.shape, range(len(source.shape) - len(call["normalized_shape"]), len(source.shape)))
    kind, shape = wide(source.dtype), source.shape
    mean, spread = _moments(imp, call, source, r, 0)
    scale = _per_row(imp, call, ".rstd", r, op("rsqrt", op("add", spread, constant(call["eps"], kind))))
    body = op("sub", convert(source.load(points(shape)), kind), _at_row(mean, shape))
    body = _affine(op("mul", body, _at_row(scale, shape)), call, shape, kind)
    out = imp.emit(call, convert(body, source.dtype), shape=shape)
    if call.op == "layer_norm":
        return out
    if any(user.args[1] != 0 and user.users for user in call.node.users):
        raise call.refuse("its statistics are used")
    return out, None, None


@lowers("rms_norm", "_fused_rms_norm")
def rms_norm(imp: Importer, call: Call) -> View | tuple[View, None]:
    import torch

    source: View = call["input"]
    r = rows(source.shape, range(len(source.shape) - len(call["normalized_shape"]), len(source.shape)))
    kind, shape = wide(source.dtype), source.shape
    eps = call.get("eps")
    if eps is None:
        eps = torch.finfo(next(t for t, d in DTYPES.items() if d is kind)).eps
    element = convert(source.load(r.at), kind)
    mean = op("div", r.apply("sum", op("mul", element, element)), constant(r.count, kind))
    scale = _per_row(imp, call, ".rstd", r, op("rsqrt", op("add", mean, constant(eps, kind))))
    body = _affine(op("mul", convert(source.load(points(shape)), kind), _at_row(scale, shape)), call, shape, kind)
    out = imp.emit(call, convert(body, source.dtype), shape=shape)
    return out if call.op == "rms_norm" else (out, None)


def _affine(body: Expr, call: Call, shape: Shape, kind: DType) -> Expr:
    for name, how in (("weight", "mul"), ("bias", "add")):
        view = call.get(name)
        if view is not None:
            body = op(how, body, convert(view.load(broadcast(view.shape, shape, points(shape))), kind))
    return body
