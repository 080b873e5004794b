"""What of a Dynamo graph can be captured, node by node, and what splitting it has to respect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import Unsupported
from ..ir.expr import loads, reductions
from ..ir.graph import Attention, Linear, Node, Output, RowMap
from ..ir.types import BufferKind
from . import contraction
from .importer import Importer, live
from .registry import KNOWN_DTYPES, refusal
from .retrace import Placeholder, Traced, held_tensors, retrace
from .values import DTYPES, View, points

Storages = frozenset[int]


@dataclass
class Survey:
    """By node of Dynamo's graph.

    values: what it gives, with fake tensors of the sizes that were looked at. refused: why it cannot be captured.
    views: nodes whose results only show memory that exists already, and that can be captured. same: nodes that hand on
    an argument that they wrote to, and the argument. reads, writes: the storages whose elements it may read, and
    change. effects: nodes that act by more than their results, such as random numbers. work: keys of the kernels that
    a compiler which fuses around matrix products, attention and reductions would need for it. bytes: of weights and
    caches that it streams.
    """

    values: dict[fx.Node, Any]
    refused: dict[fx.Node, Unsupported]
    views: set[fx.Node] = field(default_factory=set)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    reads: dict[fx.Node, Storages] = field(default_factory=dict)
    writes: dict[fx.Node, Storages] = field(default_factory=dict)
    effects: set[fx.Node] = field(default_factory=set)
    work: dict[fx.Node, set[object]] = field(default_factory=dict)
    bytes: dict[fx.Node, int] = field(default_factory=dict)

    def moved(self, to: Mapping[fx.Node, fx.Node]) -> Survey:
        """The same of the nodes that these became."""
        return Survey(
            {to[n]: x for n, x in self.values.items() if n in to},
            {to[n]: why for n, why in self.refused.items()},
            {to[n] for n in self.views if n in to},
            {to[n]: to[a] for n, a in self.same.items()},
            {to[n]: x for n, x in self.reads.items() if n in to},
            {to[n]: x for n, x in self.writes.items() if n in to},
            {to[n] for n in self.effects},
            {to[n]: x for n, x in self.work.items()},
            {to[n]: x for n, x in self.bytes.items()},
        )


def survey(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Survey:
    """Look at every node of `gm` where `capture` stops at the first that it refuses. Inputs are as for `capture`.
    Raises Unsupported for what concerns the graph as a whole, such as autocast."""
    traced = retrace(gm, example_inputs, go_on=True)
    held = list(held_tensors(gm).values())
    found = Survey(traced.results, dict(traced.refused))
    _find_accesses(traced, found)
    importer = _Surveyor(traced, [*example_inputs, *held], len(example_inputs), found)
    importer.finish(importer.walk())
    return found


class _Surveyor(Importer):
    """An import that puts an outside tensor in place of what cannot be imported, and goes on."""

    def __init__(self, traced: Traced, tensors: Sequence[torch.Tensor], inputs: int, found: Survey) -> None:
        super().__init__(traced, tensors, inputs)
        self.found = found
        self.made_for: dict[int, fx.Node] = {}
        self.read_outside: set[str] = set()

    def input(self, node: fx.Node, position: int) -> View | None:
        return super().input(node, position) if node.meta["val"].dtype in DTYPES else None

    def call(self, node: fx.Node) -> Any:
        place, before = node.meta["dynamo"], len(self.nodes)
        try:
            for argument in node.all_input_nodes:
                value = argument.meta["val"]
                if isinstance(value, torch.Tensor) and value.dtype not in DTYPES:
                    raise refusal(node, f"its input has dtype {value.dtype}", KNOWN_DTYPES)
            result = super().call(node)
        except Unsupported as why:
            self.found.refused.setdefault(place, why)
            self._mark_read(node)
            result = self._outside(node, node.meta["val"])
        self.made_for.update((id(made), place) for made in self.nodes[before:])
        return result

    def _mark_read(self, node: fx.Node) -> None:
        for argument in node.all_input_nodes:
            for view in torch.utils._pytree.tree_leaves(self.env.get(argument)):
                if isinstance(view, View):
                    self.read_outside |= {ld.buffer for ld in loads(view.load(points(view.shape)))}

    def _outside(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._outside(node, v) for v in value]
        if not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
            return None
        for argument in node.all_input_nodes:  # what an operator wrote in place
            if argument.meta["val"] is value:
                return self.env[argument]
        self.tensors.append(value)
        return self.bound(Placeholder(node.name, "", static=False), value, len(self.tensors) - 1)

    def finish(self, outputs: tuple[Output, ...]) -> None:
        roots = (*outputs, *(Output(buffer=name) for name in self.read_outside))
        nodes = live(self.nodes, self.buffers, roots)
        for call, why in contraction.too_large(self.products, nodes):
            self.found.refused.setdefault(call.node.meta["dynamo"], why)
        for node in nodes:
            place = self.made_for.get(id(node))
            if place is not None:
                self.found.work.setdefault(place, set()).update(self._kernels(node))
                self.found.bytes[place] = self.found.bytes.get(place, 0) + sum(
                    self.buffers[name].nbytes for name in _streamed(node) if self._is_callers(name)
                )

    def _kernels(self, node: Node) -> Iterator[object]:
        if isinstance(node, Linear):
            yield node.x  # those that read the same vectors are one kernel
        elif isinstance(node, Attention) or (isinstance(node, RowMap) and any(reductions(node.body))):
            yield node.name

    def _is_callers(self, name: str) -> bool:
        return self.buffers[name].kind in (BufferKind.PARAM, BufferKind.INPUT)


def _streamed(node: Node) -> set[str]:
    if isinstance(node, Linear):
        return {w for part in node.parts for w in part.weights}
    if isinstance(node, Attention):
        return {node.keys, node.values}
    if isinstance(node, RowMap):
        return {load.buffer for r in reductions(node.body) for load in loads(r)}
    return set()


def _find_accesses(traced: Traced, found: Survey) -> None:
    """Fill in views, reads, writes and effects from the ATen calls of each node."""
    calls: dict[fx.Node, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_function":
            calls.setdefault(node.meta["dynamo"], []).append(node)
    for place, result in traced.results.items():
        made = calls.get(place, ())
        reads = {s for n in made for a in n.all_input_nodes for s in _storages(a.meta["val"])}
        given = {s for a in place.all_input_nodes for s in _storages(traced.results.get(a))}
        writes = {s for n in made for s in _written(n)}
        if place in traced.refused:  # it may do anything to what it is given
            reads, writes = reads | given, writes | given
        shown = _storages(result)
        found.reads[place], found.writes[place] = frozenset(reads | given), frozenset(writes)
        if shown and shown <= given and not writes:
            found.views.add(place)
        if writes and isinstance(result, torch.Tensor):
            found.same.update((place, a) for a in place.all_input_nodes if traced.results.get(a) is result)
        if any(_acts(n) for n in made):
            found.effects.add(place)


def _storages(value: Any) -> set[int]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return {x.untyped_storage()._cdata for x in leaves if isinstance(x, torch.Tensor)}


def _written(node: fx.Node) -> Iterator[int]:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for k, argument in enumerate(schema.arguments):
        value = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            for leaf in torch.utils._pytree.tree_leaves(value):
                if isinstance(leaf, fx.Node):
                    yield from _storages(leaf.meta["val"])


def _acts(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags or not target._schema.returns
