"""Rule T11: a task that writes elements reads what the graph says these elements are made of.

An access that is not declared makes no event, so a tiling that forgets one gives a race that no other rule can see.
What a task must read follows from what it writes: the store index, turned around, gives the ranges of the loop
variables, and these give the box of every load. Only memory that the program itself writes matters. Exact where
indices are a variable plus a constant; where they are not, the task must at least read some of that buffer. Loads
under a `where` and attention (whose tiles mean what the operator says) are left to rule T10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..ir.expr import Const, Expr, Load, Op, Reduce, Var
from ..ir.graph import Linear, Node, RowMap
from ..ir.region import Box
from ..ir.tasks import Task, TaskGraph
from .accesses import names
from .state_rules import union_volume
from .task_rules import fail

Ranges = dict[Var, tuple[int, int]]
Axis = tuple[Var | None, int, int]
"""Of an index: (variable or None, first value at variable 0, extent at a fixed variable)."""


@dataclass(frozen=True)
class _Need:
    """A load of a buffer: its axes over loop variables, or None where the index is not plain."""

    buffer: str
    storage: str
    axes: tuple[Axis, ...] | None

    def box(self, ranges: Ranges) -> Box | None:
        if self.axes is None or any(v is not None and v not in ranges for v, _, _ in self.axes):
            return None
        return tuple((o, o + n) if v is None else (ranges[v][0] + o, ranges[v][1] + o) for v, o, n in self.axes)


@dataclass(frozen=True)
class _Part:
    """What is stored to one buffer: axes of the store index by dimension, and what its elements need."""

    store: tuple[Axis | None, ...]
    needs: tuple[_Need, ...]

    def ranges(self, box: Box) -> Ranges:
        """Of the variables, where the store says them."""
        return {a[0]: (s - a[1], e - a[1]) for a, (s, e) in zip(self.store, box, strict=True) if a and a[0] is not None}


def check_needed(tg: TaskGraph) -> int:
    """T11 for every task of a row map or linear. Number of boxes compared."""
    written = {tg.buffers[a.buffer].storage for t in tg.tasks for a in t.writes}
    storage_of = {name: b.storage for name, b in tg.buffers.items() if b.storage in written}
    parts = [_parts(node, tg, written) for node in tg.graph.nodes]
    compared = 0
    for t in tg.tasks:
        mine = parts[t.node]
        if not mine:
            continue
        read: dict[str, list[Box]] = {}
        for a in t.reads:
            storage = storage_of.get(a.buffer)
            if storage is not None:  # nothing else is needed
                read.setdefault(storage, []).append(a.box)
        done: set[tuple[str, Box | None]] = set()
        for a in t.writes:
            part = mine.get(a.buffer)
            if part is None or any(s >= e for s, e in a.box):
                continue
            ranges = part.ranges(a.box)
            for need in part.needs:
                box = need.box(ranges)
                if (need.storage, box) in done:
                    continue
                done.add((need.storage, box))
                compared += 1
                _check(tg, t, need, box, read.get(need.storage, []))
    return compared


def _check(tg: TaskGraph, t: Task, need: _Need, box: Box | None, read: list[Box]) -> None:
    if box is None:
        fine = bool(read)
    elif any(s >= e for s, e in box) or box in read:
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
        out[name] = _Part(tuple(axes) if _distinct([a for a in axes if a]) else (None,) * len(axes), tuple(needs))
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
