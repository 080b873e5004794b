"""Rewriting expressions and the nodes that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...ir import expr as E
from ...ir.expr import Expr, Load, Op, Reduce, Var
from ...ir.graph import Linear, Node, RowMap
from ...ir.types import DType


def replace_loads(x: Expr, values: Mapping[str, Callable[[tuple[Expr, ...]], Expr]]) -> Expr:
    """x with every load of a buffer in `values` replaced by values[buffer](index)."""
    memo: dict[Expr, Expr] = {}
    names = values.keys()

    def walk(e: Expr) -> Expr:
        if e.buffers.isdisjoint(names):
            return e
        done = memo.get(e)
        if done is None:
            children = tuple(walk(c) for c in e.children)
            if isinstance(e, Load) and e.buffer in values:
                done = values[e.buffer](children)
            else:
                done = E.rebuild(e, children)
            memo[e] = done
        return done

    return walk(x)


def map_expressions(node: Node, f: Callable[[Expr], Expr]) -> Node:
    """The node with `f` applied to each expression it holds. The node itself when nothing changes."""
    if isinstance(node, Linear):
        parts = tuple(_changed(p, epilogue=f(p.epilogue), store=_each(f, p.store)) for p in node.parts)
        return _changed(node, x=f(node.x), parts=parts)
    if isinstance(node, RowMap):
        return _changed(node, body=f(node.body), store=_each(f, node.store))
    append = node.append
    if append is not None:
        append = _changed(append, position=f(append.position), key=f(append.key), value=f(append.value))
    single = {name: getattr(node, name) for name in ("q", "mask", "first", "last")}
    index = {name: _each(f, getattr(node, name)) for name in ("key_index", "value_index", "store")}
    return _changed(node, append=append, **index, **{k: None if x is None else f(x) for k, x in single.items()})


def _each(f: Callable[[Expr], Expr], xs: tuple[Expr, ...]) -> tuple[Expr, ...]:
    return tuple([f(x) for x in xs])


def _changed(old: Any, **fields: Any) -> Any:
    """`old` with these fields, or itself when they are what it has."""
    new = {k: v for k, v in fields.items() if v != getattr(old, k)}
    return replace(old, **new) if new else old


def variables(node: Node) -> tuple[Var, ...]:
    """Loop variables of a node, without those of reductions."""
    if isinstance(node, RowMap):
        return node.dims
    if isinstance(node, Linear):
        return (node.t, node.k, *dict.fromkeys(p.n for p in node.parts))
    return (node.b, node.h, node.g, node.s, node.d)


def flat_index(index: tuple[Expr, ...], strides: tuple[int, ...]) -> Expr:
    """sum(index[i] * strides[i]), with a variable split by // and % put together again."""
    terms: dict[Expr, int] = {}
    constant = 0
    for e, stride in zip(index, strides, strict=True):
        found, rest = E.linear_terms(e)
        constant += rest * stride
        for term, c in found.items():
            terms[term] = terms.get(term, 0) + c * stride
    return recombine(E.from_terms({t: c for t, c in terms.items() if c}, constant))


def recombine(x: Expr) -> Expr:
    """x with c*d*(y // d) + c*(y % d) written as c*y, until there is none left."""
    terms, constant = E.linear_terms(x)
    if not any(isinstance(t, Op) and t.name == "mod" for t in terms):
        return x
    changed = True
    while changed:
        changed = False
        for term, c in list(terms.items()):
            if not (isinstance(term, Op) and term.name == "mod" and isinstance(term.children[1], E.Const)):
                continue
            whole, d = term.children[0], term.children[1].value
            quotient = E.op("floordiv", whole, E.index(d))
            if terms.get(quotient) == c * d:
                del terms[term], terms[quotient]
                terms, constant = E.linear_terms(
                    E.op("add", E.from_terms(terms, constant), E.op("mul", whole, E.index(c)))
                )
                changed = True
                break
    return E.from_terms(terms, constant)


def solve_flat(position: Expr, dims: tuple[Var, ...], total: int, value: Expr) -> dict[Var, Expr] | None:
    """Values of `dims` for which position(dims) == value, when `position` counts each of [0, total) once.

    That is so when it is a mixed-radix number with the dims as its digits, in any order. None otherwise."""
    terms, constant = E.linear_terms(position)
    if constant or not terms.keys() <= set(dims):
        return None
    solved: dict[Var, Expr] = {v: E.index(0) for v in dims if v.size == 1}
    weight = 1
    for v, c in sorted(terms.items(), key=lambda item: item[1]):
        assert isinstance(v, Var)
        if v.size == 1:
            continue
        if c != weight:
            return None
        digit = E.op("floordiv", value, E.index(weight))
        weight *= v.size
        solved[v] = digit if weight == total else E.op("mod", digit, E.index(v.size))
    return solved if weight == total and len(solved) == len(dims) else None


def name_reductions(x: Expr) -> Expr:
    """x with the variable of each reduction named by how deep reductions nest inside it: r0, r1, ...

    Equal computations become one object, and no variable is bound again inside its own scope."""
    if not x.reduces:
        return x
    named = _named(x, "r")
    if named is None:  # a new name is taken by a variable around it, which gets its own new name later
        apart = _named(x, "apart")
        assert apart is not None
        named = _named(apart, "r")
    assert named is not None
    return named


def _named(x: Expr, prefix: str) -> Expr | None:
    """The same with names of `prefix`; None where that would bind a variable of an outer reduction."""
    memo: dict[Expr, tuple[Expr, int]] = {}

    def walk(e: Expr) -> tuple[Expr, int]:
        if not e.children:
            return e, 0
        done = memo.get(e)
        if done is None:
            inner = [walk(c) for c in e.children]
            depth = max(d for _, d in inner)
            if isinstance(e, Reduce):
                v, body = E.var(f"{prefix}{depth}", e.var.size), inner[0][0]
                if v is not e.var and v in body.free:
                    raise _Taken
                done = E.reduce(e.name, v, _rename(body, e.var, v)), depth + 1
            else:
                done = E.rebuild(e, tuple(c for c, _ in inner)), depth
            memo[e] = done
        return done

    try:
        return walk(x)[0]
    except _Taken:
        return None


class _Taken(Exception):
    """A name that is in use."""


def _rename(x: Expr, old: Var, new: Var) -> Expr:
    """x with its free variable `old` called `new`, which no reduction inside x may bind."""
    memo: dict[Expr, Expr] = {}

    def walk(e: Expr) -> Expr:
        if e is old:
            return new
        if old not in e.free:
            return e
        done = memo.get(e)
        if done is None:
            done = memo[e] = E.rebuild(e, tuple(map(walk, e.children)))
        return done

    return x if old is new else walk(x)


def plain_load(x: Expr) -> bool:
    """Whether x is a load whose index does not depend on data."""
    return isinstance(x, Load) and all(data_independent(e) for e in x.index)


def data_independent(x: Expr) -> bool:
    """Whether x is computed from loop variables and constants alone."""
    return not x.buffers and not any(isinstance(e, (E.Acc, Reduce)) for e in E.walk(x))


def is_identity(store: tuple[Expr, ...], dims: tuple[Var, ...], shape: tuple[int, ...]) -> bool:
    """Whether store(dims) is the dims themselves, with 0 for dimensions of size 1."""
    return len(store) == len(dims) == len(shape) and all(
        v.size == n and (e is v or (n == 1 and isinstance(e, E.Const) and e.value == 0))
        for e, v, n in zip(store, dims, shape, strict=True)
    )


def zero(dtype: DType = DType.I64) -> Expr:
    """The constant 0."""
    return E.const(0, dtype)
