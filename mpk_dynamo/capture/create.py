"""Operators that make a tensor from numbers alone. They stay expressions and cost no node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..ir import expr as E
from ..ir.expr import Expr
from ..ir.types import DType
from .registry import Call, lowers
from .values import View, constant, convert, points, wide

if TYPE_CHECKING:
    from .importer import Importer


def fill_value(value: Any, dtype: DType) -> Expr:
    """One value, a Python number or a tensor of one element, in `dtype`."""
    if isinstance(value, View):
        return convert(value.load(tuple(E.index(0) for _ in value.shape)), dtype)
    return convert(constant(value, wide(dtype)), dtype)


def filled(imp: Importer, call: Call, value: Any) -> View:
    """A tensor of the call's shape and dtype with one value."""
    return imp.emit(call, fill_value(value, call.dtype))


@lowers("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_permuted", "empty_strided")
def zeros(imp: Importer, call: Call) -> View:
    # the elements of an `empty` tensor are arbitrary, so zero is as good as any
    return filled(imp, call, 0)


@lowers("ones", "ones_like", "new_ones")
def ones(imp: Importer, call: Call) -> View:
    return filled(imp, call, 1)


@lowers("full", "full_like", "new_full")
def full(imp: Importer, call: Call) -> View:
    return filled(imp, call, call["fill_value"])


@lowers("scalar_tensor")
def scalar_tensor(imp: Importer, call: Call) -> View:
    return filled(imp, call, call["s"])


@lowers("arange")
def arange(imp: Importer, call: Call) -> View:
    start, step = call.get("start", 0), call.get("step", 1)
    at = points(call.shape)[0]
    if all(isinstance(x, int) for x in (start, step)):
        exact: Expr = E.op("add", E.op("mul", at, E.index(step)), E.index(start))
        return imp.emit(call, convert(exact, call.dtype))
    kind = DType.F64 if call.dtype is DType.F64 else DType.F32
    scaled = E.op("mul", E.cast(at, kind), constant(step, kind))
    return imp.emit(call, convert(E.op("add", scaled, constant(start, kind)), call.dtype))


@lowers("tril", "triu", "tril_", "triu_")
def triangle(imp: Importer, call: Call) -> View:
    if call.op.endswith("_"):
        raise call.refuse("in place")
    source: View = call["self"]
    at = points(call.shape)
    keep = E.op(
        "le" if call.op == "tril" else "ge", E.op("sub", at[-1], at[-2]), E.index(call["diagonal"])
    )
    zero = convert(constant(0, wide(call.dtype)), call.dtype)
    return imp.emit(call, E.where(keep, source.load(at), zero))
