"""Symbolic sizes. After a size changed, Dynamo hands out graphs with symbols in place of it (automatic dynamic
shapes). A kernel is for fixed sizes: it is compiled for the present ones, and guards say so, so that other sizes
get a graph of their own. Guards are added only once a graph is captured: a fallback keeps its symbols."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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


def guard_symbols(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Guard that each symbol that the graph's inputs mention keeps its present value."""
    placeholders = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    for value in (*example_inputs, *placeholders):
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
