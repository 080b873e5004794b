"""Is an index expression inside [0, size) whenever it is evaluated?

First by interval arithmetic. Where that is too coarse, because a `where` guards the access (a concatenation reads
`a[i]` for i < 4, else `b[i - 4]`) or because an index mixes // and %, exactly: every value of the variables is
tried, with numpy, under the guards that do not depend on data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..ir.expr import Const, Expr, Load, Op, Reduce, Var, loads
from ..ir.types import DType

Guard = tuple[Expr, bool]
"""A condition, and whether it holds or fails where the access stands."""

POINTS_AT_ONCE = 1 << 20
MOST_POINTS = 1 << 27

_INTEGERS = (DType.I64, DType.I32)


def interval(e: Expr) -> tuple[int, int] | None:
    """Inclusive bounds of an integer expression over the whole ranges of its variables; None: depends on data, or on
    an operator that is not followed."""
    if isinstance(e, Const):
        return (int(e.value), int(e.value)) if e.dtype in _INTEGERS else None
    if isinstance(e, Var):
        return 0, e.size - 1
    if not isinstance(e, Op) or e.dtype not in _INTEGERS:
        return None
    operands = e.children[1:] if e.name == "where" else e.children
    if e.name == "cast" and operands[0].dtype is DType.BOOL:
        return 0, 1
    known = [interval(c) for c in operands]
    if any(k is None for k in known):
        return None
    return _combine(e.name, known)  # type: ignore[arg-type]


def _combine(name: str, sides: list[tuple[int, int]]) -> tuple[int, int] | None:
    (a, b), (c, d) = sides[0], sides[-1]
    if name == "cast":
        return a, b
    if name == "where":
        return min(a, c), max(b, d)
    if name == "neg":
        return -b, -a
    if name == "abs":
        return (0 if a <= 0 <= b else min(abs(a), abs(b))), max(abs(a), abs(b))
    if name == "add":
        return a + c, b + d
    if name == "sub":
        return a - d, b - c
    if name == "mul":
        corners = (a * c, a * d, b * c, b * d)
        return min(corners), max(corners)
    if name == "min":
        return min(a, c), min(b, d)
    if name == "max":
        return max(a, c), max(b, d)
    if name == "floordiv" and c > 0:
        corners = (a // c, a // d, b // c, b // d)
        return min(corners), max(corners)
    if name == "mod" and c > 0:
        if c == d and a // c == b // c:
            return a % c, b % c
        return 0, d - 1
    return None


def outside(e: Expr, size: int, guards: frozenset[Guard]) -> tuple[dict[str, int], int] | str | None:
    """None when `e` stays in [0, size) or depends on data. Otherwise values of the variables with the index they
    give, or a text that says why nothing could be proven."""
    bounds = interval(e)
    if bounds is not None and 0 <= bounds[0] and bounds[1] < size:
        return None
    if loads(e):
        return None
    conditions = [g for guard in guards for g in _known(guard)]
    variables = sorted({v for x in (e, *(c for c, _ in conditions)) for v in x.free}, key=lambda v: (-v.size, v.name))
    total = math.prod(v.size for v in variables)
    if total > MOST_POINTS:
        return f"bounds {bounds}, too many values ({total}) to try them all"
    for point in _grid(variables):
        try:
            value, reached = _value(e, point), np.asarray(True)
            for condition, holds in conditions:
                reached = reached & (_value(condition, point) == holds)
        except NotImplementedError as error:
            return f"bounds {bounds}; {error} in an index is not followed"
        bad = ((value < 0) | (value >= size)) & reached
        if bad.any():
            at = np.unravel_index(int(np.argmax(bad)), bad.shape)
            every = {v.name: int(np.broadcast_to(x, bad.shape)[at]) for v, x in point.items()}
            return every, int(np.broadcast_to(value, bad.shape)[at])
    return None


def _known(guard: Guard) -> Iterator[Guard]:
    """Parts of a guard that all hold and do not depend on data. Leaving out others tries more points, not fewer."""
    condition, holds = guard
    if isinstance(condition, Op) and condition.name == "not":
        yield from _known((condition.children[0], not holds))
    elif isinstance(condition, Op) and condition.name == ("and" if holds else "or"):
        for c in condition.children:
            yield from _known((c, holds))
    elif _followed(condition):
        yield guard


def _followed(e: Expr) -> bool:
    return isinstance(e, (Const, Var)) or (isinstance(e, Op) and all(_followed(c) for c in e.children))


def _grid(variables: list[Var]) -> Iterator[dict[Var, np.ndarray]]:
    """Every combination of values, broadcast against each other, in pieces along the largest variable."""
    if not variables:
        yield {}
        return
    rank = len(variables)
    rest = math.prod(v.size for v in variables[1:])
    step = max(1, POINTS_AT_ONCE // max(rest, 1))
    fixed = {
        v: np.arange(v.size).reshape([-1 if d == k else 1 for d in range(rank)]) for k, v in enumerate(variables) if k
    }
    for start in range(0, variables[0].size, step):
        first = np.arange(start, min(start + step, variables[0].size)).reshape([-1] + [1] * (rank - 1))
        yield {variables[0]: first, **fixed}


_NUMPY = {
    "neg": np.negative, "abs": np.abs, "not": np.logical_not, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "floordiv": np.floor_divide, "mod": np.mod, "eq": np.equal, "ne": np.not_equal, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "and": np.logical_and, "or": np.logical_or,
}  # fmt: skip
_TYPES = {DType.I64: np.int64, DType.I32: np.int32, DType.BOOL: np.bool_, DType.F32: np.float32, DType.F64: np.float64}


def _value(e: Expr, point: dict[Var, np.ndarray]) -> np.ndarray:
    if isinstance(e, Var):
        return point[e]
    if isinstance(e, Const):
        return np.asarray(e.value)
    if isinstance(e, (Load, Reduce)) or not isinstance(e, Op):
        raise NotImplementedError(type(e).__name__)
    args = [_value(c, point) for c in e.children]
    if e.name == "where":
        return np.where(*args)
    if e.name == "cast" and e.dtype in _TYPES:
        return args[0].astype(_TYPES[e.dtype])
    if e.name not in _NUMPY:
        raise NotImplementedError(e.name)
    if e.name in ("floordiv", "mod") and not np.all(args[1]):
        raise NotImplementedError("division by zero")
    return _NUMPY[e.name](*args)


def injective(index: tuple[Expr, ...], variables: tuple[Var, ...]) -> bool | None:
    """Whether different values of the variables give different indices. None: depends on data, or too many to try."""
    wide = [v for v in variables if v.size > 1]
    if any(loads(e) for e in index):
        return None
    if all(any(e is v for e in index) for v in wide):
        return True
    total = math.prod(v.size for v in wide)
    if total > 1 << 24:
        return None
    try:
        point = {v: np.arange(v.size).reshape([-1 if v is u else 1 for u in wide]) for v in wide}
        point |= {v: np.zeros([1] * len(wide), dtype=np.int64) for v in variables if v.size == 1}
        shape = [v.size for v in wide]
        flat = np.zeros(shape, dtype=np.int64)
        for e in index:
            value = np.broadcast_to(_value(e, point), shape)
            span = int(value.max()) - int(value.min()) + 1
            flat = flat * span + (value - int(value.min()))
    except NotImplementedError:
        return None
    return len(np.unique(flat)) == total
