"""Scalar expressions: what one element of a tensor is, as a function of loop variables.

Expressions are interned: structurally equal expressions are one object, so `==` and hashing are by identity and
cheap. Build them only through the functions of this module; `op` folds constants and keeps integer index
arithmetic simple (ranges of variables are known, so `(i*64 + j) // 64` becomes `i` for `j < 64`).

Arithmetic is done in f32, f64, i64, i32 or bool. bf16 and f16 appear only as the type of a `Load` or of a
`cast` (a rounding); `op` refuses them as operands, upcast first with `cast(x, F32)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .types import DType

_INTERNED: dict[tuple[Any, ...], "Expr"] = {}

UNARY = frozenset(
    (
        "neg abs sqrt rsqrt exp exp2 log log2 log1p expm1 sin cos tanh sigmoid erf "
        "floor ceil trunc round reciprocal not relu isnan"
    ).split()
)
BINARY = frozenset("add sub mul div floordiv mod pow max min eq ne lt le gt ge and or".split())
COMPARE = frozenset("eq ne lt le gt ge".split())
REDUCE = frozenset(("sum", "max", "min"))


class Expr:
    """Base of all expressions. `dtype` is the type of the value, `children` the direct operands."""

    __slots__ = ("dtype", "children", "_free", "_buffers", "_measure", "_loads", "_reductions")
    dtype: DType
    children: tuple["Expr", ...]

    @property
    def free(self) -> frozenset["Var"]:
        """Loop variables the value depends on."""
        try:
            return self._free
        except AttributeError:
            out: frozenset[Var] = frozenset().union(*(c.free for c in self.children)) if self.children else frozenset()
            self._free = out
            return out

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the buffers the value is loaded from."""
        try:
            return self._buffers
        except AttributeError:
            out: frozenset[str] = frozenset().union(*(c.buffers for c in self.children))
            if isinstance(self, Load):
                out |= {self.buffer}
            self._buffers = out
            return out

    @property
    def depth(self) -> int:
        """Operations on the longest path into the expression."""
        return self._measured()[0]

    @property
    def tree_size(self) -> int:
        """Operations in the expression, common sub-expressions counted each time: at least the number of distinct."""
        return self._measured()[1]

    @property
    def reduces(self) -> bool:
        """Whether the expression holds a reduction."""
        return self._measured()[2]

    def _measured(self) -> tuple[int, int, bool]:
        try:
            return self._measure
        except AttributeError:
            depth, size, reduces = 0, 1, isinstance(self, Reduce)
            for c in self.children:
                d, n, r = c._measured()
                depth, size, reduces = max(depth, d), size + n, reduces or r
            self._measure: tuple[int, int, bool] = (depth + 1, size, reduces)
            return self._measure

    def __repr__(self) -> str:
        return render(self)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in type(self).__slots__}
        return _restore, (type(self), self.dtype, self.children, fields)


class Var(Expr):
    """A loop variable: an integer in [0, size)."""

    __slots__ = ("name", "size")

    @property
    def free(self) -> frozenset["Var"]:
        return frozenset((self,))


class Const(Expr):
    __slots__ = ("value",)


class Load(Expr):
    """The element of `buffer` (a Buffer's name) at `index`, one integer expression per dimension."""

    __slots__ = ("buffer",)

    @property
    def index(self) -> tuple[Expr, ...]:
        return self.children


class Acc(Expr):
    """The fp32 accumulator of the `which`-th joint weight of a Linear part, in its epilogue."""

    __slots__ = ("which",)


class Op(Expr):
    """`name` applied to `children`. `cast` converts to `dtype`; `where` has (condition, then, otherwise)."""

    __slots__ = ("name",)


class Reduce(Expr):
    """`name` (sum, max, min) of `body` over `var` in [0, var.size)."""

    __slots__ = ("name", "var")

    @property
    def body(self) -> Expr:
        return self.children[0]

    @property
    def free(self) -> frozenset[Var]:
        return self.children[0].free - {self.var}


def _make(cls: type, dtype: DType, children: tuple[Expr, ...], **fields: Any) -> Any:
    key = (cls, dtype, children, *((k, type(v), repr(v) if isinstance(v, float) else v) for k, v in fields.items()))
    found = _INTERNED.get(key)
    if found is None:
        found = object.__new__(cls)
        found.dtype, found.children = dtype, children
        for name, value in fields.items():
            setattr(found, name, value)
        _INTERNED[key] = found
    return found


def _restore(cls: type, dtype: DType, children: tuple[Expr, ...], fields: dict[str, Any]) -> Expr:
    """Of a pickle or a copy: the interned one."""
    return _make(cls, dtype, children, **fields)


def var(name: str, size: int) -> Var:
    return _make(Var, DType.I64, (), name=name, size=int(size))


def const(value: bool | int | float, dtype: DType) -> Const:
    if dtype is DType.BOOL:
        value = bool(value)
    elif dtype.is_float:
        value = float(value)
    else:
        value = int(value)
    return _make(Const, dtype, (), value=value)


def index(value: int) -> Const:
    return const(value, DType.I64)


def load(buffer: str, idx: tuple[Expr, ...], dtype: DType) -> Load:
    return _make(Load, dtype, tuple(idx), buffer=buffer)


def acc(which: int) -> Acc:
    return _make(Acc, DType.F32, (), which=which)


def cast(x: Expr, dtype: DType) -> Expr:
    if x.dtype is dtype:
        return x
    if isinstance(x, Const) and not dtype.is_narrow_float and not (x.dtype.is_float and not math.isfinite(x.value)):
        return const(x.value, dtype)
    # bf16 -> f32 -> bf16 is the identity: widening and narrowing back never changes a value
    if isinstance(x, Op) and x.name == "cast" and x.children[0].dtype is dtype and _widens(dtype, x.dtype):
        return x.children[0]
    return _make(Op, dtype, (x,), name="cast")


def _widens(narrow: DType, wide: DType) -> bool:
    order = {DType.BF16: 1, DType.F16: 1, DType.F32: 2, DType.F64: 3, DType.I32: 2, DType.I64: 3}
    return narrow in order and wide in order and narrow.is_float == wide.is_float and order[narrow] < order[wide]


def where(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    if isinstance(condition, Const):
        return then if condition.value else otherwise
    if then is otherwise:
        return then
    if then.dtype is not otherwise.dtype:
        raise TypeError(f"where: {then.dtype} and {otherwise.dtype}")
    return _make(Op, then.dtype, (condition, then, otherwise), name="where")


def reduce(name: str, over: Var, body: Expr) -> Expr:
    if name not in REDUCE:
        raise ValueError(f"unknown reduction {name!r}")
    if over.size == 1:
        return substitute(body, {over: index(0)})
    return _make(Reduce, body.dtype, (body,), name=name, var=over)


def op(name: str, *args: Expr) -> Expr:
    """Apply an operator of UNARY or BINARY. Result type: bool for comparisons, else that of the operands."""
    if name not in UNARY and name not in BINARY:
        raise ValueError(f"unknown operator {name!r}")
    if len(args) != (1 if name in UNARY else 2):
        raise TypeError(f"{name} takes {1 if name in UNARY else 2} operands, got {len(args)}")
    if any(a.dtype.is_narrow_float for a in args) or len({a.dtype for a in args}) != 1:
        raise TypeError(f"{name}: operands {[a.dtype.value for a in args]}; cast them to one wide type first")
    dtype = DType.BOOL if name in COMPARE or name == "isnan" else args[0].dtype
    if dtype is DType.I64 and args[0].dtype is DType.I64:
        simpler = _simplify_int(name, args)
        if simpler is not None:
            return simpler
    elif name in COMPARE and args[0].dtype is DType.I64:
        known = _compare_known(name, *args)
        if known is not None:
            return const(known, DType.BOOL)
    elif dtype is DType.BOOL and name in ("and", "or", "not"):
        known = [a.value for a in args if isinstance(a, Const)]
        if name == "not":
            return const(not known[0], DType.BOOL) if known else _make(Op, dtype, args, name=name)
        if (name == "or") in known:  # decides the result
            return const(name == "or", DType.BOOL)
        if known:
            return next((a for a in args if not isinstance(a, Const)), args[0])
    return _make(Op, dtype, args, name=name)


def bounds(x: Expr, ranges: Mapping[Var, tuple[int, int]] | None = None) -> tuple[int, int] | None:
    """Inclusive (low, high) of an integer expression, or None when it depends on data.

    `ranges` narrows variables to half-open [start, stop); others have their whole range.
    """
    if isinstance(x, Const):
        return (x.value, x.value) if x.dtype in (DType.I64, DType.I32) else None
    if isinstance(x, Var):
        start, stop = (ranges or {}).get(x, (0, x.size))
        return start, stop - 1
    if not isinstance(x, Op):
        return None
    if x.name == "cast":
        return bounds(x.children[0], ranges) if x.dtype in (DType.I64, DType.I32) else None
    if x.name == "where":
        sides = [bounds(c, ranges) for c in x.children[1:]]
        return None if None in sides else (min(s[0] for s in sides), max(s[1] for s in sides))
    sides = [bounds(c, ranges) for c in x.children]
    if None in sides or x.dtype is not DType.I64:
        return None
    a = sides[0]
    if x.name == "neg":
        return -a[1], -a[0]
    if len(sides) != 2:
        return None
    b = sides[1]
    if x.name == "add":
        return a[0] + b[0], a[1] + b[1]
    if x.name == "sub":
        return a[0] - b[1], a[1] - b[0]
    if x.name == "mul":
        products = [p * q for p in a for q in b]
        return min(products), max(products)
    if x.name == "floordiv" and b[0] > 0:
        quotients = [p // q for p in a for q in b]
        return min(quotients), max(quotients)
    if x.name == "mod" and b[0] == b[1] and b[0] > 0:
        if a[0] // b[0] == a[1] // b[0]:
            return a[0] % b[0], a[1] % b[0]
        return 0, b[0] - 1
    if x.name == "max":
        return max(a[0], b[0]), max(a[1], b[1])
    if x.name == "min":
        return min(a[0], b[0]), min(a[1], b[1])
    return None


def linear_terms(x: Expr) -> tuple[dict[Expr, int], int]:
    """x as a sum of coefficient * term plus a constant; terms are not sums or constant multiples."""
    terms: dict[Expr, int] = {}
    total = 0

    def walk(e: Expr, scale: int) -> None:
        nonlocal total
        if isinstance(e, Const):
            total += scale * e.value
        elif isinstance(e, Op) and e.name == "add":
            walk(e.children[0], scale)
            walk(e.children[1], scale)
        elif isinstance(e, Op) and e.name == "sub":
            walk(e.children[0], scale)
            walk(e.children[1], -scale)
        elif isinstance(e, Op) and e.name == "neg":
            walk(e.children[0], -scale)
        elif isinstance(e, Op) and e.name == "mul" and isinstance(e.children[1], Const):
            walk(e.children[0], scale * e.children[1].value)
        elif isinstance(e, Op) and e.name == "mul" and isinstance(e.children[0], Const):
            walk(e.children[1], scale * e.children[0].value)
        else:
            terms[e] = terms.get(e, 0) + scale

    walk(x, 1)
    return {t: c for t, c in terms.items() if c}, total


def from_terms(terms: Mapping[Expr, int], constant: int) -> Expr:
    """The canonical sum: largest coefficient first, then by text; the constant last."""
    out: Expr | None = None
    for term, c in sorted(terms.items(), key=lambda kv: (-abs(kv[1]), render(kv[0]))):
        part = term if c == 1 else _make(Op, DType.I64, (term, index(c)), name="mul")
        out = part if out is None else _make(Op, DType.I64, (out, part), name="add")
    if out is None:
        return index(constant)
    return out if constant == 0 else _make(Op, DType.I64, (out, index(constant)), name="add")


def _simplify_int(name: str, args: tuple[Expr, ...]) -> Expr | None:
    if name in ("add", "sub", "neg") or (name == "mul" and any(isinstance(a, Const) for a in args)):
        raw = _make(Op, DType.I64, args, name=name)
        return from_terms(*linear_terms(raw))
    if name not in ("floordiv", "mod") or not isinstance(args[1], Const) or args[1].value <= 0:
        if all(isinstance(a, Const) for a in args) and name in ("mul", "max", "min"):
            return index({"mul": int.__mul__, "max": max, "min": min}[name](args[0].value, args[1].value))
        return None
    x, d = args[0], args[1].value
    if d == 1:
        return x if name == "floordiv" else index(0)
    limits = bounds(x)
    if limits is not None and limits[0] // d == limits[1] // d:
        quotient = limits[0] // d
        return index(quotient) if name == "floordiv" else op("add", x, index(-quotient * d))
    # split into the multiples of d and a remainder part that stays in [0, d)
    terms, constant = linear_terms(x)
    whole = {t: c // d for t, c in terms.items() if c % d == 0}
    rest = from_terms({t: c for t, c in terms.items() if c % d}, constant % d)
    if whole or constant // d:
        if name == "mod":
            return op("mod", rest, index(d))
        return op("add", from_terms(whole, constant // d), op("floordiv", rest, index(d)))
    if isinstance(x, Op) and x.name == "floordiv" and name == "floordiv" and isinstance(x.children[1], Const):
        return op("floordiv", x.children[0], index(d * x.children[1].value))
    return None


def _compare_known(name: str, a: Expr, b: Expr) -> bool | None:
    limits = bounds(op("sub", a, b))
    if limits is None:
        return None
    low, high = limits
    zero, nonzero = low == high == 0, low > 0 or high < 0
    always = {"lt": high < 0, "le": high <= 0, "gt": low > 0, "ge": low >= 0, "eq": zero, "ne": nonzero}
    never = {"lt": low >= 0, "le": low > 0, "gt": high <= 0, "ge": high < 0, "eq": nonzero, "ne": zero}
    return True if always[name] else False if never[name] else None


def rebuild(x: Expr, children: tuple[Expr, ...]) -> Expr:
    """x with other children, through the simplifying constructors."""
    if children == x.children:
        return x
    if isinstance(x, Load):
        return load(x.buffer, children, x.dtype)
    if isinstance(x, Reduce):
        return reduce(x.name, x.var, children[0])
    if isinstance(x, Op):
        if x.name == "cast":
            return cast(children[0], x.dtype)
        if x.name == "where":
            return where(*children)
        return op(x.name, *children)
    return x


def transform(x: Expr, visit: Callable[[Expr], Expr | None]) -> Expr:
    """Replace bottom-up: `visit` sees each node after its children were replaced; None keeps it."""
    memo: dict[Expr, Expr] = {}

    def walk(e: Expr) -> Expr:
        done = memo.get(e)
        if done is None:
            kept = rebuild(e, tuple(walk(c) for c in e.children)) if e.children else e
            replaced = visit(kept)
            done = memo[e] = kept if replaced is None else replaced
        return done

    return walk(x)


def substitute(x: Expr, values: Mapping[Var, Expr]) -> Expr:
    """Replace free variables. Bound reduction variables are renamed where they would capture."""
    memo: dict[Expr, Expr] = {}
    taken: set[str] | None = None

    def walk(e: Expr) -> Expr:
        nonlocal taken
        if isinstance(e, Var):
            return values.get(e, e)
        if not e.children:
            return e
        done = memo.get(e)
        if done is None:
            if isinstance(e, Reduce) and taken is None:
                taken = {v.name for value in values.values() for v in _all_vars(value)}
            if isinstance(e, Reduce) and (e.var.name in taken or e.var in values):
                n = 0
                inside = {v.name for v in _all_vars(e)} | taken
                while f"r{n}" in inside:
                    n += 1
                fresh = var(f"r{n}", e.var.size)
                body = substitute(e.body, {**{k: v for k, v in values.items() if k is not e.var}, e.var: fresh})
                done = reduce(e.name, fresh, body)
            else:
                done = rebuild(e, tuple(walk(c) for c in e.children))
            memo[e] = done
        return done

    return walk(x)


def _all_vars(x: Expr) -> set[Var]:
    out: set[Var] = set()
    for e in walk(x):
        if isinstance(e, Var):
            out.add(e)
        elif isinstance(e, Reduce):
            out.add(e.var)
    return out


def walk(x: Expr) -> Iterator[Expr]:
    """Every distinct node, children before parents."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(x, False)]
    while stack:
        e, ready = stack.pop()
        if ready:
            yield e
        elif e not in seen:
            seen.add(e)
            stack.append((e, True))
            stack.extend((c, False) for c in reversed(e.children))


def loads(x: Expr) -> list[Load]:
    """Distinct loads, in a stable order."""
    if not x.buffers:
        return []
    try:
        return list(x._loads)
    except AttributeError:
        x._loads = tuple(e for e in walk(x) if isinstance(e, Load))
        return list(x._loads)


def reductions(x: Expr) -> list[Reduce]:
    """Distinct reductions, inner ones first."""
    if not x.reduces:
        return []
    try:
        return list(x._reductions)
    except AttributeError:
        x._reductions = tuple(e for e in walk(x) if isinstance(e, Reduce))
        return list(x._reductions)


def render(x: Expr) -> str:
    """Stable text form."""
    if isinstance(x, Var):
        return x.name
    if isinstance(x, Const):
        return repr(x.value)
    if isinstance(x, Acc):
        return f"acc{x.which}"
    args = ", ".join(render(c) for c in x.children)
    if isinstance(x, Load):
        return f"{x.buffer}[{args}]"
    if isinstance(x, Reduce):
        return f"{x.name}<{x.var.name}:{x.var.size}>({args})"
    assert isinstance(x, Op)
    return f"{x.dtype.value}({args})" if x.name == "cast" else f"{x.name}({args})"
