"""Dynamo's graph, retraced to non-functional pre-dispatch ATen.

Pre-dispatch ATen keeps what matters whole (`linear`, `scaled_dot_product_attention`, in-place `index_copy_`) while
every call is an overload with plain arguments. AOTAutograd's output would be too low: linear becomes t/mm, SDPA a
device kernel, and the cache write a copy of the cache.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import Unsupported
from .encoder import MADE_OF

STATIC_ONLY = "only static shapes are captured; compile with dynamic=False and use a static cache"


@dataclass(frozen=True)
class Placeholder:
    """What is known of one input. `source` is Dynamo's text of where it came from ("" when unknown), `name` a
    readable dotted name made of it, `static` whether the tensor belongs to the module (parameter or buffer)."""

    name: str
    source: str
    static: bool


@dataclass(frozen=True)
class Traced:
    """A pre-dispatch ATen graph, and the tensors made from numbers inside the model that its get_attr nodes name.
    results: what each node of Dynamo's graph gave, fake tensors. refused: nodes of it that could not be run, in a
    trace that goes on behind them."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    results: dict[fx.Node, Any]
    refused: dict[fx.Node, Unsupported]


def retrace(gm: fx.GraphModule, example_inputs: Sequence[Any], *, go_on: bool = False) -> Traced:
    """Pre-dispatch ATen graph of `gm`: in-place operators kept, `meta["val"]`, `nn_module_stack` and `stack_trace`
    on each node, `meta["dynamo"]`, the node of `gm` that it came from, and `meta["placeholder"]`, a Placeholder, on
    each input.

    Tensors that `gm` holds as attributes become further inputs, after the example inputs, in the order of
    `held_tensors(gm)`. example_inputs: real or fake tensors. Raises Unsupported on symbolic or non-tensor inputs,
    tensor subclasses, and autocast regions. A node that cannot be run raises it too, or with `go_on` stands in the
    result as one call of its own target.
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

    recorder = _Recorder()
    for place, fake in zip(described, fakes, strict=True):
        recorder.input(fake).meta["placeholder"] = place
    interpreter = _Interpreter(gm, recorder, dict(zip(held, fakes[len(inputs) :])), mode if go_on else None)
    with torch.no_grad(), mode, enable_python_dispatcher(), recorder:
        result = interpreter.run(*fakes[: len(inputs)])
    return recorder.finish(result)


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
    return _dotted(_ROOT.sub("", next(reversed(stack.values()))[0])) if stack else ""


def source_line(node: fx.Node) -> str:
    """`modeling_qwen3.py:85` of the innermost line of the user's code, or ""."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{found[-1][0].rsplit('/', 1)[-1]}:{found[-1][1]}" if found else ""


def place_of(node: fx.Node) -> str:
    """`model.layers.0.mlp (modeling_qwen3.py:85, node linear_4)`: module path, source line, and name in Dynamo's graph
    of a node."""
    line = ", ".join(filter(None, (source_line(node), f"node {node.meta.get('dynamo', node).name}")))
    path = module_path(node)
    return f"{path} ({line})" if path else line


# the module that was compiled, as Dynamo's wrappers see it: in its own forward, or handed to them as an argument
_ROOT = re.compile(r"^L\['(?:self|fn|args)'\](?:\[\d+\])?(?:\.__self__)?")
_INTERNAL = frozenset(("L", "G", "self", "kwargs", "_modules", "_parameters", "_buffers", "__dict__"))


def _dotted(source: str) -> str:
    """Dynamo's source text as a dotted name: L['self']._modules['a']._parameters['w'] -> a.w."""
    if "._modules[" in source or "._parameters[" in source or "._buffers[" in source:
        source = _ROOT.sub("", source)
    words = [w for w in re.findall(r"\w+", source) if w not in _INTERNAL]
    return ".".join(words)


class _Recorder(ProxyTorchDispatchMode):
    """Writes down each call that reaches the pre-dispatch key, and runs it on fake tensors.

    Does what `make_fx(pre_dispatch=True)` does for plain tensors, in a fraction of its time: nothing needs proxies,
    since a fake tensor's identity says which node made it. It is a ProxyTorchDispatchMode because torch lets no
    other kind of mode see calls at that key.
    """

    def __init__(self) -> None:
        super().__init__(PythonKeyTracer(), "real", pre_dispatch=True)
        self.graph = fx.Graph()
        self.current: fx.Node | None = None  # Dynamo's node that is being run
        self.made_by: dict[int, fx.Node] = {}
        self.first_of: dict[int, fx.Node] = {}  # by storage
        self.alive: list[Any] = []  # keeps the identities in `made_by` unique
        self.constants: dict[str, torch.Tensor] = {}
        self.results: dict[fx.Node, Any] = {}
        self.refused: dict[fx.Node, Unsupported] = {}

    def input(self, fake: torch.Tensor) -> fx.Node:
        return self._track(self.graph.placeholder(f"arg{len(self.alive)}"), fake)

    def _track(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            self.made_by[id(value)] = node
            self.alive.append(value)
            self.first_of.setdefault(value.untyped_storage()._cdata, node)
        return node

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        found = self.made_by.get(id(tensor))
        if found is not None:
            return found
        if not isinstance(tensor, FakeTensor):
            return self._constant(tensor)
        # torch.arange and its like hand out a shallow copy of the tensor that the dispatcher returned
        made = self.first_of.get(tensor.untyped_storage()._cdata)
        if made is None or made.meta["val"].shape != tensor.shape or made.meta["val"].stride() != tensor.stride():
            raise self._refused("a tensor that no recorded operator made")
        return self._track(made, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions such as the device: nothing is computed
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except _DATA_DEPENDENT as error:
            raise self._refused(f"{func}: its shape or value depends on data") from error
        node_args = tuple(self._argument(func, a) for a in args)
        node_kwargs = {k: self._argument(func, a) for k, a in kwargs.items()}
        node = self.graph.create_node(
            "call_function", func, node_args, node_kwargs, name=func._schema.name.split("::")[1]
        )
        return self._made(node, out)

    def _made(self, node: fx.Node, out: Any) -> Any:
        self._place(node)
        self._track(node, out)
        if isinstance(out, (tuple, list)):
            for k, part in enumerate(out):
                if isinstance(part, torch.Tensor):
                    item = self.graph.call_function(operator.getitem, (node, k))
                    self._place(item)
                    self._track(item, part)
        return out

    def _place(self, node: fx.Node) -> None:
        if self.current is not None:
            node.meta.update({k: self.current.meta[k] for k in _PLACE if k in self.current.meta})
            node.meta["dynamo"] = self.current

    def opaque(self, why: Unsupported, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
        """Write the current node of Dynamo's graph down as it stands; its result is what Dynamo says of it."""
        assert self.current is not None
        self.refused[self.current] = why
        result = _stand_in(self.current, why, mode)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        node = self.graph.create_node("call_function", _left_out, tuple(map(self._node_of, tensors)))
        return self._made(node, result)

    def _argument(self, func: Any, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._node_of(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._argument(func, v) for v in value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise self._refused(f"{func}: an argument depends on data or on a symbolic shape")
        return value

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        name = f"constant{len(self.constants)}"
        self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name)
        self._place(node)
        return self._track(node, tensor)

    def _refused(self, why: str) -> Unsupported:
        origin = place_of(self.current) if self.current is not None else ""
        return Unsupported(why, origin=origin, remedy=STATIC_ONLY)

    def finish(self, result: Any) -> Traced:
        """The graph, ended with its output."""

        def node_of(value: Any) -> Any:
            return self._node_of(value) if isinstance(value, torch.Tensor) else value

        self.current = None
        self.graph.output(torch.utils._pytree.tree_map(node_of, result))
        return Traced(self.graph, self.constants, self.results, self.refused)


_PLACE = ("nn_module_stack", "stack_trace")
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


class _Interpreter(fx.Interpreter):
    """Runs `gm` with its tensor attributes replaced by fakes, telling the recorder where it is. `mode`: of the fake
    tensors that stand in for results of nodes that cannot be run; None to raise there."""

    def __init__(
        self, gm: fx.GraphModule, recorder: _Recorder, held: dict[str, Any], mode: FakeTensorMode | None
    ) -> None:
        super().__init__(gm)
        self.recorder, self.held, self.mode = recorder, held, mode

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.current = n
        try:
            if isinstance(n.target, torch._ops.HigherOrderOperator):
                raise Unsupported(
                    f"the higher-order operator {n.target}",
                    origin=place_of(n),
                    remedy="the fallback runs it; torch.where chooses between tensors inside the kernel",
                )
            result = super().run_node(n)
        except Unsupported as why:
            if self.mode is None:
                raise
            result = self.recorder.opaque(why, *self.fetch_args_kwargs_from_env(n), self.mode)
        self.recorder.results[n] = result
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.held[target] if target in self.held else super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            return None  # gradients stay off while recording
        return super().call_function(MADE_OF.get(target, target), args, kwargs)


def _left_out(*_tensors: Any) -> Any:
    """Target of a node that could not be traced; never called."""
    raise AssertionError


def _stand_in(node: fx.Node, why: Unsupported, mode: FakeTensorMode) -> Any:
    """Fake tensors of the present sizes of what Dynamo expects a node to give. Raises `why` when that is unknown."""

    def size(x: Any) -> int:
        if isinstance(x, int):
            return x
        if getattr(x.node, "hint", None) is None:
            raise why
        return x.node.hint

    def fake(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            with mode:
                shape, strides = tuple(map(size, x.shape)), tuple(map(size, x.stride()))
                return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
        return size(x) if isinstance(x, torch.SymInt) else x

    if "example_value" not in node.meta:
        raise why
    return torch.utils._pytree.tree_map(fake, node.meta["example_value"])


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
