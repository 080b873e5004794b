"""What a task touches: boxes of the loads and stores of expressions over ranges of their variables."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

from ..ir.expr import Const, Expr, Load, Op, Reduce, Var, bounds, linear_terms, walk
from ..ir.region import Access, Box, box_size
from ..ir.types import Buffer

Ranges = Mapping[Var, tuple[int, int]]
"""Half-open [start, stop) of each loop variable."""


def flat_range_boxes(sizes: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The row-major range [start, stop) of a box of `sizes` as at most 2 n - 1 disjoint boxes, in row-major order."""
    if start >= stop:
        return []
    if not sizes:
        return [()]
    inner = math.prod(sizes[1:])
    if len(sizes) == 1:
        return [((start, stop),)]
    first, first_rest = divmod(start, inner)
    last, last_rest = divmod(stop, inner)
    if first == last:
        return [((first, first + 1), *box) for box in flat_range_boxes(sizes[1:], first_rest, last_rest)]
    out: list[Box] = []
    if first_rest:
        out += [((first, first + 1), *box) for box in flat_range_boxes(sizes[1:], first_rest, inner)]
        first += 1
    if first < last:
        out.append(((first, last), *((0, s) for s in sizes[1:])))
    out += [((last, last + 1), *box) for box in flat_range_boxes(sizes[1:], 0, last_rest)]
    return out


def index_box(index: tuple[Expr, ...], shape: tuple[int, ...], ranges: Ranges) -> Box:
    """Bounding box of `index` over `ranges`, clipped to `shape`. A data-dependent dimension has its whole extent."""
    box = []
    for expr, size in zip(index, shape, strict=True):
        limits = bounds(expr, ranges)
        low, high = (0, size - 1) if limits is None else limits
        box.append((max(0, low), max(0, low, min(size, high + 1))))
    return tuple(box)


def loads_over(exprs: Iterable[Expr], ranges: Ranges) -> Iterable[tuple[Load, Ranges]]:
    """Each load in `exprs`, in reading order, with the ranges that hold where it stands: a variable that an enclosing
    reduction binds has its whole range, also when `ranges` narrows a free variable of the same name."""
    seen: set[tuple[Expr, frozenset[Var]]] = set()
    stack: list[tuple[Expr, frozenset[Var]]] = [(e, frozenset()) for e in reversed(tuple(exprs))]
    while stack:
        e, bound = stack.pop()
        if (e, bound) in seen:
            continue
        seen.add((e, bound))
        if isinstance(e, Load):
            yield e, {v: r for v, r in ranges.items() if v not in bound} if bound else ranges
        inside = bound | {e.var} if isinstance(e, Reduce) and e.var in ranges else bound
        stack.extend((c, inside) for c in reversed(e.children))


def read_accesses(exprs: Iterable[Expr], ranges: Ranges, buffers: Mapping[str, Buffer]) -> list[Access]:
    """Bounding boxes of every load in `exprs` (also of those inside load indices), without repeats. Their order
    follows from the structure of `exprs`, not from the names of buffers.

    A load that lies outside its buffer for all of `ranges` is in the branch of a `where` that is not taken."""
    found: dict[str, list[Box]] = {}
    for ld, where in loads_over(exprs, ranges):
        box = index_box(ld.index, buffers[ld.buffer].shape, where)
        if box_size(box):
            found.setdefault(ld.buffer, []).append(box)
    return [Access(name, box) for name, boxes in found.items() for box in maximal(boxes)]


class Sweep:
    """`read_accesses(exprs, {**ranges, over: (start, stop)}, buffers)` for many ranges of one variable.

    The boxes of most loads move with the variable or stay where they are, so where they begin and how they move is
    found once. Where an index depends on the variable in another way, each range is looked at by itself.
    """

    def __init__(self, exprs: tuple[Expr, ...], over: Var, ranges: Ranges, buffers: Mapping[str, Buffer]) -> None:
        self._direct = exprs, over, ranges, buffers
        first = {**ranges, over: (0, 1)}
        # per buffer: for each load (low, high, step) of each dimension, at the variable's first value, and its size
        self._loads: dict[str, list[list[tuple[int, int, int, int]]]] | None = {}
        for ld, where in loads_over(exprs, first):
            axes = [_moves(e, over, where) for e in ld.index]
            if None in axes or (over not in where and any(over in e.free for e in ld.index)):
                self._loads = None
                break
            shape = buffers[ld.buffer].shape
            found = self._loads.setdefault(ld.buffer, [])
            found.append([(*((0, n - 1, 0) if a == () else a), n) for a, n in zip(axes, shape, strict=True)])

    def __call__(self, start: int, stop: int) -> list[Access]:
        if self._loads is None:
            exprs, over, ranges, buffers = self._direct
            return read_accesses(exprs, {**ranges, over: (start, stop)}, buffers)
        out = []
        for name, found in self._loads.items():
            boxes = []
            for axes in found:
                box = []
                for low, high, step, size in axes:
                    if step:
                        low, high = low + step * start, high + step * (stop - 1)
                    low = low if low > 0 else 0
                    high = high + 1 if high < size else size
                    box.append((low, high if high > low else low))
                boxes.append(tuple(box))
            boxes = [box for box in boxes if box_size(box)]
            out += [Access(name, box) for box in (maximal(boxes) if len(boxes) > 1 else boxes)]
        return out


class StoreSweep:
    """`write_accesses(name, store, {**ranges, over: (start, stop)}, buffers)` for many ranges of one variable."""

    def __init__(
        self, name: str, store: tuple[Expr, ...], over: Var, ranges: Ranges, buffers: Mapping[str, Buffer]
    ) -> None:
        self._direct = name, store, over, ranges, buffers
        first = {**ranges, over: (0, 1)}
        axes, shape = [_moves(e, over, first) for e in store], buffers[name].shape
        moving = [i for i, a in enumerate(axes) if a and a[2]]
        self._moving: int | None = None
        if len(moving) == 1 and all(axes):
            (self._moving,) = moving
            low, high, step = axes[self._moving]
            self._box = list(index_box(store, shape, first))
            others = frozenset().union(*(e.free for e in store)) - {over}
            # each value of the variable fills a slice of its own, inside the buffer
            if step != 1 or low != high or low < 0 or low + over.size > shape[self._moving] or (
                box_size(tuple(self._box)) != points(others, ranges)
            ):
                self._moving = None
            self._offset = low

    def __call__(self, start: int, stop: int) -> list[Access]:
        name, store, over, ranges, buffers = self._direct
        if self._moving is None:
            return write_accesses(name, store, {**ranges, over: (start, stop)}, buffers)
        box = self._box.copy()
        box[self._moving] = start + self._offset, stop + self._offset
        return [Access(name, tuple(box))]


def _moves(e: Expr, over: Var, ranges: Ranges) -> tuple[()] | tuple[int, int, int] | None:
    """(low, high, step): the bounds of an index at the first value of a variable and what they gain at the next;
    () where they depend on data; None where it is not as simple."""
    limits = bounds(e, ranges)
    if over not in e.free:
        return () if limits is None else (*limits, 0)
    terms, _ = linear_terms(e)
    if limits is None or terms.get(over, 0) <= 0 or any(over in t.free for t in terms if t is not over):
        return None
    return (*limits, terms[over])


def maximal(boxes: list[Box]) -> list[Box]:
    """The boxes that no other one holds, large ones first, without repeats."""
    if len(boxes) == 1:
        return boxes
    kept: list[Box] = []
    for box in sorted(set(boxes), key=lambda b: (-box_size(b), b)):
        if not any(all(o0 <= s and e <= o1 for (s, e), (o0, o1) in zip(box, other, strict=True)) for other in kept):
            kept.append(box)
    return kept


def store_boxes(store: tuple[Expr, ...], shape: tuple[int, ...], ranges: Ranges) -> list[Box]:
    """Boxes that `store` reaches over `ranges`: exact where the index is affine or splits a variable by `//` and
    `%`; the whole extent in a data-dependent dimension."""
    box = index_box(store, shape, ranges)
    known = [i for i, e in enumerate(store) if bounds(e, ranges) is not None]
    variables = frozenset().union(*(store[i].free for i in known)) if known else frozenset()
    if math.prod(box[i][1] - box[i][0] for i in known) == points(variables, ranges):
        return [box]
    for variable, at in _breaks(store, ranges):
        start, stop = ranges.get(variable, (0, variable.size))
        if start < at < stop:
            below, above = {**ranges, variable: (start, at)}, {**ranges, variable: (at, stop)}
            return store_boxes(store, shape, below) + store_boxes(store, shape, above)
    return [box]


def _breaks(store: tuple[Expr, ...], ranges: Ranges) -> Iterable[tuple[Var, int]]:
    """Values at which cutting a variable's range aligns it with a divisor of the index: the first and the last
    multiple inside the range, coarse divisors first."""
    divisors = {
        (e.children[0], e.children[1].value)
        for x in store
        for e in walk(x)
        if isinstance(e, Op) and e.name in ("floordiv", "mod") and isinstance(e.children[1], Const)
    }
    for x, divisor in sorted(divisors, key=lambda item: (-item[1], repr(item[0]))):
        if isinstance(x, Var):
            start, stop = ranges.get(x, (0, x.size))
            yield x, -(-start // divisor) * divisor
            yield x, stop // divisor * divisor


def write_accesses(name: str, store: tuple[Expr, ...], ranges: Ranges, buffers: Mapping[str, Buffer]) -> list[Access]:
    """Write accesses of `name[store]` over `ranges`."""
    return [Access(name, box) for box in store_boxes(store, buffers[name].shape, ranges)]


def access_bytes(accesses: Iterable[Access], buffers: Mapping[str, Buffer]) -> int:
    """Bytes of the boxes. Counts the whole extent of data-dependent dimensions, an upper bound."""
    return sum(box_size(a.box) * buffers[a.buffer].dtype.itemsize for a in accesses)


def gathered_bytes(exprs: Iterable[Expr], ranges: Ranges, buffers: Mapping[str, Buffer]) -> int:
    """Bytes the loads of `exprs` move: like their boxes, but a data-dependent dimension counts one row for each
    point of the variables it depends on, not the whole extent (a gather touches few rows of a table)."""
    total: dict[tuple[str, Box], int] = {}
    for ld, where in loads_over(exprs, ranges):
        shape = buffers[ld.buffer].shape
        box, size, gathered = index_box(ld.index, shape, where), 1, frozenset()
        for expr, (start, stop) in zip(ld.index, box, strict=True):
            if bounds(expr, where) is None:
                gathered |= expr.free
            else:
                size *= stop - start
        size *= points(gathered, where)
        total[ld.buffer, box] = min(size, box_size(box)) * buffers[ld.buffer].dtype.itemsize
    return sum(total.values())


def arithmetic(exprs: Iterable[Expr], ranges: Ranges) -> int:
    """Floating-point operations of evaluating `exprs` once over `ranges`, each common sub-expression once.
    Casts and integer index arithmetic count nothing."""
    return _arithmetic(tuple(exprs), tuple((v, stop - start) for v, (start, stop) in ranges.items()))


@functools.lru_cache(maxsize=1024)
def _arithmetic(exprs: tuple[Expr, ...], extents: tuple[tuple[Var, int], ...]) -> int:
    # where a range lies does not matter, so the tasks of a node have few distinct counts
    ranges = {v: (0, extent) for v, extent in extents}
    seen: set[tuple[Expr, frozenset[Var]]] = set()
    total = 0
    stack: list[tuple[Expr, frozenset[Var]]] = [(e, frozenset()) for e in exprs]
    while stack:
        e, bound = stack.pop()
        if (e, bound) in seen:
            continue
        seen.add((e, bound))
        inside = bound | {e.var} if isinstance(e, Reduce) else bound
        if isinstance(e, Reduce) or (isinstance(e, Op) and e.name != "cast"):
            if e.children[-1].dtype.is_float:
                narrowed = {v: r for v, r in ranges.items() if v not in inside}
                total += points(e.children[0].free if isinstance(e, Reduce) else e.free, narrowed)
        stack.extend((c, inside) for c in e.children)
    return total


def points(variables: Iterable[Var], ranges: Ranges) -> int:
    """Number of points of the variables' ranges."""
    return math.prod(stop - start for start, stop in (ranges.get(v, (0, v.size)) for v in variables))
