"""Dynamo's FX graph -> Graph: one node per ATen operator that computes something; views become index maps."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..errors import Unsupported
from ..ir import expr as E
from ..ir.expr import Expr
from ..ir.graph import Graph, Node, Output, RowMap, reads, writes
from ..ir.types import Buffer, BufferKind, DType, buffer
from . import anchors, attention, contraction, create, mutate, pointwise, reduce, views  # noqa: F401  (they fill the table of lowerings)
from .registry import KNOWN_DTYPES, LOWERINGS, Call, bind, refusal
from .retrace import Placeholder, Traced, held_tensors, module_path, retrace, source_line
from .values import DTYPES, Memory, Shape, View, points, variables, whole


@dataclass(frozen=True)
class Alias:
    """A result that shares memory: with the argument at position `argument`, or with the result at position `result`.
    offset: from the start of that tensor, in elements like the strides."""

    argument: int | None
    result: int | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Captured:
    """What capture found.

    graph: the computation, unfused. aliases: results that are views of an argument or of another result, by position;
    the graph gives None for them. arguments: name of each of the caller's storages -> its index among the example
    inputs. constants: name of each storage that is a tensor held by the traced graph -> that tensor; bind it like an
    input. sources: storage name -> the dotted name of what it came from. nodes_total: ATen calls in the traced
    graph. report: lines about the capture, for people.
    """

    graph: Graph
    arguments: dict[str, int]
    constants: dict[str, torch.Tensor]
    sources: dict[str, str]
    nodes_total: int
    report: tuple[str, ...]
    aliases: dict[int, Alias] = field(default_factory=dict)


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Import a graph of Dynamo. Raises Unsupported, naming operator, place and reason, when any part of it cannot
    be captured. Gradients are not looked at: the caller checks that none are needed."""
    traced = retrace(gm, example_inputs)
    constants = list(held_tensors(gm).values())
    return Importer(traced, [*example_inputs, *constants], len(example_inputs)).run()


# calls that only check or switch tracing state, with nothing to compute
_NO_EFFECT = frozenset(
    "_assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range sym_constrain_range_for_size".split()
)
_SKIPPED = frozenset("_set_grad_enabled _enter_autocast _exit_autocast".split())


class Importer:
    """State of one import. Lowerings use `emit`, `store` and `note`."""

    def __init__(self, traced: Traced, tensors: Sequence[torch.Tensor], inputs: int) -> None:
        self.traced, self.tensors, self.inputs = traced, list(tensors), inputs
        self.nodes: list[Node] = []
        self.buffers: dict[str, Buffer] = {}
        self.env: dict[fx.Node, Any] = {}
        self.callers: dict[str, int] = {}  # storage name -> position in `tensors`
        self.sources: dict[str, str] = {}
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        self.products: dict[str, contraction.Product] = {}  # by the buffer of the result
        self.softmaxes: dict[str, reduce.Softmax] = {}
        self.given: dict[str, torch.Tensor] = {}  # by storage name, the fake tensor
        self.aliases: dict[int, Alias] = {}

    def run(self) -> Captured:
        outputs = self.walk()
        self._mark_state()
        nodes = live(self.nodes, self.buffers, outputs)
        for _, why in contraction.too_large(self.products, nodes):
            raise why
        graph = Graph(tuple(nodes), self.buffers, outputs).replace("capture", nodes=tuple(nodes))
        used = {b.storage for b in graph.buffers.values()}
        positions = {name: k for name, k in self.callers.items() if name in used}
        total = sum(self.counts.values())
        counts = ", ".join(f"{n} {op}" for op, n in self.counts.most_common())
        return Captured(
            graph=graph,
            arguments={name: k for name, k in positions.items() if k < self.inputs},
            constants={name: self.tensors[k] for name, k in positions.items() if k >= self.inputs},
            sources={name: s for name, s in self.sources.items() if name in used},
            nodes_total=total,
            aliases=self.aliases,
            report=(f"{total} ATen calls became {len(nodes)} nodes: {counts}", *dict.fromkeys(self.notes)),
        )

    def walk(self) -> tuple[Output, ...]:
        """Import all nodes; the graph's outputs."""
        self._check_devices()
        _drop_unused(self.traced.graph)
        outputs: tuple[Output, ...] = ()
        position = 0
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self.input(node, position)
                position += 1
            elif node.op == "get_attr":
                self.env[node] = self._attribute(node)
            elif node.op == "call_function":
                self.env[node] = self.call(node)
            elif node.op == "output":
                outputs = self._outputs(node)
        return outputs

    # --- what lowerings use ---

    def emit(self, call: Call, body: Expr, *, shape: Shape | None = None, suffix: str = "") -> View:
        """A new tensor of `shape` (default: the call's) with elements `body`, over `variables(shape)`. A body that
        reads nothing is kept as an expression and costs no node."""
        shape = call.shape if shape is None else shape
        name = self.fresh(call.name + suffix)
        if not any(isinstance(e, (E.Load, E.Reduce)) for e in E.walk(body)):
            return whole(Memory(name, body.dtype, shape, body=body))
        self.declare(name, body.dtype, shape, call.origin)
        self.nodes.append(RowMap(name, variables(shape), body, name, points(shape), call.origin))
        return whole(Memory(name, body.dtype, shape, buffer=name))

    def copy(self, call: Call, view: View) -> View:
        """A copy of a tensor, made only when it or its source is written."""
        memory = Memory(call.name, view.dtype, view.shape, source=view)
        view.memory.copies.append(memory)
        return whole(memory)

    def declare(
        self, name: str, dtype: DType, shape: Shape, origin: str, kind: BufferKind = BufferKind.SCRATCH
    ) -> Buffer:
        made = self.buffers[name] = buffer(name, dtype, shape, kind, origin=origin)
        return made

    def fresh(self, name: str) -> str:
        """`name`, or with a number where a buffer has it already."""
        out, k = name, 0
        while out in self.buffers:
            k += 1
            out = f"{name}.{k}"
        return out

    def stored_part(self, view: View, call: Call) -> View:
        """The same tensor, resolvable to elements of one buffer."""
        if view.resolve(points(view.shape)) is None:
            self.materialize(view.memory, call.origin)
        return view

    def is_param(self, memory: Memory) -> bool:
        """Whether a memory is a parameter or buffer of the module that nothing has written so far."""
        held = memory.buffer is not None and self.buffers[memory.buffer].kind is BufferKind.PARAM
        return held and not memory.versions

    def materialize(self, memory: Memory, origin: str) -> None:
        """Give a memory a buffer of its own."""
        if memory.buffer is not None:
            return
        body = whole(memory).load(points(memory.shape))
        name = self.fresh(memory.name)
        self.declare(name, memory.dtype, memory.shape, origin)
        self.nodes.append(RowMap(name, variables(memory.shape), body, name, points(memory.shape), origin))
        memory.buffer, memory.source, memory.body = name, None, None

    def store(self, call: Call, target: View, dims: tuple[E.Var, ...], body: Expr, store: tuple[Expr, ...]) -> None:
        """Write body(dims) to element store(dims) of the memory of `target`, which is the caller's: a new version."""
        memory, old = target.memory, self.buffers[target.memory.buffer or ""]
        elsewhere = [
            ld for ld in E.loads(body) if self.buffers[ld.buffer].storage == old.storage and ld.index != store
        ]
        if elsewhere:  # it would read what it has already overwritten: compute first, then write
            shape = tuple(v.size for v in dims)
            body = self.emit(call, body, shape=shape, suffix=".value").load(points(shape))
        memory.versions += 1
        name = f"{old.storage}@{memory.versions}"
        self.buffers[name] = replace(old, name=name)
        self.nodes.append(RowMap(self.fresh(call.name), dims, body, name, store, call.origin))
        memory.buffer = name

    def before_write(self, memory: Memory, origin: str) -> None:
        """Make the copies that still refer to a memory which is about to change."""
        self.materialize(memory, origin)
        for copy in memory.copies:
            if copy.source is not None:
                if memory.caller:
                    self.materialize(copy, origin)
                else:  # the old buffer stays as it is: refer to that
                    old = Memory(memory.name, memory.dtype, memory.shape, buffer=memory.buffer)
                    copy.source = replace(copy.source, memory=old)
        memory.copies.clear()

    def note(self, text: str) -> None:
        """Add a line to the report."""
        self.notes.append(text)

    # --- FX nodes ---

    def input(self, node: fx.Node, position: int) -> View | None:
        """What stands for an input of the traced graph; None for one that is not used."""
        place, fake = node.meta["placeholder"], node.meta["val"]
        if fake.dtype not in DTYPES:
            if not node.users:
                return None
            raise Unsupported(f"input {place.name} has dtype {fake.dtype}", origin=place.source, remedy=KNOWN_DTYPES)
        return self.bound(place, fake, position)

    def bound(self, place: Placeholder, fake: torch.Tensor, position: int) -> View:
        """The view of a tensor that is bound at launch."""
        shape, name = tuple(fake.shape), self.fresh(place.name)
        kind = BufferKind.PARAM if place.static else BufferKind.INPUT
        self.buffers[name] = buffer(
            name, DTYPES[fake.dtype], shape, kind, strides=tuple(fake.stride()) or None, origin=place.source
        )
        self.callers[name], self.sources[name], self.given[name] = position, place.name, fake
        return whole(Memory(name, DTYPES[fake.dtype], shape, buffer=name, caller=True))

    def _attribute(self, node: fx.Node) -> View:
        """A tensor made from Python numbers: a single number is folded, several are bound like an input."""
        value = self.traced.constants[node.target]  # type: ignore[index]
        if value.dtype not in DTYPES:
            raise refusal(node, f"a constant of dtype {value.dtype}")
        dtype, shape = DTYPES[value.dtype], tuple(value.shape)
        if value.numel() == 1:
            return whole(Memory(node.name, dtype, shape, body=E.const(value.item(), dtype)))
        place = Placeholder(f"{module_path(node)}.{node.name}".strip("."), source_line(node), static=True)
        self.tensors.append(value)
        return self.bound(place, value, len(self.tensors) - 1)

    def call(self, node: fx.Node) -> Any:
        """What a call of the traced graph gives. Raises Unsupported."""
        if node.target is operator.getitem:
            return self.env[node.args[0]][node.args[1]]
        if getattr(node.target, "__name__", "") in _SKIPPED:
            return None
        if not isinstance(node.target, torch._ops.OpOverload):
            raise refusal(node, "not an ATen operator")
        call = bind(node, self._resolve)
        self.counts[call.op] += 1
        if call.op in _NO_EFFECT:
            return None
        lowering = LOWERINGS.get(call.op)
        if lowering is None or node.target.namespace != "aten":
            raise call.refuse(
                "this operator has no lowering", "the fallback runs it; examples/add_an_op.py gives an operator one"
            )
        if _is_empty(node):  # nothing is computed, and nothing written
            return whole(Memory(call.name, call.dtype, call.shape, body=create.fill_value(0, call.dtype)))
        if call.op not in ("cat", "concat") and any(map(_is_empty, node.all_input_nodes)):
            raise call.refuse("a tensor without elements")
        try:
            return lowering(self, call)
        except Unsupported:
            raise
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11
                error.add_note(f"while capturing {node.format_node()} at {call.origin}")
            raise

    def _resolve(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.env[argument]
        if isinstance(argument, (list, tuple)):
            return [self._resolve(a) for a in argument]
        return argument

    def _outputs(self, node: fx.Node) -> tuple[Output, ...]:
        results = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
        self.aliases = self._find_aliases(results)  # type: ignore[arg-type]
        taken: set[str] = set()
        return tuple(
            Output() if k in self.aliases else self._output(node, self._resolve(v), k, taken)
            for k, v in enumerate(results)  # type: ignore[arg-type]
        )

    def _find_aliases(self, results: Sequence[Any]) -> dict[int, Alias]:
        """Results that are views of an argument, or of another result that is whole and contiguous."""
        shown = {k: v for k, r in enumerate(results) if isinstance(v := self._resolve(r), View)}
        fakes = {k: results[k].meta["val"] for k in shown}
        whole_ones: dict[Memory, int] = {}
        for k, v in shown.items():
            if v.whole and not v.memory.caller and fakes[k].is_contiguous():
                whole_ones.setdefault(v.memory, k)
        out: dict[int, Alias] = {}
        for k, v in shown.items():
            argument, result = None, None
            if v.memory.caller:
                storage = self.buffers[v.memory.buffer or ""].storage
                argument, start = self.callers[storage], self.given[storage]
                if v.whole or argument >= self.inputs:
                    continue
            else:
                result = whole_ones.get(v.memory)
                if result is None or result == k:
                    continue
                start = fakes[result]
            if fakes[k].untyped_storage()._cdata == start.untyped_storage()._cdata:  # else a copy, by torch's rules
                offset = fakes[k].storage_offset() - start.storage_offset()
                out[k] = Alias(argument, result, tuple(fakes[k].shape), tuple(fakes[k].stride()), offset)
        return out

    def _output(self, node: fx.Node, value: Any, position: int, taken: set[str]) -> Output:
        if value is None or isinstance(value, (bool, int, float, str)):
            return Output(constant=value)
        if not isinstance(value, View):
            raise refusal(node, f"the graph returns {type(value).__name__}, not a tensor or a number")
        if 0 in value.shape:
            raise refusal(node, "the graph returns a tensor without elements")
        memory = value.memory
        if value.whole and memory.caller:
            return Output(buffer=memory.buffer)
        if value.whole and memory.buffer is not None and memory.buffer not in taken:
            name = memory.buffer
            self.buffers[name] = replace(self.buffers[name], kind=BufferKind.OUTPUT)
        else:
            name = self.fresh(f"output{position}")
            self.declare(name, value.dtype, value.shape, "", BufferKind.OUTPUT)
            body = value.load(points(value.shape))
            self.nodes.append(RowMap(name, variables(value.shape), body, name, points(value.shape)))
        taken.add(name)
        return Output(buffer=name)

    # --- checks and clean-up ---

    def _check_devices(self) -> None:
        devices = {str(t.device) for t in self.tensors}
        if len(devices) > 1:
            raise Unsupported(f"inputs lie on several devices: {', '.join(sorted(devices))}")

    def _mark_state(self) -> None:
        """Storages with a second version are STATE in all versions."""
        mutated = {b.storage for b in self.buffers.values() if b.name != b.storage}
        for name, b in self.buffers.items():
            if b.storage in mutated:
                self.buffers[name] = replace(b, kind=BufferKind.STATE)
        memory_of = {name: _memory_id(self.tensors[k]) for name, k in self.callers.items()}
        for name in mutated:
            memory = memory_of.pop(name)
            shared = [other for other, m in memory_of.items() if m == memory and m is not None]
            if shared:
                raise Unsupported(f"{name} is written in place and shares its memory with {', '.join(shared)}")


def _is_empty(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.numel() == 0


def _memory_id(tensor: torch.Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.numel() else None


def _drop_unused(graph: fx.Graph) -> None:
    """Remove pure calls without users, so that what nobody needs cannot be refused."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            pure = node.target is operator.getitem or (
                isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
            )
            if pure:
                graph.erase_node(node)


def live(nodes: list[Node], buffers: dict[str, Buffer], outputs: tuple[Output, ...]) -> list[Node]:
    """Nodes that an output or a write to the caller's memory depends on, in order."""
    needed = {o.buffer for o in outputs}
    kept: list[Node] = []
    for node in reversed(nodes):
        outs = writes(node)
        if any(o in needed or buffers[o].kind is BufferKind.STATE for o in outs):
            kept.append(node)
            needed.update(reads(node))
    return kept[::-1]
