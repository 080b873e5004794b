"""Operators that only rearrange elements: each is an index map, and costs no node (concatenation does)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..ir import expr as E
from ..ir.expr import Expr
from .registry import Call, lowers
from .values import Index, Shape, View, bounded, broadcast, points, variables

if TYPE_CHECKING:
    from .importer import Importer


def regroup(shape: Shape, into: Shape, at: Index) -> Index:
    """The point of a tensor of `shape` that a row-major reshape to `into` reads at point `at` of the latter.

    Both shapes are cut into the smallest runs of dimensions with equal products; only dimensions of one run mix.
    """
    if 0 in into:
        return tuple(E.index(0) for _ in shape)
    out: list[Expr] = []
    i = j = 0
    while i < len(shape) or j < len(into):
        start, first = i, j
        have = want = 1
        if i < len(shape):
            have, i = shape[i], i + 1
        if j < len(into):
            want, j = into[j], j + 1
        while have != want:
            if have < want:
                have, i = have * shape[i], i + 1
            else:
                want, j = want * into[j], j + 1
        out += unflatten(flatten(at[first:j], into[first:j]), shape[start:i])
    return tuple(out)


def flatten(at: Sequence[Expr], shape: Sequence[int]) -> Expr:
    """Row-major position of a point."""
    flat: Expr = E.index(0)
    for e, n in zip(at, shape, strict=True):
        flat = E.op("add", E.op("mul", flat, E.index(n)), e)
    return flat


def unflatten(flat: Expr, shape: Sequence[int]) -> list[Expr]:
    """The point at a row-major position."""
    out: list[Expr] = []
    inner = math.prod(shape)
    for k, n in enumerate(shape):
        inner //= max(n, 1)
        e = E.op("floordiv", flat, E.index(max(inner, 1)))
        out.append(E.index(0) if n == 1 else e if _is_first(shape, k) else E.op("mod", e, E.index(n)))
    return out


def _is_first(shape: Sequence[int], k: int) -> bool:
    return all(n == 1 for n in shape[:k])


def dim_of(call: Call, dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _result(imp: Importer, call: Call, source: View, index: Index) -> View:
    """The view, as an alias or as a copy, whichever torch makes."""
    view = source.through(call.shape, index)
    return view if call.aliases else imp.copy(call, view)


@lowers("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
        "_reshape_alias", "squeeze_", "unsqueeze_", "ravel")  # fmt: skip
def reshape(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    if call.dtype is not source.dtype:
        raise call.refuse(f"reinterprets {source.dtype.value} as {call.dtype.value}")
    if call.op.endswith("_"):
        raise call.refuse("changes the shape of a tensor in place")
    return _result(imp, call, source, regroup(source.shape, call.shape, points(call.shape)))


@lowers("alias", "detach", "detach_", "contiguous", "lift_fresh", "lift", "view_as_real_if_real", "lift_fresh_copy",
        "clone", "resolve_conj", "resolve_neg", "positive", "requires_grad_")  # fmt: skip
def identity(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    return source if call.aliases else imp.copy(call, source)


@lowers("dropout", "feature_dropout", "native_dropout", "dropout_")
def dropout(imp: Importer, call: Call) -> View:
    if call["train"] and call["p"] != 0:
        raise call.refuse(f"dropout with p={call['p']} while training", "call model.eval()")
    return call["input"]


def _permuted(imp: Importer, call: Call, source: View, order: Sequence[int]) -> View:
    at = points(call.shape)
    return _result(imp, call, source, tuple(at[order.index(k)] for k in range(len(order))))


@lowers("transpose", "swapaxes", "swapdims")
def transpose(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    order = list(range(len(source.shape)))
    a, b = (dim_of(call, call.get(x, call.get(y)), len(order)) for x, y in (("dim0", "axis0"), ("dim1", "axis1")))
    order[a], order[b] = order[b], order[a]
    return _permuted(imp, call, source, order)


@lowers("t", "numpy_T", "mT", "matrix_H")
def matrix_transpose(imp: Importer, call: Call) -> View:
    order = list(range(len(call["self"].shape)))
    if call.op == "numpy_T":
        order.reverse()
    elif len(order) >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    return _permuted(imp, call, call["self"], order)


@lowers("permute")
def permute(imp: Importer, call: Call) -> View:
    rank = len(call["self"].shape)
    return _permuted(imp, call, call["self"], [dim_of(call, d, rank) for d in call["dims"]])


@lowers("movedim", "moveaxis")
def movedim(imp: Importer, call: Call) -> View:
    rank = len(call["self"].shape)
    source, to = ([x] if isinstance(x, int) else list(x) for x in (call["source"], call["destination"]))
    source, to = [dim_of(call, d, rank) for d in source], [dim_of(call, d, rank) for d in to]
    rest = iter(d for d in range(rank) if d not in source)
    order = [source[to.index(k)] if k in to else next(rest) for k in range(rank)]
    return _permuted(imp, call, call["self"], order)


@lowers("expand", "expand_as", "broadcast_to")
def expand(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    return source.through(call.shape, broadcast(source.shape, call.shape, points(call.shape)))


@lowers("broadcast_tensors")
def broadcast_tensors(imp: Importer, call: Call) -> list[View]:
    shapes = [tuple(v.shape) for v in call.node.meta["val"]]
    return [x.through(s, broadcast(x.shape, s, points(s))) for x, s in zip(call["tensors"], shapes)]


def _along(source: View, dim: int, size: int, index: Callable[[Expr], Expr]) -> View:
    """The view whose `dim` has `size` elements, element i of it being element index(i)."""
    shape = (*source.shape[:dim], size, *source.shape[dim + 1 :])
    at = points(shape)
    return source.through(shape, (*at[:dim], index(at[dim]), *at[dim + 1 :]))


def narrowed(source: View, dim: int, start: int, size: int, step: int = 1) -> View:
    if step == 1 and size == source.shape[dim]:
        return source
    return _along(source, dim, size, lambda e: E.op("add", E.op("mul", e, E.index(step)), E.index(start)))


@lowers("slice", "narrow")
def slice_(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    dim = dim_of(call, call["dim"], len(source.shape))
    start, n = call["start"] or 0, source.shape[dim]
    if not isinstance(start, int):
        raise call.refuse("the start is a tensor")
    start = min(max(start + n if start < 0 else start, 0), n)
    return narrowed(source, dim, start, call.shape[dim], call.get("step") or 1)


@lowers("select")
def select(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    dim = dim_of(call, call["dim"], len(source.shape))
    where = call["index"] + (source.shape[dim] if call["index"] < 0 else 0)
    return selected(source, dim, where)


def selected(source: View, dim: int, where: int) -> View:
    shape = (*source.shape[:dim], *source.shape[dim + 1 :])
    at = points(shape)
    return source.through(shape, (*at[:dim], E.index(where), *at[dim:]))


@lowers("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "unsafe_split_with_sizes")
def split(imp: Importer, call: Call) -> list[View]:
    source: View = call["self"]
    dim = dim_of(call, call["dim"], len(source.shape))
    out, start = [], 0
    for value in call.node.meta["val"]:
        out.append(narrowed(source, dim, start, value.shape[dim]))
        start += value.shape[dim]
    return out


@lowers("unbind")
def unbind(imp: Importer, call: Call) -> list[View]:
    source: View = call["self"]
    dim = dim_of(call, call["dim"], len(source.shape))
    return [selected(source, dim, k) for k in range(source.shape[dim])]


@lowers("diagonal")
def diagonal(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    rank = len(source.shape)
    a, b = dim_of(call, call["dim1"], rank), dim_of(call, call["dim2"], rank)
    at = list(points(call.shape))
    along = at.pop()
    rest = iter(at)
    row, column = max(-call["offset"], 0), max(call["offset"], 0)
    moved = {a: E.op("add", along, E.index(row)), b: E.op("add", along, E.index(column))}
    return source.through(call.shape, tuple(moved[k] if k in moved else next(rest) for k in range(rank)))


@lowers("repeat", "tile")
def repeat(imp: Importer, call: Call) -> View:
    source: View = call["self"]
    shift = len(call.shape) - len(source.shape)
    at = points(call.shape)[max(shift, 0) :]
    index = tuple(E.op("mod", e, E.index(n)) for e, n in zip(at, source.shape))
    return imp.copy(call, source.through(call.shape, index))


@lowers("repeat_interleave")
def repeat_interleave(imp: Importer, call: Call) -> View:
    source, times, dim = call["self"], call.get("repeats"), call.get("dim")
    if not isinstance(times, int) or dim is None:
        raise call.refuse("repeats must be a number, along a given dim")
    dim = dim_of(call, dim, len(source.shape))
    return imp.copy(call, _along(source, dim, call.shape[dim], lambda e: E.op("floordiv", e, E.index(times))))


@lowers("roll")
def roll(imp: Importer, call: Call) -> View:
    view: View = call["self"]
    shape, dims, shifts = view.shape, call["dims"], call["shifts"]
    if not dims:
        flat = (math.prod(shape),)
        line = view.through(flat, regroup(shape, flat, points(flat)))
        line = _along(line, 0, flat[0], lambda e: E.op("mod", E.op("sub", e, E.index(shifts[0])), E.index(flat[0])))
        return imp.copy(call, line.through(shape, regroup(flat, shape, points(shape))))
    for dim, shift in zip(dims, shifts, strict=True):
        dim, n = dim_of(call, dim, len(shape)), shape[dim]
        view = _along(view, dim, n, lambda e: E.op("mod", E.op("sub", e, E.index(shift)), E.index(n)))  # noqa: B023
    return imp.copy(call, view)


@lowers("flip")
def flip(imp: Importer, call: Call) -> View:
    view: View = call["self"]
    for dim in call["dims"]:
        dim = dim_of(call, dim, len(view.shape))
        n = view.shape[dim]
        view = _along(view, dim, n, lambda e: E.op("sub", E.index(n - 1), e))  # noqa: B023
    return imp.copy(call, view)


@lowers("cat", "concat", "concatenate")
def cat(imp: Importer, call: Call) -> View:
    pieces: list[View] = [v for v in call["tensors"] if v.shape != (0,)]
    if not pieces:
        pieces = call["tensors"][:1]
    dim = dim_of(call, call.get("dim", 0), len(call.shape))
    pieces = [v for v in pieces if v.shape[dim]] or pieces[:1]
    if len(pieces) == 1 and pieces[0].dtype is call.dtype:
        return imp.copy(call, pieces[0])
    return concatenate(imp, call, pieces, dim)


def concatenate(imp: Importer, call: Call, pieces: Sequence[View], dim: int) -> View:
    """One node that picks each element from the piece it lies in. The index into a piece is clamped, so that every
    load is in bounds whether its value is used or not."""
    from .values import convert

    at = points(call.shape)
    body: Expr | None = None
    start = call.shape[dim]
    for piece in reversed(pieces):
        n = piece.shape[dim]
        start -= n
        inside = bounded(E.op("sub", at[dim], E.index(start)), 0, n - 1) if n > 1 else E.index(0)
        value = convert(piece.load((*at[:dim], inside, *at[dim + 1 :])), call.dtype)
        # the pieces after this one are in `body`; this one starts at `start`
        body = value if body is None else E.where(E.op("lt", at[dim], E.index(start + n)), value, body)
    assert body is not None and start == 0
    return imp.emit(call, body)


@lowers("stack")
def stack(imp: Importer, call: Call) -> View:
    dim = dim_of(call, call["dim"], len(call.shape))
    pieces = []
    for v in call["tensors"]:
        shape = (*v.shape[:dim], 1, *v.shape[dim:])
        at = points(shape)
        pieces.append(v.through(shape, (*at[:dim], *at[dim + 1 :])))
    return concatenate(imp, call, pieces, dim)


@lowers("constant_pad_nd", "pad")
def pad(imp: Importer, call: Call) -> View:
    from .values import constant, convert, wide

    source: View = call["self"]
    amounts, rank = call["pad"], len(source.shape)
    if call.get("mode") not in (None, "constant"):
        raise call.refuse(f"padding mode {call['mode']!r}")
    at, inside = list(points(call.shape)), []
    condition: Expr = E.const(True, E.DType.BOOL)
    for k in range(rank):
        low = amounts[2 * (rank - 1 - k)] if 2 * (rank - 1 - k) < len(amounts) else 0
        e = E.op("sub", at[k], E.index(low))
        for test in (E.op("ge", e, E.index(0)), E.op("lt", e, E.index(source.shape[k]))):
            if not isinstance(test, E.Const):
                condition = test if isinstance(condition, E.Const) else E.op("and", condition, test)
        inside.append(bounded(e, 0, source.shape[k] - 1))
    fill = convert(constant(call.get("value") or 0, wide(call.dtype)), call.dtype)
    return imp.emit(call, E.where(condition, source.load(tuple(inside)), fill))


__all__ = ["regroup", "flatten", "unflatten", "narrowed", "selected", "dim_of", "variables"]
