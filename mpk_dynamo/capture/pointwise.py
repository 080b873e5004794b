"""The table of pointwise operators: ATen name -> scalar expression.

Operands are converted to torch's common type, computed in its wide type (f32 for bf16 and f16) and rounded once to
the type of the result, as eager does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind
from torch._prims_common import elementwise_dtypes

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.types import DType
from .registry import LOWERINGS, Call, lowers
from .values import DTYPES, View, broadcast, constant, convert, points, wide

if TYPE_CHECKING:
    from .importer import Importer

SAME, FLOAT, TRUTH, LONG = Kind.DEFAULT, Kind.INT_TO_FLOAT, Kind.ALWAYS_BOOL, Kind.BOOL_TO_LONG


@dataclass(frozen=True)
class Rule:
    """body(call, *operands) over the arguments named `operands`, promoted together by `kind`. An operand that is
    None stays None."""

    operands: tuple[str, ...]
    kind: Kind
    body: Callable[..., Expr]


RULES: dict[str, Rule] = {}


def rule(names: str, operands: str, kind: Kind = SAME) -> Callable[[Callable[..., Expr]], Callable[..., Expr]]:
    def register(body: Callable[..., Expr]) -> Callable[..., Expr]:
        for name in names.split():
            RULES[name] = Rule(tuple(operands.split()), kind, body)
        return body

    return register


def scalar(value: float, like: Expr) -> Expr:
    """A number of the type of `like`."""
    return constant(value, like.dtype)


# --- how a rule is applied ---


@lru_cache(maxsize=4096)
def _promoted(kind: Kind, signature: tuple[Any, ...]) -> torch.dtype:
    """Common type of operands given as (dtype, is 0-d) for tensors and a Python type for numbers."""
    numbers = {bool: True, int: 1, float: 1.0}
    fakes = [numbers[s] if isinstance(s, type) else torch.empty(() if s[1] else (1,), dtype=s[0]) for s in signature]
    return elementwise_dtypes(*fakes, type_promotion_kind=SAME if kind is TRUTH else kind)[1]


TORCH = {ours: theirs for theirs, ours in DTYPES.items()}


def evaluated(call: Call, shape: tuple[int, ...], arguments: dict[str, Any] | None = None) -> Expr:
    """The element of a pointwise call at the variables of `shape`, in its wide type, not yet rounded."""
    name = call.op if call.op in RULES else call.op.rstrip("_")
    found = RULES[name]
    values = [(arguments or call.arguments).get(x) for x in found.operands]
    signature = tuple(
        (TORCH[v.dtype], not v.shape) if isinstance(v, View) else type(v) for v in values if v is not None
    )
    if any(isinstance(s, type) and s not in (bool, int, float) for s in signature):
        raise call.refuse(f"operands {[getattr(s, '__name__', s) for s in signature]}")
    common = DTYPES.get(_promoted(found.kind, signature))
    if common is None:
        raise call.refuse("complex arithmetic")
    at = points(shape)
    operands: list[Expr | None] = []
    for v in values:
        if isinstance(v, View):
            element = convert(v.load(broadcast(v.shape, shape, at)), common)
            operands.append(convert(element, wide(common)))
        elif v is not None:
            # comparisons look at numbers rounded to the tensor's type, arithmetic keeps them in the wide type
            exact = torch.tensor(v, dtype=TORCH[common]).item() if found.kind is TRUTH else v
            operands.append(constant(exact, wide(common)))
        else:
            operands.append(None)
    return found.body(call, *operands)


def lower(imp: "Importer", call: Call) -> View:
    """Import a pointwise call whose result is a new tensor."""
    kept = _unchanged(call)
    if kept is not None:
        return imp.copy(call, kept)
    return imp.emit(call, convert(evaluated(call, call.shape), call.dtype))


def _unchanged(call: Call) -> View | None:
    """The operand that the call only copies: x * 1, x / 1, integer x + 0, x ** 1."""
    if call.op not in ("mul", "div", "add", "sub", "pow") or call.get("rounding_mode") is not None:
        return None
    x, y = call.get("self"), call.get("exponent" if call.op == "pow" else "other")
    if not isinstance(x, View) or x.dtype is not call.dtype or x.shape != call.shape or isinstance(y, (View, bool)):
        return None
    neutral = 0 if call.op in ("add", "sub") else 1
    return x if y == neutral and (neutral or not x.dtype.is_float) else None


# --- the table ---


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
        filled = scalar(torch.tensor(value, dtype=TORCH[kept]).item(), x)
    return E.where(_truth(call, "mask", call.shape), filled, x)


def _overloaded(imp: "Importer", call: Call) -> View:
    """`div` with a rounding mode is another rule than without."""
    if call.get("rounding_mode") is not None:
        call = Call(call.node, "div.rounding", call.arguments)
    return lower(imp, call)


@lowers("to", "_to_copy", "type_as", "float", "half", "bfloat16", "to_dense")
def _to(imp: "Importer", call: Call) -> View:
    source: View = call.get("self", call.get("input"))
    if call.value.device != call.fake(0).device and source.memory.body is None:
        raise call.refuse(f"moves a tensor from {call.fake(0).device} to {call.value.device}")
    if call.dtype is source.dtype:
        return source if call.aliases else imp.copy(call, source)
    return imp.emit(call, convert(source.load(points(source.shape)), call.dtype))


for _key in RULES:
    if "." not in _key:
        LOWERINGS[_key] = _overloaded if _key in ("div", "divide") else lower


@lru_cache(maxsize=1)
def names() -> frozenset[str]:
    """Every operator of the table."""
    return frozenset(RULES)
