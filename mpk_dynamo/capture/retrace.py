"""Dynamo's graph, retraced to non-functional pre-dispatch ATen.

Pre-dispatch ATen keeps what matters whole (`linear`, `scaled_dot_product_attention`, in-place `index_copy_`) while
every call is an overload with plain arguments. AOTAutograd's output would be too low: linear becomes t/mm, SDPA a
device kernel, and the cache write a copy of the cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import Unsupported

STATIC_ONLY = "only static shapes are captured; compile with dynamic=False and use a static cache"


@dataclass(frozen=True)
class Placeholder:
    """What is known of one input. `source` is Dynamo's text of where it came from ("" when unknown), `name` a
    readable dotted name made of it, `static` whether the tensor belongs to the module (parameter or buffer)."""

    name: str
    source: str
    static: bool


def retrace(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Pre-dispatch ATen graph of `gm`: in-place operators kept, `meta["val"]`, `nn_module_stack` and `stack_trace`
    on each node, and `meta["placeholder"]`, a Placeholder, on each input.

    Tensors that `gm` holds as attributes become further inputs, after the example inputs, in the order of
    `held_tensors(gm)`. example_inputs: real or fake tensors. Raises Unsupported on symbolic or non-tensor inputs,
    tensor subclasses, and autocast regions.
    """
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    described = [describe(n, e) for n, e in zip(inputs, example_inputs, strict=True)]
    for place, example in zip(described, example_inputs):
        _check_input(place, example)
    _check_autocast(gm, example_inputs)
    held = held_tensors(gm)
    described += [Placeholder(_dotted(name) or "constant", f"attribute {name} of the graph", True) for name in held]

    mode = _fake_mode(example_inputs)
    fakes = [_to_fake(mode, e) for e in (*example_inputs, *held.values())]

    def run(*args: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            own = _Interpreter(gm, dict(zip(held, args[len(inputs) :])))
            return own.run(*args[: len(inputs)])

    with torch.no_grad(), mode:
        traced = make_fx(run, pre_dispatch=True, record_module_stack=False)(*fakes)
    for node, place in zip((n for n in traced.graph.nodes if n.op == "placeholder"), described, strict=True):
        node.meta["placeholder"] = place
        if any(not isinstance(s, int) for s in node.meta["val"].shape):
            raise Unsupported(f"input {place.name} has a symbolic shape", remedy=STATIC_ONLY)
    return traced


def held_tensors(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Tensors that the graph reads as attributes, by attribute name, in order of first use."""
    out: dict[str, torch.Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in out:
            value: Any = gm
            for part in node.target.split("."):
                value = getattr(value, part)
            if isinstance(value, torch.Tensor):
                out[node.target] = value
    return out


def describe(node: fx.Node, example: Any) -> Placeholder:
    """The Placeholder of a Dynamo input node."""
    source = getattr(getattr(node, "_dynamo_source", None), "name", "")
    source = source() if callable(source) else source  # a method up to torch 2.9
    static = isinstance(example, torch.nn.Parameter) or "_parameters[" in source or "_buffers[" in source
    return Placeholder(_dotted(source) or node.name, source, static)


def module_path(node: fx.Node) -> str:
    """`model.layers.0.mlp.gate_proj` of a traced node, or ""."""
    stack = node.meta.get("nn_module_stack")
    return _dotted(next(reversed(stack.values()))[0]) if stack else ""


def source_line(node: fx.Node) -> str:
    """`modeling_qwen3.py:85` of the innermost line of the user's code, or ""."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{found[-1][0].rsplit('/', 1)[-1]}:{found[-1][1]}" if found else ""


_INTERNAL = frozenset(("L", "G", "self", "kwargs", "_modules", "_parameters", "_buffers", "__dict__"))


def _dotted(source: str) -> str:
    """Dynamo's source text as a dotted name: L['self']._modules['a']._parameters['w'] -> a.w."""
    words = [w for w in re.findall(r"\w+", source) if w not in _INTERNAL]
    return ".".join(words)


class _Interpreter(fx.Interpreter):
    """Runs `gm` with its tensor attributes replaced, so that the tracer sees them as inputs."""

    def __init__(self, gm: fx.GraphModule, held: dict[str, Any]) -> None:
        super().__init__(gm)
        self.held = held

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.held[target] if target in self.held else super().get_attr(target, args, kwargs)


def _fake_mode(example_inputs: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return detect_fake_mode(list(example_inputs)) or FakeTensorMode()


def _to_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        if tensor.fake_mode is mode:
            return tensor
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return mode.from_tensor(tensor, static_shapes=True)


def _check_input(place: Placeholder, example: Any) -> None:
    if not isinstance(example, torch.Tensor):
        raise Unsupported(f"input {place.name} is {type(example).__name__}, not a tensor", remedy=STATIC_ONLY)
    if type(example) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor):
        raise Unsupported(f"input {place.name} is a tensor subclass ({type(example).__name__})")
    if example.layout is not torch.strided:
        raise Unsupported(f"input {place.name} has layout {example.layout}")
    if any(not isinstance(s, int) for s in (*example.shape, *example.stride())):
        raise Unsupported(f"input {place.name} has a symbolic shape {tuple(example.shape)}", remedy=STATIC_ONLY)


def _check_autocast(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    # the trace sits above the autocast key: it would record the operators without the casts
    remedy = "cast the model to the dtype you want instead"
    devices = {e.device.type for e in example_inputs}
    if any(torch.is_autocast_enabled(d) for d in devices if torch.amp.is_autocast_available(d)):
        raise Unsupported("autocast is on", remedy=remedy)
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_enter_autocast" and node.args[2]:
            raise Unsupported("an autocast region", origin=source_line(node), remedy=remedy)
