"""Arithmetic of two and three tensors: sums, products, quotients, powers, extremes."""

from __future__ import annotations

import math

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.types import DType
from .registry import Call
from .rules import FLOAT, LONG, RULES, rule, scalar
from .values import convert


def _scaled(call: Call, x: Expr) -> Expr:
    alpha = call.get("alpha", 1)
    return x if alpha == 1 else op("mul", x, scalar(alpha, x))


@rule("add", "self other")
def _add(call: Call, x: Expr, y: Expr) -> Expr:
    return op("or", x, y) if x.dtype is DType.BOOL else op("add", x, _scaled(call, y))


@rule("sub subtract", "self other")
def _sub(call: Call, x: Expr, y: Expr) -> Expr:
    return op("sub", x, _scaled(call, y))


@rule("rsub", "self other")
def _rsub(call: Call, x: Expr, y: Expr) -> Expr:
    return op("sub", y, _scaled(call, x))


@rule("mul multiply", "self other")
def _mul(call: Call, x: Expr, y: Expr) -> Expr:
    return op("and" if x.dtype is DType.BOOL else "mul", x, y)


@rule("true_divide", "self other", FLOAT)
def _true_divide(call: Call, x: Expr, y: Expr) -> Expr:
    return op("div", x, y)


def _floor_divide(x: Expr, y: Expr) -> Expr:
    if not x.dtype.is_float:
        return op("floordiv", x, y)
    # x - remainder is a multiple of y, so the quotient is whole up to rounding
    quotient = op("round", op("div", op("sub", x, op("mod", x, y)), y))
    zero, infinity, plain = scalar(0, x), scalar(math.inf, x), op("div", x, y)
    finite = op("lt", op("abs", x), infinity)
    overflows = op("or", op("eq", y, zero), op("and", finite, op("eq", op("abs", plain), infinity)))
    same_sign = op("eq", op("lt", x, zero), op("lt", y, zero))
    below = E.where(op("or", same_sign, op("eq", x, zero)), zero, scalar(-1, x))
    tiny = op("and", finite, op("eq", op("abs", y), infinity))
    return E.where(overflows, plain, E.where(tiny, below, quotient))


@rule("div divide", "self other", FLOAT)
def _div(call: Call, x: Expr, y: Expr) -> Expr:
    return op("div", x, y)


@rule("div.rounding", "self other")
def _div_rounding(call: Call, x: Expr, y: Expr) -> Expr:
    if call["rounding_mode"] == "floor":
        return _floor_divide(x, y)
    if x.dtype.is_float:
        return op("trunc", op("div", x, y))
    magnitude = op("floordiv", op("abs", x), op("abs", y))
    zero = scalar(0, x)
    return E.where(op("eq", op("lt", x, zero), op("lt", y, zero)), magnitude, op("neg", magnitude))


@rule("floor_divide", "self other")
def _floor_div(call: Call, x: Expr, y: Expr) -> Expr:
    return _floor_divide(x, y)


@rule("remainder", "self other")
def _remainder(call: Call, x: Expr, y: Expr) -> Expr:
    return op("mod", x, y)


def _rounded(call: Call, x: Expr) -> Expr:
    """x rounded to the result's type, where eager rounds between the steps of one operator."""
    return convert(convert(x, call.dtype), x.dtype)


@rule("pow", "self exponent", LONG)
def _pow(call: Call, x: Expr, y: Expr) -> Expr:
    exponent = call["exponent"]
    if not isinstance(exponent, (int, float)) or isinstance(exponent, bool):
        if x.dtype.is_float:
            return op("pow", x, y)
        raise call.refuse("an integer power by a tensor")
    if exponent == int(exponent) and 0 <= exponent <= 3 or not x.dtype.is_float:
        if exponent < 0 or exponent > 16:
            raise call.refuse(f"integer power {exponent}")
        out = scalar(1, x) if exponent == 0 else x
        for _ in range(int(exponent) - 1):
            out = op("mul", _rounded(call, out), x)
        return out
    if exponent == 0.5:
        return op("sqrt", x)
    if exponent == -0.5:
        return op("rsqrt", x)
    if exponent == -1:
        return op("reciprocal", x)
    if exponent == -2:
        return op("reciprocal", _rounded(call, op("mul", x, x)))
    return op("pow", x, y)


@rule("maximum", "self other")
def _maximum(call: Call, x: Expr, y: Expr) -> Expr:
    return op("or" if x.dtype is DType.BOOL else "max", x, y)


@rule("minimum", "self other")
def _minimum(call: Call, x: Expr, y: Expr) -> Expr:
    return op("and" if x.dtype is DType.BOOL else "min", x, y)


@rule("fmax", "self other")
def _fmax(call: Call, x: Expr, y: Expr) -> Expr:
    return _unless_nan(x, y, _maximum(call, x, y))


@rule("fmin", "self other")
def _fmin(call: Call, x: Expr, y: Expr) -> Expr:
    return _unless_nan(x, y, _minimum(call, x, y))


def _unless_nan(x: Expr, y: Expr, result: Expr) -> Expr:
    """The result where both are numbers, else the one that is."""
    if not x.dtype.is_float:
        return result
    return E.where(op("isnan", x), y, E.where(op("isnan", y), x, result))


RULES["max.other"], RULES["min.other"] = RULES["maximum"], RULES["minimum"]


@rule("clamp clip", "self min max")
def _clamp(call: Call, x: Expr, low: Expr | None, high: Expr | None) -> Expr:
    if low is not None:
        x = op("max", x, low)
    return x if high is None else op("min", x, high)


@rule("clamp_min", "self min")
def _clamp_min(call: Call, x: Expr, low: Expr) -> Expr:
    return op("max", x, low)


@rule("clamp_max", "self max")
def _clamp_max(call: Call, x: Expr, high: Expr) -> Expr:
    return op("min", x, high)


@rule("addcmul", "self tensor1 tensor2")
def _addcmul(call: Call, x: Expr, a: Expr, b: Expr) -> Expr:
    product = op("mul", a, b) if call["value"] == 1 else op("mul", op("mul", scalar(call["value"], x), a), b)
    return op("add", x, product)


@rule("lerp", "self end weight")
def _lerp(call: Call, x: Expr, end: Expr, weight: Expr) -> Expr:
    span = op("sub", end, x)
    near = op("add", x, op("mul", weight, span))
    far = op("sub", end, op("mul", span, op("sub", scalar(1, x), weight)))
    return E.where(op("lt", op("abs", weight), scalar(0.5, x)), near, far)
