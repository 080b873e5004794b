"""The structure of data of this package as text that is the same in every process: what a hash of it stands for."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection
from typing import Any

from .expr import Acc, Const, Expr, Load, Op, Reduce, Var


def structure(value: Any, others: Collection[type] = ()) -> str:
    """Equal for equal values alone. `value`: dataclasses of this package, Exprs, tuples, lists, dicts, sets of strings,
    enums, strings, numbers and None. Raises TypeError for anything else, and for dataclasses of other packages, whose
    meaning is not known here, unless they are `others`."""
    out: list[object] = []
    _put(value, out, {}, others)
    return repr(out)


def _put(x: Any, out: list[object], numbers: dict[Expr, int], others: Collection[type]) -> None:
    if x is None or isinstance(x, (str, bool, int, float)) and type(x) in (str, bool, int, float):
        out.append(x)
    elif isinstance(x, Expr):
        out.append(("expr", _number(x, out, numbers)))
    elif isinstance(x, enum.Enum):
        out.append((type(x).__name__, x.name))
    elif isinstance(x, (tuple, list)):
        out.append((type(x).__name__, len(x)))
        for y in x:
            _put(y, out, numbers, others)
    elif isinstance(x, dict):
        out.append(("dict", len(x)))
        for k, v in x.items():  # the order is part of the value: buffers are laid out in it
            _put(k, out, numbers, others)
            _put(v, out, numbers, others)
    elif isinstance(x, (set, frozenset)):
        out.append(("set", sorted(x)))
    elif dataclasses.is_dataclass(x) and (type(x).__module__.startswith("mpk_dynamo.") or type(x) in others):
        fields = dataclasses.fields(x)
        out.append((type(x).__module__, type(x).__qualname__, len(fields)))
        for f in fields:
            _put(getattr(x, f.name), out, numbers, others)
    else:
        raise TypeError(f"{type(x).__module__}.{type(x).__qualname__} has no known structure")


def _number(x: Expr, out: list[object], numbers: dict[Expr, int]) -> int:
    """Expressions are interned, so that each is written once."""
    found = numbers.get(x)
    if found is None:
        children = [_number(c, out, numbers) for c in x.children]
        if isinstance(x, (Var, Op)):
            own: tuple[object, ...] = (x.name, x.size) if isinstance(x, Var) else (x.name,)
        elif isinstance(x, Const):
            own = (x.value,)
        elif isinstance(x, Load):
            own = (x.buffer,)
        elif isinstance(x, Acc):
            own = (x.which,)
        elif isinstance(x, Reduce):
            own = (x.name, _number(x.var, out, numbers))
        else:
            raise TypeError(f"{type(x).__qualname__} has no known structure")
        out.append((type(x).__name__, x.dtype.value, children, own))
        found = numbers[x] = len(numbers)
    return found
