"""Functions of one tensor: roots, exponentials, roundings, activations."""

from __future__ import annotations

import math

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.types import DType
from .registry import Call
from .rules import FLOAT, LONG, Kind, rule, scalar


def _unary(names: str, kind: Kind = FLOAT) -> None:
    for name in names.split():
        rule(name, "self", kind)(lambda call, x, name=name: op(name, x))


_unary("sqrt rsqrt exp exp2 log log2 log1p expm1 sin cos tanh sigmoid erf reciprocal")


@rule("special_expit", "self", FLOAT)
def _expit(call: Call, x: Expr) -> Expr:
    return op("sigmoid", x)


@rule("neg negative", "self")
def _neg(call: Call, x: Expr) -> Expr:
    return op("neg", x)


@rule("abs absolute", "self")
def _abs(call: Call, x: Expr) -> Expr:
    if x.dtype is DType.BOOL or not x.dtype.is_float and call.dtype is DType.U8:
        return x
    return op("abs", x)


@rule("floor ceil trunc fix", "self")
def _whole(call: Call, x: Expr) -> Expr:
    name = {"fix": "trunc"}.get(call.op.rstrip("_"), call.op.rstrip("_"))
    return op(name, x) if x.dtype.is_float else x


@rule("round", "self")
def _round(call: Call, x: Expr) -> Expr:
    if call.get("decimals"):
        raise call.refuse("rounding to decimals")
    return op("round", x) if x.dtype.is_float else x


@rule("sign sgn", "self")
def _sign(call: Call, x: Expr) -> Expr:
    if x.dtype is DType.BOOL:
        return x
    zero = scalar(0, x)
    negative = E.where(op("lt", x, zero), scalar(-1, x), zero)
    return E.where(op("gt", x, zero), scalar(1, x), negative)


@rule("square", "self", LONG)
def _square(call: Call, x: Expr) -> Expr:
    return op("mul", x, x)


@rule("relu", "self")
def _relu(call: Call, x: Expr) -> Expr:
    return op("relu", x) if x.dtype.is_float else op("max", x, scalar(0, x))


@rule("silu", "self", FLOAT)
def silu(call: Call, x: Expr) -> Expr:
    return op("div", x, op("add", scalar(1, x), op("exp", op("neg", x))))


@rule("gelu", "self", FLOAT)
def gelu(call: Call, x: Expr) -> Expr:
    half, one = scalar(0.5, x), scalar(1, x)
    if call.get("approximate") == "tanh":
        cube = op("mul", op("mul", x, x), x)
        inner = op("mul", scalar(math.sqrt(2 / math.pi), x), op("add", x, op("mul", scalar(0.044715, x), cube)))
        return op("mul", op("mul", half, x), op("add", one, op("tanh", inner)))
    return op("mul", op("mul", x, half), op("add", one, op("erf", op("mul", x, scalar(math.sqrt(0.5), x)))))


@rule("softplus", "self", FLOAT)
def _softplus(call: Call, x: Expr) -> Expr:
    beta, threshold = scalar(call["beta"], x), scalar(call["threshold"], x)
    scaled = op("mul", x, beta)
    return E.where(op("gt", scaled, threshold), x, op("div", op("log1p", op("exp", scaled)), beta))


@rule("leaky_relu", "self", FLOAT)
def _leaky_relu(call: Call, x: Expr) -> Expr:
    return E.where(op("gt", x, scalar(0, x)), x, op("mul", x, scalar(call["negative_slope"], x)))


@rule("elu", "self", FLOAT)
def _elu(call: Call, x: Expr) -> Expr:
    alpha, scale, rate = (scalar(call[k], x) for k in ("alpha", "scale", "input_scale"))
    negative = op("mul", op("mul", op("expm1", op("mul", x, rate)), alpha), scale)
    return E.where(op("le", x, scalar(0, x)), negative, op("mul", x, scale))


@rule("relu6", "self")
def _relu6(call: Call, x: Expr) -> Expr:
    return op("min", op("max", x, scalar(0, x)), scalar(6, x))


@rule("hardtanh", "self")
def _hardtanh(call: Call, x: Expr) -> Expr:
    return op("min", op("max", x, scalar(call["min_val"], x)), scalar(call["max_val"], x))


@rule("hardsigmoid hardswish", "self", FLOAT)
def _hardsigmoid(call: Call, x: Expr) -> Expr:
    gate = op("min", op("max", op("add", x, scalar(3, x)), scalar(0, x)), scalar(6, x))
    if call.op.startswith("hardswish"):
        return op("div", op("mul", x, gate), scalar(6, x))
    return op("div", gate, scalar(6, x))


@rule("mish", "self", FLOAT)
def _mish(call: Call, x: Expr) -> Expr:
    return op("mul", x, op("tanh", op("log1p", op("exp", x))))


@rule("log_sigmoid", "self", FLOAT)
def _log_sigmoid(call: Call, x: Expr) -> Expr:
    return op("sub", op("min", x, scalar(0, x)), op("log1p", op("exp", op("neg", op("abs", x)))))
