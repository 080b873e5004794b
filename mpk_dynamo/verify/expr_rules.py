"""Rule G2 for expressions: types of operators, variables in scope, loads inside their buffers."""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.expr import BINARY, COMPARE, REDUCE, UNARY, Acc, Const, Expr, Load, Op, Reduce, Var, render
from ..ir.types import Buffer, DType
from .index_bounds import Guard, outside

INTEGERS = (DType.I64, DType.I32)
_LOGIC = frozenset(("and", "or", "not"))
_FLOAT_ONLY = frozenset(
    "sqrt rsqrt exp exp2 log log2 log1p expm1 sin cos tanh sigmoid erf floor ceil trunc round".split()
    + "reciprocal isnan div".split()
)


class Broken(Exception):
    """A G2 failure inside an expression, before the node is known."""


class Expressions:
    """Checks expressions against the buffers of one graph. What repeats between layers is checked once."""

    def __init__(self, buffers: Mapping[str, Buffer]) -> None:
        self._buffers = buffers
        self._typed: set[Expr] = set()
        self._reached: set[tuple[Expr, frozenset[Guard]]] = set()
        self._inside: set[tuple[Expr, int, frozenset[Guard]]] = set()
        self.distinct = 0

    def check(self, e: Expr, dtype: DType | tuple[DType, ...] | None, scope: tuple[Var, ...], accs: int = 0) -> None:
        """Raise Broken unless `e` is well typed, of `dtype`, over `scope` and Acc(0) to Acc(accs - 1)."""
        if dtype is not None and e.dtype not in (dtype if isinstance(dtype, tuple) else (dtype,)):
            want = " or ".join(d.value for d in (dtype if isinstance(dtype, tuple) else (dtype,)))
            raise Broken(f"{_short(e)} is {e.dtype.value}, not {want}")
        loose = e.free - set(scope)
        if loose:
            names = sorted(f"{v.name}<{v.size}" for v in loose)
            raise Broken(f"{_short(e)} depends on {', '.join(names)}, which the node does not define")
        self._walk(e, accs, frozenset(), False)

    def index(self, index: tuple[Expr, ...], buffer: Buffer, scope: tuple[Var, ...], what: str) -> None:
        """Check an index of `buffer`, as of a store."""
        if len(index) != len(buffer.shape):
            raise Broken(f"{what} {buffer.name} of shape {list(buffer.shape)} has {len(index)} indices")
        for e in index:
            self.check(e, INTEGERS, scope)
        self._bounds(index, buffer, frozenset(), what)

    def _walk(self, e: Expr, accs: int, guards: frozenset[Guard], reduced: bool) -> None:
        if isinstance(e, Acc):
            if not 0 <= e.which < accs:
                raise Broken(f"accumulator {e.which} of {accs}")
            if reduced:
                raise Broken(f"accumulator {e.which} inside a reduction")
            return
        if not e.children:
            self._types(e)
            return
        if (e, guards) in self._reached and not accs:
            return
        self._types(e)
        if isinstance(e, Load):
            b = self._buffers[e.buffer]
            self._bounds(e.index, b, guards, "load of")
        if isinstance(e, Op) and e.name == "where":
            condition, then, otherwise = e.children
            self._walk(condition, accs, guards, reduced)
            self._walk(then, accs, guards | {(condition, True)}, reduced)
            self._walk(otherwise, accs, guards | {(condition, False)}, reduced)
        else:
            if isinstance(e, Reduce):
                reduced = True
                # a guard over an outer variable of the same name says nothing about the one bound here
                guards = frozenset(g for g in guards if e.var not in g[0].free)
            for c in e.children:
                self._walk(c, accs, guards, reduced)
        self._reached.add((e, guards))

    def _bounds(self, index: tuple[Expr, ...], b: Buffer, guards: frozenset[Guard], what: str) -> None:
        for d, (e, size) in enumerate(zip(index, b.shape, strict=True)):
            if (e, size, guards) in self._inside:
                continue
            wrong = outside(e, size, guards)
            if wrong is not None:
                text = wrong if isinstance(wrong, str) else f"is {wrong[1]} at {wrong[0]}"
                under = "".join(f", where {'' if g[1] else 'not '}{_short(g[0])}" for g in guards)
                raise Broken(f"{what} {b.name}: index {d} of 0:{size}, {_short(e)}{under}: {text}")
            self._inside.add((e, size, guards))

    def _types(self, e: Expr) -> None:
        if e in self._typed:
            return
        wrong = self._wrong(e)
        if wrong:
            raise Broken(f"{_short(e)}: {wrong}")
        self._typed.add(e)
        self.distinct += 1

    def _wrong(self, e: Expr) -> str:
        kinds = [c.dtype for c in e.children]
        if isinstance(e, Var):
            return "" if e.dtype is DType.I64 and e.size >= 1 else f"a variable of size {e.size}"
        if isinstance(e, Const):
            return ""
        if isinstance(e, Load):
            b = self._buffers.get(e.buffer)
            if b is None:
                return f"there is no buffer {e.buffer!r}"
            if b.dtype is not e.dtype:
                return f"{e.buffer} is {b.dtype.value}, not {e.dtype.value}"
            if len(e.index) != len(b.shape):
                return f"{len(e.index)} indices for shape {list(b.shape)}"
            return "" if all(k in INTEGERS for k in kinds) else "an index is no integer"
        if isinstance(e, Reduce):
            known = e.name in REDUCE and e.var.size >= 1
            return "" if known and kinds[0] is e.dtype and not e.dtype.is_narrow_float else "ill-typed reduction"
        if not isinstance(e, Op):
            return f"unknown expression {type(e).__name__}"
        return _wrong_op(e.name, e.dtype, kinds)


def _wrong_op(name: str, dtype: DType, kinds: list[DType]) -> str:
    if name == "cast":
        return "" if len(kinds) == 1 else "cast takes one operand"
    if name == "where":
        fine = len(kinds) == 3 and kinds[0] is DType.BOOL and kinds[1] is kinds[2] is dtype
        return "" if fine else f"where of {[k.value for k in kinds]}"
    if name not in UNARY and name not in BINARY:
        return f"unknown operator {name!r}"
    if len(kinds) != (1 if name in UNARY else 2) or len(set(kinds)) != 1:
        return f"operands {[k.value for k in kinds]}"
    if kinds[0].is_narrow_float or kinds[0] is DType.U8:
        return f"arithmetic on {kinds[0].value}"
    if name in _LOGIC and kinds[0].is_float:
        return f"{name} of {kinds[0].value}"
    if name in _FLOAT_ONLY and not kinds[0].is_float:
        return f"{name} of {kinds[0].value}"
    result = DType.BOOL if name in COMPARE or name == "isnan" else kinds[0]
    return "" if dtype is result else f"result {dtype.value}, not {result.value}"


def _short(e: Expr, limit: int = 120) -> str:
    text = render(e)
    return text if len(text) <= limit else text[: limit - 3] + "..."
