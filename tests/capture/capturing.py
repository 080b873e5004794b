"""Running captured graphs node by node, by the operators' oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpk_dynamo.capture import Captured, capture
from mpk_dynamo.ir.graph import is_callers
from mpk_dynamo.ops import operator_of
from mpk_dynamo.ops.evaluate import TORCH_DTYPE
from mpk_dynamo.pipeline import with_aliases
from mpk_dynamo.verify import verify_graph


def execute(found: Captured, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Run the unfused graph on torch tensors. Memory that nothing has written is poisoned."""
    graph = found.graph
    storages = {name: inputs[k].detach() for name, k in found.arguments.items()}
    storages |= {name: t.detach() for name, t in found.constants.items()}
    memory: dict[str, torch.Tensor] = {}
    for b in graph.buffers.values():
        if is_callers(b):
            memory[b.name] = storages[b.storage]
            assert tuple(memory[b.name].shape) == b.shape and TORCH_DTYPE[b.dtype] is memory[b.name].dtype
            assert tuple(memory[b.name].stride()) == b.strides
        else:
            poison = float("nan") if b.dtype.is_float else 1 if b.dtype.value == "bool" else 77
            memory[b.name] = torch.full(b.shape, poison, dtype=TORCH_DTYPE[b.dtype])
    for node in graph.nodes:
        operator_of(node).oracle(node, graph.buffers, memory)
    return tuple(o.constant if o.buffer is None else memory[o.buffer] for o in graph.outputs)


class Grab:
    """A backend that captures and then executes what it captured."""

    def __init__(self) -> None:
        self.found: list[Captured] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        found = capture(gm, inputs)
        verify_graph(found.graph)
        self.found.append(found)
        return with_aliases(lambda *args: execute(found, args), found.aliases)

    def __deepcopy__(self, memo: object) -> "Grab":
        return self  # CompileConfig copies its backend


def run(function: Callable[..., Any], *args: Any) -> tuple[Any, Any, Captured, tuple[Any, ...], tuple[Any, ...]]:
    """(ours, eager's, the capture, our arguments after the call, eager's arguments after the call)."""
    backend = Grab()
    theirs_args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    ours_args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    with torch.no_grad():
        theirs = function(*theirs_args)
        ours = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*ours_args)
    assert len(backend.found) == 1
    return ours, theirs, backend.found[0], ours_args, theirs_args


def flat(x: Any) -> list[Any]:
    return [z for y in x for z in flat(y)] if isinstance(x, (tuple, list)) else [x]


def same(function: Callable[..., Any], *args: Any, ulps: int = 0) -> Captured:
    """Assert that the captured graph gives what eager gives: values, dtypes, and what became of the arguments."""
    ours, theirs, found, ours_args, theirs_args = run(function, *args)
    for a, b in zip(flat(ours) + flat(ours_args), flat(theirs) + flat(theirs_args), strict=True):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, a.shape, b.dtype, b.shape)
            assert_close(a, b, ulps)
        else:
            assert a == b
    return found


def assert_close(a: torch.Tensor, b: torch.Tensor, ulps: int) -> None:
    """Equal, or within `ulps` units in the last place of the dtype, of numbers not below 1/4."""
    if not b.dtype.is_floating_point or ulps == 0:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return
    info = torch.finfo(b.dtype)
    torch.testing.assert_close(a, b, rtol=ulps * info.eps, atol=ulps * info.eps / 4, equal_nan=True)
