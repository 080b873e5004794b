"""Comparisons, logic, and choices between two values."""

from __future__ import annotations

import math

import torch

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.types import DType
from ..ops.evaluate import TORCH_DTYPE
from .registry import Call
from .rules import TRUTH, rule, scalar
from .values import View, broadcast, convert, points, wide


def _comparison(names: str, name: str) -> None:
    @rule(names, "self other", TRUTH)
    def body(call: Call, x: Expr, y: Expr) -> Expr:
        if x.dtype is DType.BOOL and name not in ("eq", "ne"):
            x, y = E.cast(x, DType.I32), E.cast(y, DType.I32)
        return op(name, x, y)


for _names, _name in (
    ("eq", "eq"), ("ne not_equal", "ne"), ("lt less", "lt"), ("le less_equal", "le"), ("gt greater", "gt"),
    ("ge greater_equal", "ge"),
):  # fmt: skip
    _comparison(_names, _name)


@rule("logical_not", "self", TRUTH)
def _logical_not(call: Call, x: Expr) -> Expr:
    return op("not", E.cast(x, DType.BOOL))


@rule("logical_and", "self other", TRUTH)
def _logical_and(call: Call, x: Expr, y: Expr) -> Expr:
    return op("and", E.cast(x, DType.BOOL), E.cast(y, DType.BOOL))


@rule("logical_or", "self other", TRUTH)
def _logical_or(call: Call, x: Expr, y: Expr) -> Expr:
    return op("or", E.cast(x, DType.BOOL), E.cast(y, DType.BOOL))


@rule("logical_xor", "self other", TRUTH)
def _logical_xor(call: Call, x: Expr, y: Expr) -> Expr:
    return op("ne", E.cast(x, DType.BOOL), E.cast(y, DType.BOOL))


def _only_bool(call: Call, x: Expr) -> None:
    if x.dtype is not DType.BOOL:
        raise call.refuse("bitwise arithmetic on integers")


@rule("bitwise_not", "self")
def _bitwise_not(call: Call, x: Expr) -> Expr:
    return op("not", x) if x.dtype is DType.BOOL else op("sub", scalar(-1, x), x)


@rule("bitwise_and __and__", "self other")
def _bitwise_and(call: Call, x: Expr, y: Expr) -> Expr:
    _only_bool(call, x)
    return op("and", x, y)


@rule("bitwise_or __or__", "self other")
def _bitwise_or(call: Call, x: Expr, y: Expr) -> Expr:
    _only_bool(call, x)
    return op("or", x, y)


@rule("bitwise_xor __xor__", "self other")
def _bitwise_xor(call: Call, x: Expr, y: Expr) -> Expr:
    _only_bool(call, x)
    return op("ne", x, y)


@rule("isnan", "self", TRUTH)
def _isnan(call: Call, x: Expr) -> Expr:
    return op("isnan", x) if x.dtype.is_float else E.const(False, DType.BOOL)


@rule("isinf", "self", TRUTH)
def _isinf(call: Call, x: Expr) -> Expr:
    return op("eq", op("abs", x), scalar(math.inf, x)) if x.dtype.is_float else E.const(False, DType.BOOL)


@rule("isfinite", "self", TRUTH)
def _isfinite(call: Call, x: Expr) -> Expr:
    # an infinity or a NaN minus itself is a NaN
    return op("eq", op("sub", x, x), scalar(0, x)) if x.dtype.is_float else E.const(True, DType.BOOL)


def _truth(call: Call, name: str, shape: tuple[int, ...]) -> Expr:
    """A condition argument, broadcast, as a bool."""
    view = call[name]
    return E.cast(convert(view.load(broadcast(view.shape, shape, points(shape))), wide(view.dtype)), DType.BOOL)


@rule("where", "self other")
def _where(call: Call, x: Expr, y: Expr) -> Expr:
    return E.where(_truth(call, "condition", call.shape), x, y)


@rule("masked_fill", "self")
def _masked_fill(call: Call, x: Expr) -> Expr:
    # the value takes the tensor's type, and does not widen it: large integers would lose digits
    value, kept = call["value"], call["self"].dtype
    if isinstance(value, View):
        filled = convert(convert(value.load(()), kept), x.dtype)
    else:
        filled = scalar(torch.tensor(value, dtype=TORCH_DTYPE[kept]).item(), x)
    return E.where(_truth(call, "mask", call.shape), filled, x)
