"""A graph under edit: who writes and who reads each buffer, and which node must run before which.

Passes change nodes through `Flow` and take the result with `Flow.graph`, which puts the nodes in a valid order.
Three kinds of edges order nodes. Flow: the writer of a buffer comes before its readers. Write after read: readers
of version v of a storage come before the writer of version v + 1, which overwrites it. Write after write: versions
are written in their order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from ...errors import Unsupported
from ...ir.expr import Load, walk
from ...ir.graph import ExtensionNode, Graph, Linear, Node, RowMap, buffers_read, writes
from ...ir.types import Buffer, BufferKind


class Flow:
    """Editable view of a Graph. Nodes have numbers that stay the same while others are replaced or removed."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.buffers: dict[str, Buffer] = dict(graph.buffers)
        self._nodes: dict[int, Node] = dict(enumerate(graph.nodes))
        self._fixed = {o.buffer for o in graph.outputs if o.buffer is not None}
        for node in graph.nodes:
            if isinstance(node, ExtensionNode):  # no pass knows what to rewrite in it
                self._fixed.update(buffers_read(node), writes(node))
        self._writer: dict[str, int] = {}
        self._readers: dict[str, dict[int, None]] = {}
        self._reads: dict[int, frozenset[str]] = {}
        self._next: dict[str, str] = {}  # version -> the version that overwrites it
        self._previous: dict[str, str] = {}
        self._place: dict[int, float] = {i: i for i in self._nodes}  # where a node stands when nothing forbids it
        self._before: dict[int, int] = {}  # number -> bit set of the numbers that must run before it
        newest: dict[str, str] = {}
        for name, b in self.buffers.items():
            if b.kind is BufferKind.STATE and name == b.storage:
                newest[b.storage] = name
        for i, node in self._nodes.items():
            for name in writes(node):
                self._writer[name] = i
                if self.buffers[name].kind is BufferKind.STATE:
                    storage = self.buffers[name].storage
                    if storage in newest:
                        self._next[newest[storage]] = name
                        self._previous[name] = newest[storage]
                    newest[storage] = name
            self._index_reads(i, node)

    # --- looking ---

    def __iter__(self) -> Iterator[tuple[int, Node]]:
        """(number, node) of all nodes, as they were ordered; safe against edits while iterating."""
        for i in list(self._nodes):
            if i in self._nodes:
                yield i, self._nodes[i]

    def __contains__(self, i: int) -> bool:
        return i in self._nodes

    def __getitem__(self, i: int) -> Node:
        return self._nodes[i]

    def numbers(self) -> list[int]:
        """Numbers of all nodes, as they were ordered."""
        return list(self._nodes)

    def writer(self, name: str) -> int | None:
        """Number of the node that writes a buffer; None for what the caller hands in."""
        return self._writer.get(name)

    def readers(self, name: str) -> list[int]:
        """Numbers of the nodes that read a buffer, in order."""
        return sorted(self._readers.get(name, ()))

    def overwritten(self, name: str) -> str | None:
        """The version of a STATE tensor that writing this version overwrites."""
        return self._previous.get(name)

    def is_internal(self, name: str) -> bool:
        """Whether only nodes that passes can rewrite see the buffer, so that it may change or disappear."""
        return self.buffers[name].kind is BufferKind.SCRATCH and name not in self._fixed

    # --- order ---

    def must_precede(self, first: int, second: int) -> bool:
        """Whether `first` has to run before `second`."""
        return bool(self._ancestors()[second] >> first & 1)

    def allows(self, i: int, node: Node) -> bool:
        """Whether node i can become `node`: what that reads is written before it and not overwritten before it,
        neither by another node nor, at other elements, by itself."""
        before = self._ancestors()
        for name in buffers_read(node) - self._reads[i]:
            writer, overwriter = self._writer.get(name), self._writer.get(self._next.get(name, ""))
            if writer is not None and (writer == i or before[writer] >> i & 1):
                return False
            if overwriter is not None and overwriter != i and before[i] >> overwriter & 1:
                return False
        return self.overwrites_only_what_it_read(node)

    def can_join(self, numbers: Iterable[int]) -> bool:
        """Whether the nodes can become one: no path between two of them leads through a node outside."""
        group = set(numbers)
        mask = sum(1 << i for i in group)
        before = self._ancestors()
        return not any(before[p] & mask for i in group for p in self._predecessors(i) if p not in group)

    def overwrites_only_what_it_read(self, node: Node) -> bool:
        """Whether a node that writes in place reads that memory only at the element it is about to write."""
        written = {self.buffers[name].storage for name in writes(node) if self.buffers[name].kind is BufferKind.STATE}
        if not written:
            return True
        if isinstance(node, RowMap):
            sources = [(node.body, node.store)]
        elif isinstance(node, Linear):
            sources = [(node.x, None), *((p.epilogue, p.store) for p in node.parts)]
        else:
            held = (node.q, node.mask, node.first, node.last, node.append and node.append.key)
            held += (node.append and node.append.value, node.append and node.append.position)
            sources = [(e, None) for e in held if e is not None]
        return not any(
            isinstance(e, Load) and self.buffers[e.buffer].storage in written and e.index != store
            for source, store in sources
            if any(self.buffers[name].storage in written for name in source.buffers)
            for e in walk(source)
        )

    # --- editing ---

    def replace(self, i: int, node: Node) -> None:
        """Node i becomes `node`, which writes at least the same buffers or takes over those of removed nodes."""
        self.join((), i, node)

    def join(self, others: Iterable[int], into: int, node: Node) -> None:
        """Nodes `others` and `into` become one, `node`, with the number of `into`."""
        gone = [i for i in others if i != into]
        group = sum(1 << i for i in (*gone, into))
        for i in gone:
            self._forget(i)
        self._forget_reads(into)
        self._nodes[into] = node
        for name in writes(node):
            self._writer[name] = into
        self._index_reads(into, node)
        if self._before:
            before, old = self._before, self._before[into]
            for i in gone:
                before.pop(i)
            for p in self._predecessors(into):
                before[into] |= before[p] | 1 << p
            before[into] &= ~group
            if gone or before[into] != old:
                moved = before[into] | group
                for i, bits in before.items():
                    if bits & group:
                        before[i] = bits | moved
            for name in self._reads[into]:
                overwriter = self._writer.get(self._next.get(name, ""))
                if overwriter is not None and overwriter != into and not before[overwriter] >> into & 1:
                    self._precedes(into, overwriter)

    def add(self, node: Node, buffers: Iterable[Buffer], before: int) -> int:
        """A new node and the buffers it writes, to stand before node `before`. Returns its number."""
        for b in buffers:
            self.buffers[b.name] = b
        i = max(self._nodes, default=-1) + 1
        self._nodes[i] = node
        self._place[i] = self._place[before] - 0.5
        for name in writes(node):
            self._writer[name] = i
        self._index_reads(i, node)
        self._before = {}
        return i

    def remove(self, i: int) -> None:
        """Remove a node whose results nothing reads."""
        self._forget(i)
        self._before.pop(i, None)

    def postpone_unneeded(self, before: int) -> None:
        """Let nodes that no other has to wait for stand just before node `before`, where they may."""
        needed = {p for i in self._nodes for p in self._predecessors(i)}
        for i in self._nodes.keys() - needed - {before}:
            self._place[i] = max(self._place[i], self._place[before] - 0.5)

    def graph(self, provenance: str) -> Graph:
        """The edited graph in a valid order, as close to the old one as possible."""
        order = self.order()
        return self._graph.replace(provenance, nodes=tuple(self._nodes[i] for i in order), buffers=self.buffers)

    def order(self) -> list[int]:
        """Numbers in a valid order, the old one where there is a choice. Raises Unsupported when there is none."""
        waits: dict[int, int] = {}
        after: dict[int, list[int]] = {i: [] for i in self._nodes}
        for i in self._nodes:
            predecessors = self._predecessors(i)
            waits[i] = len(predecessors)
            for p in predecessors:
                after[p].append(i)
        ready = [(self._place[i], i) for i, n in waits.items() if n == 0]
        heapq.heapify(ready)
        out = []
        while ready:
            _, i = heapq.heappop(ready)
            out.append(i)
            for j in after[i]:
                waits[j] -= 1
                if waits[j] == 0:
                    heapq.heappush(ready, (self._place[j], j))
        if len(out) != len(self._nodes):
            stuck = min(self._nodes.keys() - set(out))
            node = self._nodes[stuck]
            raise Unsupported(
                f"{node.name} reads a tensor that is overwritten in place by something it depends on",
                origin=node.origin,
                remedy="make the model clone the tensor before it writes it",
            )
        return out

    # --- inside ---

    def _index_reads(self, i: int, node: Node) -> None:
        self._reads[i] = buffers_read(node)
        for name in self._reads[i]:
            self._readers.setdefault(name, {})[i] = None

    def _forget_reads(self, i: int) -> None:
        for name in self._reads.pop(i):
            self._readers[name].pop(i, None)

    def _forget(self, i: int) -> None:
        self._forget_reads(i)
        for name in writes(self._nodes.pop(i)):
            if self._writer.get(name) == i:
                del self._writer[name]

    def _predecessors(self, i: int) -> set[int]:
        out = {self._writer[name] for name in self._reads[i] if name in self._writer}
        for name in writes(self._nodes[i]):
            old = self._previous.get(name)
            if old is not None:
                out.update(self._readers.get(old, ()))
                if old in self._writer:
                    out.add(self._writer[old])
        out.discard(i)
        return out

    def _ancestors(self) -> dict[int, int]:
        if not self._before:
            for i in self.order():
                bits = 0
                for p in self._predecessors(i):
                    bits |= self._before[p] | 1 << p
                self._before[i] = bits
        return self._before

    def _precedes(self, first: int, second: int) -> None:
        before = self._before
        bits = before[first] | 1 << first
        before[second] |= bits
        for i, known in before.items():
            if known >> second & 1:
                before[i] = known | bits
