"""Symbolic sizes. After a size changed, Dynamo hands out graphs with symbols in place of it (automatic dynamic
shapes). A kernel is for fixed sizes: it is compiled for the present ones, and guards say so, so that other sizes
get a graph of their own. Guards are added only once a graph is captured: a fallback keeps its symbols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def with_hints(example_inputs: Sequence[Any]) -> list[Any]:
    """The inputs with each symbolic number replaced by its present value, without adding a guard."""
    return [_hint(x) if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) else x for x in example_inputs]


def _hint(x: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    return x.node.hint


def guard_symbols(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Specialise every symbol that the graph's inputs mention to its present value."""
    placeholders = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    for value in (*example_inputs, *placeholders):
        if isinstance(value, torch.Tensor):
            for size in (*value.shape, *(value.stride() if value.layout is torch.strided else ())):
                int(size)
        elif isinstance(value, torch.SymInt):
            int(value)
        elif isinstance(value, torch.SymFloat):
            float(value)
        elif isinstance(value, torch.SymBool):
            bool(value)
