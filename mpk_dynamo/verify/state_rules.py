"""Rule T6 for STATE: a new version is written where the graph says, with nothing left out.

A node need not write all of a state (a cache append writes one row), so the whole shape is no measure. The region
comes from the node's own store index, where that is plain enough to say it exactly.
"""

from __future__ import annotations

from ..errors import VerificationError
from ..ir.expr import Const, Expr, Var, loads
from ..ir.graph import Attention, ExtensionNode, Linear, Node, RowMap, writes
from ..ir.region import Box
from ..ir.tasks import TaskGraph
from ..ir.types import BufferKind
from .accesses import Storage


def check_states(tg: TaskGraph, storages: list[Storage]) -> None:
    """The boxes written of each version fill the region its node stores to, and no more."""
    groups: dict[str, list[Box]] = {}
    for s in storages:
        for g in s.writes:
            groups.setdefault(g.buffer.name, []).append(g.access.box)
    for node in tg.graph.nodes:
        for name, box in stored(node, tg):
            boxes = groups.get(name, [])
            # T4 has ordered overlapping writes; writing an element twice in order is allowed, leaving one out is not
            union, want = union_volume(boxes), union_volume([box])
            hull = (
                tuple((min(x for x, _ in d), max(y for _, y in d)) for d in zip(*boxes, strict=True)) if boxes else box
            )
            if union != want or (want and hull != box):
                text = f"tasks write {union} elements of {name}, within {_show(hull)}; the graph stores to {_show(box)}"
                raise VerificationError("T6", text, origin=node.origin)


def _show(box: Box) -> str:
    return "[" + ", ".join(f"{s}:{e}" for s, e in box) + "]"


def union_volume(boxes: list[Box]) -> int:
    """Elements in any of the boxes: by slabs along the first dimension."""
    if not boxes:
        return 0
    if not boxes[0]:
        return 1
    edges = sorted({x for b in boxes for x in b[0]})
    total = 0
    for start, stop in zip(edges, edges[1:], strict=False):
        inside = [b[1:] for b in boxes if b[0][0] <= start and b[0][1] >= stop]
        total += (stop - start) * union_volume(list(dict.fromkeys(inside)))
    return total


def stored(node: Node, tg: TaskGraph) -> list[tuple[str, Box]]:
    """(version, box) for each STATE the node writes, where the box is known exactly. Position-dependent dimensions
    have their whole extent, as accesses with a partition do."""
    if isinstance(node, ExtensionNode):  # writes all of what it writes
        states = [tg.buffers[name] for name in writes(node) if tg.buffers[name].kind is BufferKind.STATE]
        return [(b.name, tuple((0, size) for size in b.shape)) for b in states]
    if isinstance(node, RowMap):
        found = [(node.out, node.store)]
    elif isinstance(node, Linear):
        found = [(p.out, p.store) for p in node.parts if sum(q.out == p.out for q in node.parts) == 1]
    else:
        assert isinstance(node, Attention)
        found = [(node.append.keys, node.key_index), (node.append.values, node.value_index)] if node.append else []
    free = {node.s} if isinstance(node, Attention) else set()
    out = []
    for name, index in found:
        box = _exact(index, tg.buffers[name].shape, free)
        if tg.buffers[name].kind is BufferKind.STATE and box is not None:
            out.append((name, box))
    return out


def _exact(index: tuple[Expr, ...], shape: tuple[int, ...], free: set[Var]) -> Box | None:
    box: list[tuple[int, int]] = []
    used: set[Var] = set()
    for e, size in zip(index, shape, strict=True):
        base, offset = e, 0
        if not isinstance(e, Var) and len(e.children) == 2 and getattr(e, "name", "") == "add":
            left, right = e.children
            if isinstance(right, Const):
                base, offset = left, right.value
        if isinstance(base, Const):
            box.append((base.value, base.value + 1))
        elif isinstance(base, Var) and base in free:
            box.append((0, size))
        elif isinstance(base, Var) and base not in used:
            used.add(base)
            box.append((offset, offset + base.size))
        elif loads(e):
            box.append((0, size))  # a position that only the device knows
        else:
            return None
    return tuple(box)
