"""Rules G1 and G3: every value is defined once, before its use, and is still there when it is used."""

from __future__ import annotations

from ..errors import VerificationError
from ..ir.expr import Load, Var, walk
from ..ir.graph import Attention, Graph, Linear, Node, RowMap, expressions, reads, writes
from ..ir.types import BufferKind
from .expr_rules import Broken, Expressions
from .node_rules import check_buffer, check_node

CALLERS = (BufferKind.PARAM, BufferKind.INPUT, BufferKind.STATE)


def check_buffers(graph: Graph) -> None:
    """G2 for buffers."""
    for name, b in graph.buffers.items():
        if name != b.name:
            raise VerificationError("G2", f"buffer {b.name!r} is filed as {name!r}", origin=b.origin)
        try:
            check_buffer(b, graph.buffers)
        except Broken as error:
            raise VerificationError("G2", str(error), origin=b.origin) from None


def check_nodes(graph: Graph) -> int:
    """G2 for nodes. Number of distinct expressions looked at. Call after check_definitions."""
    ex = Expressions(graph.buffers)
    for node in graph.nodes:
        try:
            check_node(node, graph.buffers, ex)
        except Broken as error:
            raise VerificationError("G2", f"{node.name}: {error}", origin=node.origin) from None
    return ex.distinct


def check_definitions(graph: Graph) -> None:
    """G1: what a node reads exists and was handed in or written before; what it writes, nothing else writes."""
    written: dict[str, str] = {}
    seen: set[str] = set()
    for node in graph.nodes:
        if node.name in seen:
            raise VerificationError("G1", f"two nodes are called {node.name}", origin=node.origin)
        seen.add(node.name)
        for name in (*reads(node), *writes(node)):
            if name not in graph.buffers:
                raise VerificationError("G1", f"{node.name} uses {name!r}, which is no buffer", origin=node.origin)
        own = set(writes(node)) if isinstance(node, Attention) else set()
        for name in reads(node):
            b = graph.buffers[name]
            given = b.kind in CALLERS and b.name == b.storage
            # an attention with an append may name the cache as it is after its own append
            if not given and name not in written and not (name in own and name in (node.keys, node.values)):  # type: ignore[union-attr]
                raise VerificationError(
                    "G1", f"{node.name} reads {name}, which no earlier node writes", origin=node.origin
                )
        for name in writes(node):
            b = graph.buffers[name]
            if b.kind in CALLERS and (b.kind is not BufferKind.STATE or b.name == b.storage):
                what = "a state as the caller passed it" if b.kind is BufferKind.STATE else f"a {b.kind.value}"
                text = f"{node.name} writes {name}, {what}; a mutation makes a new version of a state"
                raise VerificationError("G1", text, origin=node.origin)
            if name in written:
                raise VerificationError("G1", f"{written[name]} and {node.name} both write {name}", origin=node.origin)
            written[name] = node.name
    for o in graph.outputs:
        if o.buffer is None:
            continue
        b = graph.buffers.get(o.buffer)
        if b is None or b.kind is BufferKind.SCRATCH:
            raise VerificationError("G1", f"the graph returns {o.buffer!r}, which is no output and not the caller's")
        if o.buffer not in written and not (b.kind in CALLERS and b.name == b.storage):
            raise VerificationError("G1", f"the graph returns {o.buffer}, which no node writes", origin=b.origin)
    for name, b in graph.buffers.items():
        if b.kind is BufferKind.OUTPUT and name not in written:
            raise VerificationError("G1", f"no node writes output {name}", origin=b.origin)


def check_versions(graph: Graph) -> None:
    """G3: a version of a state is read only until the next one is written; what is returned is the last one."""
    current = {b.storage: b.storage for b in graph.buffers.values() if b.kind is BufferKind.STATE}
    for node in graph.nodes:
        made = {graph.buffers[name].storage: name for name in writes(node)}
        made = {storage: name for storage, name in made.items() if storage in current}
        for name in reads(node):
            storage = graph.buffers[name].storage
            if storage in current and name != current[storage] and name != made.get(storage):
                text = f"{node.name} reads {name} after {current[storage]} has overwritten it"
                raise VerificationError("G3", text, origin=node.origin)
        for storage, name in made.items():
            _in_place(graph, node, storage, name)
            current[storage] = name
    for o in graph.outputs:
        b = graph.buffers[o.buffer] if o.buffer is not None else None
        if b is not None and b.storage in current and b.name != current[b.storage]:
            text = f"the graph returns {b.name}, but its memory holds {current[b.storage]} at the end"
            raise VerificationError("G3", text, origin=b.origin)
    made = {name for node in graph.nodes for name in writes(node)}
    for name, b in graph.buffers.items():
        if name != b.storage and name not in made:
            raise VerificationError("G3", f"no node makes {name}, a version of {b.storage}", origin=b.origin)


def _in_place(graph: Graph, node: Node, storage: str, new: str) -> None:
    """A linear or attention that reads a state and overwrites it reads only the element it is about to write: elements
    are computed in no particular order. A row map reads all before it stores any (and is one task then, rule T9); the
    key loop of an attention leaves out the appended position."""
    if isinstance(node, RowMap):
        return
    if isinstance(node, Linear):
        stores = [p.store for p in node.parts if p.out == new]
    else:
        stores = []
    for ld in (x for e in expressions(node) for x in walk(e) if isinstance(x, Load)):
        if graph.buffers[ld.buffer].storage == storage and (ld.index not in stores or not ld.free <= _scope(node)):
            text = f"{node.name} overwrites {storage} while it reads {ld!r} of it at another index than it stores to"
            raise VerificationError("G3", text, origin=node.origin)


def _scope(node: Linear | Attention) -> frozenset[Var]:
    """Variables that an element of the result has its own value of; others run within an element."""
    if isinstance(node, Linear):
        return frozenset((node.t, *(p.n for p in node.parts)))
    return frozenset((node.b, node.h, node.d))
