"""Symbolic sizes and numbers. After a size or a Python number changed, Dynamo hands out graphs with symbols in place
of it (automatic dynamic shapes). A kernel is for fixed sizes: it is compiled for the present ones, and guards say so,
so that other sizes get a graph of their own. Guards are added only once a graph is captured: a fallback keeps its
symbols. Numbers that only lead to numbers which the graph returns (a cache that counts its tokens in Python) are left
alone: these outputs are computed by Python on each call, and one program serves every value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def has_symbols(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a size of the graph's inputs is symbolic, or an input is a number."""
    values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    return any(isinstance(x, (*_SYMBOLIC, int, float)) for x in example_inputs) or any(_symbols(v) for v in values)


def fix_numbers(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[torch.fx.GraphModule, list[torch.Tensor], list[int]]:
    """The graph with each number among its inputs replaced by its present value, without adding a guard; the inputs
    that are left, and their positions among the original ones."""
    fixed = torch.fx.GraphModule(gm, torch.fx.Graph())
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    graph, inputs, positions = fixed.graph, [], []
    numbers: dict[torch.fx.Node, Any] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if isinstance(value, torch.Tensor):
            inputs.append(value)
            positions.append(position)
        else:
            numbers[node] = value.node.hint if isinstance(value, _SYMBOLIC) else value

    def argument(node: torch.fx.Node) -> Any:
        return numbers[node] if node in numbers else values[node]

    for node in gm.graph.nodes:
        if node in numbers:
            continue
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], argument))
            continue
        values[node] = graph.node_copy(node, argument)
        if hasattr(node, "_dynamo_source"):
            values[node]._dynamo_source = node._dynamo_source
    fixed.recompile()
    return fixed, inputs, positions


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
        if isinstance(value, (*_SYMBOLIC, bool, int, float)) and (
            node.op == "placeholder"
            or (node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes))
        ):
            found.add(node)
    return found


def _only_returned(gm: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """The numbers among the inputs that no tensor depends on."""
    numeric = _numeric_nodes(gm)
    used: set[torch.fx.Node] = set()  # numbers that reach something other than a number or the output
    for node in reversed(gm.graph.nodes):
        if node.op != "output" and (node not in numeric or node in used):
            used.update(node.all_input_nodes)
    return {n for n in numeric if n.op == "placeholder" and n not in used}


def guard_symbols(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Guard that each symbol that the graph's inputs mention keeps its present value, as far as tensors depend on
    it."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    free = _only_returned(gm)
    bound = [(n, v) for n, v in zip(placeholders, example_inputs, strict=True) if n not in free]
    for value in (v for n, example in bound for v in (n.meta.get("example_value"), example)):
        for symbol in _symbols(value):
            if isinstance(symbol, torch.SymInt):
                int(symbol)
            elif isinstance(symbol, torch.SymFloat):
                float(symbol)
            else:
                bool(symbol)


def _symbols(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        return [n for n in numbers if isinstance(n, _SYMBOLIC)]
    return [value] if isinstance(value, _SYMBOLIC) else []
