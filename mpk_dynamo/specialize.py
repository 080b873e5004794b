"""Symbolic sizes and numbers. After a size or a Python number changed, Dynamo hands out graphs with symbols in place
of it (automatic dynamic shapes). A program is for fixed sizes: it is made for the present ones, and which program a
call needs is looked up by the sizes that it comes with (by_size.py). Where they change with each call the symbols
stay, and what depends on them is left out (split.py); those that a growing cache keeps, its batch, are no such sizes.
Numbers that only lead to numbers which the graph returns (a cache that counts its tokens in Python) are left alone:
these outputs are computed by Python on each call, and one program serves every value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
NUMBERS = (*_SYMBOLIC, bool, int, float)


def has_symbols(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a size of the graph's inputs is symbolic, or an input is a number, in a tensor or not."""
    values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    numbers = any(isinstance(x, NUMBERS) for x in example_inputs) or bool(_wrapped(gm))
    return numbers or any(_symbols(v) for v in values)


def _wrapped(gm: torch.fx.GraphModule) -> dict[torch.fx.Node, int]:
    """Calls of `item` on a number that comes as a tensor, as Dynamo hands over floats that may change, and the position
    of that tensor among the inputs."""
    position = {n: k for k, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    found = {}
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "item" and node.args[0] in position:
            value = node.args[0].meta.get("example_value")
            if isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype is torch.float64:
                found[node] = position[node.args[0]]
    return found


def fix_numbers(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[torch.fx.GraphModule, list[torch.Tensor], list[int], dict[torch.fx.Node, torch.fx.Node]]:
    """The graph with each number among its inputs replaced by its present value, without adding a guard; the inputs
    that are left, their positions among the original ones, and the node that each of its nodes is a copy of."""
    fixed = torch.fx.GraphModule(gm, torch.fx.Graph())
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    graph, inputs, positions = fixed.graph, [], []
    numbers: dict[torch.fx.Node, Any] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    numbers.update({item: example_inputs[k].item() for item, k in _wrapped(gm).items()})
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if node.users and numbers.keys() >= node.users.keys():
            numbers[node] = value
        elif isinstance(value, torch.Tensor):
            inputs.append(value)
            positions.append(position)
        else:
            numbers[node] = hint(value)

    def argument(node: torch.fx.Node) -> Any:
        return numbers[node] if node in numbers else values[node]

    stale = any(type(v) in (bool, int, float) for v in example_inputs)
    for node in gm.graph.nodes:
        if node in numbers:
            continue
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], argument))
            continue
        values[node] = graph.node_copy(node, argument)
        if hasattr(node, "_dynamo_source"):
            values[node]._dynamo_source = node._dynamo_source
        if stale and _symbols(values[node].meta.get("example_value")):
            del values[node].meta["example_value"]  # it was for other numbers
    fixed.recompile()
    return fixed, inputs, positions, {copy: node for node, copy in values.items()}


def at_present(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    build: Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """What `build` makes of the graph with its numbers fixed, with the arguments and results of `gm`."""
    if not has_symbols(gm, example_inputs):
        return build(gm, example_inputs)
    fixed, inputs, positions, _ = fix_numbers(gm, example_inputs)
    built = build(fixed, inputs)
    return returned_numbers(gm, lambda *args: built(*[args[k] for k in positions]))


@contextlib.contextmanager
def without_symbols() -> Iterator[None]:
    """Hide Dynamo's fake tensor mode, whose fake tensors of the inputs have symbolic sizes."""
    with tracing(None) if TracingContext.try_get() else contextlib.nullcontext():
        yield


def returned_numbers(gm: torch.fx.GraphModule, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, a callable for the graph with its numbers fixed, with those numbers among its results that depend
    on inputs computed anew from the arguments of each call. `compiled` itself when there is none."""
    numeric = _numeric_nodes(gm)
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    results = output.args[0] if isinstance(output.args[0], (list, tuple)) else (output.args[0],)
    computed = {k: r for k, r in enumerate(results) if isinstance(r, torch.fx.Node) and r in numeric}
    if not computed:
        return compiled
    arithmetic = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in numeric:
            copies[node] = arithmetic.node_copy(node, copies.__getitem__)
    arithmetic.output(tuple(copies[r] for r in computed.values()))
    numbers = torch.fx.GraphModule(gm, arithmetic).forward

    def call(*args: Any) -> tuple[Any, ...]:
        out = list(compiled(*args))
        for k, value in zip(computed, numbers(*args), strict=True):
            out[k] = value
        return tuple(out)

    return call


def _numeric_nodes(gm: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """Numbers among the inputs, and what Python computes from these alone."""
    found: set[torch.fx.Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, NUMBERS) and (
            node.op == "placeholder"
            or (node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes))
        ):
            found.add(node)
    return found


def free_numbers(gm: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """The numbers among the inputs that no tensor depends on."""
    numeric = _numeric_nodes(gm)
    used: set[torch.fx.Node] = set()  # numbers that reach something other than a number or the output
    for node in reversed(gm.graph.nodes):
        if node.op != "output" and (node not in numeric or node in used):
            used.update(node.all_input_nodes)
    return {n for n in numeric if n.op == "placeholder" and n not in used}


def kept_key(gm: torch.fx.GraphModule, kept: Set[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function of the graph's arguments: the sizes that have only symbols of `kept`."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    tensors = {k: v for k, n in enumerate(placeholders) if isinstance(v := n.meta.get("example_value"), torch.Tensor)}
    sizes = [(k, d) for k, v in tensors.items() for d, s in enumerate(v.shape) if _has_only(s, kept)]
    return lambda args: tuple(args[k].shape[d] for k, d in sizes)


def size_key(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function of the graph's arguments: the sizes and numbers, among those that are symbolic, that tensors depend
    on. Nothing is guarded."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    free = free_numbers(gm)
    inputs = list(enumerate(zip(placeholders, example_inputs, strict=True)))
    numbers = [k for k, (n, v) in inputs if isinstance(v, NUMBERS) and n not in free]
    symbolic = {k for k, (n, _) in inputs if _symbols(n.meta.get("example_value"))}
    tensors = [k for k, (_, v) in inputs if isinstance(v, torch.Tensor) and k in symbolic]

    wrapped = list(_wrapped(gm).values())

    def key(args: Sequence[Any]) -> tuple[Any, ...]:
        values = (*(hint(args[k]) for k in numbers), *(args[k].item() for k in wrapped))
        return (*values, *((*args[k].shape, *args[k].stride()) for k in tensors))

    return key


def marked_sizes(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], most: int) -> list[list[Any]]:
    """Inputs of every other size in the range that one symbol was marked with (`mark_dynamic(x, 0, min=2, max=16)`),
    fake tensors where sizes differ from the present ones. Empty without such a symbol, with several, with more than
    `most` sizes, and where another symbol has a part in the same size."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = [n.meta.get("example_value") for n in placeholders]
    found = {e.node.shape_env.replace(e.node.expr): e.node.shape_env for v in values for e in _symbols(v)}
    ends = {}
    for expression, env in found.items():
        for symbol in expression.free_symbols:
            limits = env.var_to_range[symbol]
            if limits.lower.is_Integer and limits.upper.is_Integer:
                ends[symbol] = int(limits.lower), int(limits.upper)
    if len(ends) != 1:
        return []
    ((symbol, (low, high)),) = ends.items()
    if high - low >= most or any(symbol in e.free_symbols and len(e.free_symbols) > 1 for e in found):
        return []

    def at(number: Any, size: int) -> Any:
        if not isinstance(number, torch.SymInt):
            return number
        expression = number.node.shape_env.replace(number.node.expr)
        return int(expression.subs(symbol, size)) if symbol in expression.free_symbols else hint(number)

    def tensor(given: torch.Tensor, value: Any, size: int) -> torch.Tensor:
        if not _symbols(value):
            return given
        shape, strides = ([at(x, size) for x in numbers] for numbers in (value.shape, value.stride()))
        with mode:
            return torch.empty_strided(shape, strides, dtype=given.dtype, device=given.device)

    mode = FakeTensorMode()
    present = next(k for k in range(low, high + 1) if all(at(e, k) == hint(e) for v in values for e in _symbols(v)))
    return [
        [tensor(x, v, k) if isinstance(x, torch.Tensor) else at(x, k) for x, v in zip(example_inputs, values)]
        for k in range(low, high + 1)
        if k != present
    ]


def hint(number: Any) -> Any:
    """The present value of a number that may be symbolic, without a guard."""
    return number.node.hint if isinstance(number, _SYMBOLIC) else number


def changes_per_call(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a program for the present sizes would serve one call: the graph returns a tensor that is longer than one
    it was given, as a cache that grows is, or computes tensors from a number that is no size of its inputs."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = {n: n.meta.get("example_value") for n in placeholders}
    tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
    sizes = {x for v in tensors for s in _symbols(v) for x in s.node.expr.free_symbols}
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    for result in output.all_input_nodes:
        value = result.meta.get("example_value")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt) and any(_is_more(size.node.expr, x) for x in sizes):
                return True
    free = free_numbers(gm)
    return any(
        isinstance(v, _SYMBOLIC) and n not in free and not v.node.expr.free_symbols <= sizes for n, v in values.items()
    )


def kept_symbols(gm: torch.fx.GraphModule) -> Set[Any]:
    """Symbols that are sizes of what the graph returns longer than it was given, in other dimensions than those that
    grow: what is given to the next call has them again."""
    values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    sizes = {x for v in values if isinstance(v, torch.Tensor) for s in _symbols(v) for x in s.node.expr.free_symbols}
    kept, moving = set(), set()
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    for result in output.all_input_nodes:
        value = result.meta.get("example_value")
        numbers = value.shape if isinstance(value, torch.Tensor) else ()
        shape = [s.node.expr for s in numbers if isinstance(s, torch.SymInt)]
        grown = [e for e in shape if any(_is_more(e, x) for x in sizes)]
        moving.update(x for e in grown for x in e.free_symbols)
        kept.update(e for e in shape if grown and e.is_Symbol)
    return kept - moving


def _has_only(size: Any, symbols: Set[Any]) -> bool:
    found = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
    return bool(found) and found <= symbols


def appends(gm: torch.fx.GraphModule) -> bool:
    """Whether the graph, without symbols, returns an input with a few rows appended, as a cache that grows does."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    for node in output.all_input_nodes:
        given = node.args[0] if node.target is torch.cat and node.args else ()
        if not isinstance(given, (list, tuple)) or len(given) < 2 or getattr(given[0], "op", "") != "placeholder":
            continue
        whole, first = (n.meta.get("example_value") for n in (node, given[0]))
        if isinstance(whole, torch.Tensor) and isinstance(first, torch.Tensor):
            grown = [(a, b) for a, b in zip(whole.shape, first.shape) if a != b]
            if len(grown) == 1 and grown[0][0] < 2 * grown[0][1]:
                return True
    return False


def _is_more(size: Any, symbol: Any) -> bool:
    more = size - symbol
    return bool(more.is_Integer) and more != 0


def _symbols(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        return [n for n in numbers if isinstance(n, _SYMBOLIC)]
    return [value] if isinstance(value, _SYMBOLIC) else []
