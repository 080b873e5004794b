"""Rule T11: a task that writes elements reads what the graph says these elements are made of.

An access that is not declared makes no event, so a tiling that forgets one gives a race that no other rule can see.
What a task must read follows from what it writes: the store index, turned around, gives the ranges of the loop
variables, and these give the box of every load. Only memory that the program itself writes matters. Exact where
indices are a variable plus a constant, or a sum that leaves out nothing between its ends; where they are not, the task
must at least read some of that buffer. Loads under a `where` are left to rule T10.

An attention task has the heads whose keys it declares to read, and needs all keys and values of them: which are live is
found on the device. Partial results (buffers that tiling added) must be read whole, by whichever tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..ir.expr import Const, Expr, Load, Op, Reduce, Var, linear_terms
from ..ir.graph import Attention, Linear, Node, RowMap, expressions
from ..ir.region import Box
from ..ir.tasks import Task, TaskGraph
from .accesses import names
from .state_rules import union_volume
from .task_rules import fail

Ranges = dict[Var, tuple[int, int]]
Axis = tuple[Var | None, int, int]
"""Of an index: (variable or None, first value at variable 0, extent at a fixed variable)."""

Sum = tuple[tuple[tuple[Var, int], ...], int]
"""Of an index: variables with their factors, by ascending factor, and a constant."""


@dataclass(frozen=True)
class _Need:
    """A load of a buffer: its axes over loop variables, or None where the index is not plain; then, where they are
    sums, these."""

    buffer: str
    storage: str
    axes: tuple[Axis, ...] | None
    sums: tuple[Sum, ...] | None = None

    def box(self, ranges: Ranges) -> Box | None:
        if self.sums is not None:
            spans = [_span(s, ranges) for s in self.sums]
            return None if None in spans else tuple(spans)  # type: ignore[arg-type]
        if self.axes is None or any(v is not None and v not in ranges for v, _, _ in self.axes):
            return None
        return tuple((o, o + n) if v is None else (ranges[v][0] + o, ranges[v][1] + o) for v, o, n in self.axes)


@dataclass(frozen=True)
class _Part:
    """What is stored to one buffer: axes of the store index by dimension, and what its elements need: the same boxes
    whichever elements are written, and others."""

    store: tuple[Axis | None, ...]
    fixed: tuple[tuple[_Need, Box], ...]
    needs: tuple[_Need, ...]

    @staticmethod
    def of(store: tuple[Axis | None, ...], needs: Iterable[_Need]) -> "_Part":
        boxes = {n: n.box({}) if n.axes is not None else None for n in needs}
        fixed = tuple((n, b) for n, b in boxes.items() if b is not None)
        return _Part(store, fixed, tuple(n for n, b in boxes.items() if b is None))

    def ranges(self, box: Box) -> Ranges:
        """Of the variables, where the store says them."""
        return {a[0]: (s - a[1], e - a[1]) for a, (s, e) in zip(self.store, box, strict=True) if a and a[0] is not None}


def check_needed(tg: TaskGraph) -> int:
    """T11 for every task of a row map or linear. Number of boxes compared."""
    written = {tg.buffers[a.buffer].storage for t in tg.tasks for a in t.writes}
    storage_of = {name: b.storage for name, b in tg.buffers.items() if b.storage in written}
    parts = [_parts(node, tg, written) for node in tg.graph.nodes]
    heads = {i: _Heads(node, tg, written) for i, node in enumerate(tg.graph.nodes) if isinstance(node, Attention)}
    compared = check_partial(tg)
    for t in tg.tasks:
        mine, attention = parts[t.node], heads.get(t.node)
        if attention is not None:
            needed = attention.needed(t)
        elif mine:
            needed = []
            for a in t.writes:
                part = mine.get(a.buffer)
                if part is None or any(s >= e for s, e in a.box):
                    continue
                needed += part.fixed
                if part.needs:
                    ranges = part.ranges(a.box)
                    needed += [(need, need.box(ranges)) for need in part.needs]
        else:
            continue
        if not needed:
            continue
        read: dict[str, list[Box]] = {}
        for a in t.reads:
            storage = storage_of.get(a.buffer)
            if storage is not None:  # nothing else is needed
                read.setdefault(storage, []).append(a.box)
        compared += len(needed)
        for need, box in needed:
            if box is None or box not in read.get(need.storage, ()):
                _check(tg, t, need, box, read.get(need.storage, []))
    return compared


def _check(tg: TaskGraph, t: Task, need: _Need, box: Box | None, read: list[Box]) -> None:
    if box is None:
        fine = bool(read)
    elif any(s >= e for s, e in box):
        fine = True
    else:
        inside = [tuple((max(s, x), min(e, y)) for (s, e), (x, y) in zip(box, r, strict=True)) for r in read]
        inside = [b for b in inside if all(s < e for s, e in b)]
        fine = box in inside or union_volume(inside) == union_volume([box])
    if not fine:
        needs = "some of it" if box is None else f"[{', '.join(f'{s}:{e}' for s, e in box)}]"
        text = f"{names(tg, [t.id])} needs {need.buffer}: {needs}; it declares to read "
        text += f"{[list(b) for b in read]}" if read else "none of it"
        raise fail("T11", tg, t, text)


def check_partial(tg: TaskGraph) -> int:
    """Every element of a buffer that tiling added is read: a sum that leaves out a part is wrong."""
    added = {b.storage for name, b in tg.buffers.items() if name not in tg.graph.buffers}
    boxes: dict[str, dict[Box, Task]] = {}
    for t in tg.tasks if added else ():
        for a in t.reads:
            if tg.buffers[a.buffer].storage in added:
                boxes.setdefault(a.buffer, {})[a.box] = t
    known: dict[tuple[Box, ...], int] = {}  # layers repeat
    for name in sorted(added):
        read, b = boxes.get(name, {}), tg.buffers[name]
        union = known.get(tuple(read))
        if union is None:
            union = known[tuple(read)] = union_volume(list(read))
        if union != b.numel:
            task = next(iter(read.values()), None)
            text = f"tasks read {union} of {b.numel} elements of {name}, which are partial results"
            raise fail("T11", tg, task, text)
    return len(added)


class _Heads:
    """What the tasks of an attention load from memory that the program writes, keys and values among it."""

    def __init__(self, node: Attention, tg: TaskGraph, written: set[str]) -> None:
        self._node = node
        self._known: dict[Box, list[tuple[_Need, Box | None]]] = {}  # by keys: splits of a head need the same
        full = frozenset({node.d, node.s})
        needs: dict[_Need, None] = {}
        for e in expressions(node):
            if e in node.store:
                continue
            for ld, bound in _loads(e, full):
                need = _need(ld.buffer, ld.index, bound, tg, written)
                if need:
                    needs[need] = None
        for name, index in ((node.keys, node.key_index), (node.values, node.value_index)):
            need = _need(name, index, full, tg, written)
            if need:
                needs[need] = None
        self._needs = tuple(needs)

    def needed(self, t: Task) -> list[tuple[_Need, Box | None]]:
        """For a task that attends: the caches of its heads, and what goes into their queries, masks and new rows."""
        keys = self._node.keys
        mine = next((a.box for a in t.reads if a.buffer == keys), None)
        if mine is None:
            return []  # merges partial results
        found = self._known.get(mine)
        if found is None:
            ranges = self._ranges(mine)
            found = self._known[mine] = [(n, n.box(ranges)) for n in self._needs] if ranges is not None else []
        return found

    def _ranges(self, mine: Box) -> Ranges | None:
        node = self._node
        if any(s >= e for s, e in mine):
            return None
        ranges: Ranges = {node.s: (0, node.s.size), node.d: (0, node.d.size), node.b: (0, 0), node.h: (0, 0)}
        for e, span in zip(node.key_index, mine, strict=True):
            axis = _axis(e, frozenset({node.s, node.d}))
            if axis is not None and axis[0] in (node.b, node.g):
                ranges[axis[0]] = span[0] - axis[1], span[1] - axis[1]
        for v in (node.b, node.g):
            if v.size == 1:
                ranges[v] = 0, 1
        if node.g not in ranges or ranges[node.b] == (0, 0):
            return None
        group = node.h.size // node.g.size
        ranges[node.h] = ranges[node.g][0] * group, ranges[node.g][1] * group
        return ranges


def _need(
    buffer: str, index: tuple[Expr, ...], bound: frozenset[Var], tg: TaskGraph, written: set[str]
) -> _Need | None:
    storage = tg.buffers[buffer].storage
    if storage not in written:
        return None
    axes = [_axis(i, bound) for i in index]
    if None not in axes and _distinct([a for a in axes if a is not None]):
        return _Need(buffer, storage, tuple(axes))  # type: ignore[arg-type]
    sums = [_sum(i) for i in index]
    if None in sums:
        return _Need(buffer, storage, None)
    variables = [v for terms, _ in sums if terms for v, _ in terms]  # type: ignore[misc]
    exact = len(set(variables)) == len(variables)
    return _Need(buffer, storage, None, tuple(sums) if exact else None)  # type: ignore[arg-type]


def _sum(e: Expr) -> Sum | None:
    """The index as a sum of variables with positive factors, or None."""
    terms, constant = linear_terms(e)
    if any(not isinstance(v, Var) or c < 0 for v, c in terms.items()):
        return None
    return tuple(sorted(((v, c) for v, c in terms.items()), key=lambda x: x[1])), constant  # type: ignore[misc]


def _span(s: Sum, ranges: Ranges) -> tuple[int, int] | None:
    """The values of a sum, when these are all integers from the first to the last."""
    low, wide = s[1], 0
    for v, factor in s[0]:
        start, stop = ranges.get(v, (0, v.size))
        if factor > wide + 1 and stop - start > 1:
            return None
        low, wide = low + factor * start, wide + factor * (stop - start - 1)
    return low, low + wide + 1


def _parts(node: Node, tg: TaskGraph, written: set[str]) -> dict[str, _Part]:
    """By buffer written. A buffer that several parts of a linear store to is left out: whose element is whose is not
    known from the box."""
    if isinstance(node, RowMap):
        stores = [(node.out, node.store, (node.body, *node.store), {})]
    elif isinstance(node, Linear):
        outs = [p.out for p in node.parts]
        stores = [
            (p.out, p.store, (node.x, p.epilogue, *p.store), {node.k: (0, node.k.size)})
            for p in node.parts
            if outs.count(p.out) == 1
        ]
    else:
        return {}
    out = {}
    for name, store, exprs, full in stores:
        needs: dict[_Need, None] = {}
        for e in exprs:
            for ld, bound in _loads(e, frozenset(full)):
                storage = tg.buffers[ld.buffer].storage
                if storage in written:
                    axes = [_axis(i, bound) for i in ld.index]
                    plain = None not in axes and _distinct([a for a in axes if a is not None])
                    needs[_Need(ld.buffer, storage, tuple(axes) if plain else None)] = None  # type: ignore[arg-type]
        axes = [_axis(i, frozenset()) for i in store]
        distinct = _distinct([a for a in axes if a])
        out[name] = _Part.of(tuple(axes) if distinct else (None,) * len(axes), needs)
    return out


def _loads(e: Expr, bound: frozenset[Var]) -> Iterator[tuple[Load, frozenset[Var]]]:
    """Loads that are always evaluated, with the variables that run over their whole range where they stand."""
    stack, seen = [(e, bound)], set()
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        e, bound = item
        if isinstance(e, Load):
            yield e, bound
        if isinstance(e, Op) and e.name == "where":
            stack.append((e.children[0], bound))
        else:
            inner = bound | {e.var} if isinstance(e, Reduce) else bound
            stack.extend((c, inner) for c in e.children)


def _axis(e: Expr, bound: frozenset[Var]) -> Axis | None:
    """An index that is a constant, or a variable plus a constant; a bound variable has its whole range."""
    offset = 0
    if isinstance(e, Op) and e.name == "add" and isinstance(e.children[1], Const):
        e, offset = e.children[0], e.children[1].value
    if isinstance(e, Const):
        return None, e.value + offset, 1
    if isinstance(e, Var) and e.size == 1:
        return None, offset, 1
    if isinstance(e, Var):
        return (None, offset, e.size) if e in bound else (e, offset, 1)
    return None


def _distinct(axes: list[Axis]) -> bool:
    variables = [v for v, _, _ in axes if v is not None]
    return len(set(variables)) == len(variables)
