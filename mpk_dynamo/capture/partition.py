"""Cutting a Dynamo graph into pieces that run one after the other: some are captured, the others are not.

Each node of the graph that computes something has one of two colours. Pieces of one colour take every node that is
ready, then the other colour has its turn, which makes the fewest pieces. A node is ready when what it reads is
computed and when every node before it that shares memory with it has run, if one of the two writes; so in-place
operators keep their order with all readers. Views and numbers cost nothing and are made again in each piece that
needs them, so that only tensors with memory of their own pass from piece to piece.
"""

from __future__ import annotations

import heapq
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .survey import Survey

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_DROPPED = frozenset("_set_grad_enabled _enter_autocast _exit_autocast _log_api_usage_once".split())
"""Calls without a result that the pieces are run without: no piece computes gradients or casts by itself."""


@dataclass(frozen=True)
class Piece:
    """Some nodes of a graph, in the graph's order. `captured`: what becomes of it."""

    nodes: tuple[fx.Node, ...]
    captured: bool


@dataclass(frozen=True)
class Part:
    """A piece as a module of its own: takes the values of `inputs`, returns a tuple with those of `outputs`, nodes of
    the graph that it was cut from. One without nodes in `outputs` only writes in place."""

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


class Partition:
    """The cuts of one graph. `refused`: nodes that no piece may capture."""

    def __init__(self, gm: fx.GraphModule, found: Survey) -> None:
        self.gm, self.found = gm, found
        self.order = {n: k for k, n in enumerate(gm.graph.nodes)}
        self.nodes = [n for n in gm.graph.nodes if n.op.startswith("call_") and not self._dropped(n)]
        self.free = self._find_free()
        self.computed = [n for n in self.nodes if n not in self.free]
        self.before = self._find_dependencies()

    def _is_number(self, node: fx.Node) -> bool:
        value = self.found.values.get(node)
        numbers = value if isinstance(value, (tuple, list)) and value else (value,)  # sizes, too
        return all(isinstance(x, (*_SYMBOLIC, bool, int, float)) for x in numbers)

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.found.values.get(node), torch.Tensor)

    def _dropped(self, node: fx.Node) -> bool:
        return node.op == "call_function" and getattr(node.target, "__name__", "") in _DROPPED

    def _find_free(self) -> set[fx.Node]:
        """Nodes that are made again wherever they are needed."""
        free: set[fx.Node] = set()
        for n in self.nodes:
            if n in self.found.refused or (n not in self.found.views and not self._is_number(n)):
                continue
            tuples = (a for a in n.all_input_nodes if not self._passes(a) and a.op != "get_attr")
            if not self.found.writes.get(n) and all(a in free for a in tuples):
                free.add(n)
        return free

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node's value can go from piece to piece."""
        return self._is_tensor(node) or self._is_number(node)

    def bases(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads, with views, numbers and tensors that were written in place replaced by what they are
        made of."""
        out: dict[fx.Node, None] = {}
        stack = list(reversed(node.all_input_nodes))
        seen: set[fx.Node] = set()
        while stack:
            a = stack.pop()
            if a in seen:
                continue
            seen.add(a)
            if a in self.found.same:
                stack.append(self.found.same[a])
            elif a in self.free:
                stack.extend(reversed(a.all_input_nodes))
            else:
                out[a] = None
        return list(out)

    def _find_dependencies(self) -> dict[fx.Node, set[fx.Node]]:
        computed = set(self.computed)
        before: dict[fx.Node, set[fx.Node]] = {}
        writer: dict[int, fx.Node] = {}
        readers: dict[int, list[fx.Node]] = {}
        last_effect: fx.Node | None = None
        for n in self.computed:
            need = {b for b in self.bases(n) if b in computed}
            writes = self.found.writes.get(n, frozenset())
            for storage in self.found.reads.get(n, frozenset()) | writes:
                if storage in writer:
                    need.add(writer[storage])
            for storage in writes:
                need.update(readers.pop(storage, ()))
                writer[storage] = n
            for storage in self.found.reads.get(n, frozenset()) - writes:
                readers.setdefault(storage, []).append(n)
            if n in self.found.effects:
                if last_effect is not None:
                    need.add(last_effect)
                last_effect = n
            need.discard(n)
            before[n] = need
        return before

    def pieces(self, refused: Iterable[fx.Node]) -> list[Piece]:
        """The fewest pieces in which no captured one has a node of `refused`, in the order in which they run."""
        colour = self._colours(set(refused))
        return min((self._turns(colour, start) for start in (True, False)), key=len)

    def _colours(self, refused: set[fx.Node]) -> dict[fx.Node, bool]:
        colour: dict[fx.Node, bool] = {}
        for n in self.computed:
            parent = n.args[0] if n.target is operator.getitem and n.args else None
            if isinstance(parent, fx.Node) and parent in colour and not self._is_tensor(parent):
                colour[n] = colour[parent]  # a tuple does not pass from piece to piece
            else:
                colour[n] = n not in refused
        return colour

    def _turns(self, colour: dict[fx.Node, bool], turn: bool) -> list[Piece]:
        waiting = {n: len(need) for n, need in self.before.items()}
        behind: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.computed}
        for n, need in self.before.items():
            for other in need:
                behind[other].append(n)
        ready: dict[bool, list[tuple[int, fx.Node]]] = {True: [], False: []}
        for n in self.computed:
            if not waiting[n]:
                heapq.heappush(ready[colour[n]], (self.order[n], n))
        pieces = []
        while ready[True] or ready[False]:
            taken = []
            while ready[turn]:
                _, n = heapq.heappop(ready[turn])
                taken.append(n)
                for other in behind[n]:
                    waiting[other] -= 1
                    if not waiting[other]:
                        heapq.heappush(ready[colour[other]], (self.order[other], other))
            if taken:
                pieces.append(Piece(tuple(sorted(taken, key=self.order.__getitem__)), turn))
            turn = not turn
        return pieces

    def parts(self, pieces: Iterable[Piece]) -> tuple[list[Part], Part]:
        """Each piece as a module, and one more for the results of the graph: views and numbers, made by Python."""
        pieces = list(pieces)
        (end,) = (n for n in self.gm.graph.nodes if n.op == "output")
        wanted: Counter[fx.Node] = Counter()
        for users in (*(p.nodes for p in pieces), (end,)):
            inside = set(users)
            wanted.update({b for n in users for b in self.bases(n) if b not in inside})
        parts = [self._part(p.nodes, tuple(n for n in p.nodes if wanted[n])) for p in pieces]
        return parts, self._part((), (), end)

    def _part(self, nodes: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...], end: fx.Node | None = None) -> Part:
        inside = set(nodes)
        users = nodes if end is None else (end,)
        inputs = {b: None for n in users for b in self.bases(n) if b not in inside and b.op != "get_attr"}
        missing = {s: None for n in inputs for s in self._symbols(n) if s not in inputs}
        inputs = {**missing, **inputs}
        graph, copies = fx.Graph(), {}
        for n in inputs:
            copies[n] = graph.placeholder(n.name)
            copies[n].meta.update(n.meta)
            if hasattr(n, "_dynamo_source"):
                copies[n]._dynamo_source = n._dynamo_source  # type: ignore[attr-defined]

        def copy(n: fx.Node) -> fx.Node:
            if n not in inside and n in self.found.same:
                return copy(self.found.same[n])
            if n not in copies:
                copies[n] = graph.node_copy(n, copy)
            return copies[n]

        for n in nodes:
            copy(n)
        graph.output(tuple(map(copy, outputs)) if end is None else fx.map_arg(end.args[0], copy))
        return Part(fx.GraphModule(self.gm, graph), tuple(inputs), outputs)

    def _symbols(self, node: fx.Node) -> list[fx.Node]:
        """Inputs of the graph that are the symbols in the sizes of a node's value."""
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor):
            return []
        sizes = [s for s in (*value.shape, *value.stride()) if isinstance(s, torch.SymInt)]
        names = {x for s in sizes for x in s.node.expr.free_symbols}
        return [n for n in self.gm.graph.nodes if n.op == "placeholder" and _symbol(n) in names]


def _symbol(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    return value.node.expr if isinstance(value, torch.SymInt) else None


def symbolic_sizes(node: fx.Node) -> list[torch.SymInt]:
    """Sizes and numbers with symbols in a node's value."""
    out = []
    for value in torch.utils._pytree.tree_leaves(node.meta.get("example_value")):
        sizes: Iterable[Any] = value.shape if isinstance(value, torch.Tensor) else (value,)
        out += [s for s in sizes if isinstance(s, torch.SymInt) and s.node.expr.free_symbols]
    return out


