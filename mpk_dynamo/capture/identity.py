"""What a capture depends on, as text: Dynamo's graph, the tensors it is called with, and torch's own state.

Whatever is not known to be harmless makes the text None, and the graph is captured as ever.
"""

from __future__ import annotations

import builtins
import math
import operator
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .registry import LOWERINGS
from .retrace import describe, module_path, source_line

_PLAIN = (bool, int, float, complex, str, type(None), type(...))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_MODULES = {builtins: "builtins", operator: "operator", math: "math"}


class _Unknown(Exception):
    pass


def identity(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Equal texts mean equal captures by the same sources and torch. Inputs are fixed tensors, real or fake; None where
    an argument, a function or an input is of a kind that is not listed here."""
    try:
        lines = [_state()]
        numbers: dict[fx.Node, int] = {}
        inputs = iter(example_inputs)
        memories: dict[int, int] = {}
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                lines.append(_input(node, next(inputs), memories))
            elif node.op in ("call_function", "call_method", "output"):
                what = (node.op, node.name, _function(node.target), _value(node.args, numbers))
                lines.append(repr((*what, _value(node.kwargs, numbers), module_path(node), source_line(node))))
            else:
                return None
            numbers[node] = len(numbers)
        return "\n".join(lines)
    except _Unknown:
        return None


def _state() -> str:
    foreign = [name for name, f in LOWERINGS.items() if not f.__module__.startswith("mpk_dynamo.")]
    if foreign or any(torch.is_autocast_enabled(d) for d in ("cpu", "cuda")):
        raise _Unknown
    flags = torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled()
    return repr((torch.__version__, *map(str, flags), torch.are_deterministic_algorithms_enabled()))


def _input(node: fx.Node, x: Any, memories: dict[int, int]) -> str:
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or x.is_conj() or x.is_neg():
        raise _Unknown
    sizes = (*x.shape, *x.stride(), x.storage_offset())
    if any(type(n) is not int for n in sizes):
        raise _Unknown
    memory = memories.setdefault(x.untyped_storage()._cdata, len(memories)) if x.numel() else -1
    place = describe(node, x)
    kind = type(x).__name__ if type(x) in (torch.nn.Parameter, torch.nn.Buffer) else "Tensor"
    own = place.name, place.source, place.static, kind, tuple(x.shape), tuple(x.stride()), x.storage_offset()
    return repr((node.name, *own, str(x.dtype), str(x.device), memory))


def _function(target: Any) -> str:
    """The name of a function of torch or Python that means the same in every process."""
    if isinstance(target, str):  # a method, or the output
        return target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in ("aten", "prims"):
            raise _Unknown
        return str(target)
    if isinstance(target, (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)):
        for module, name in _MODULES.items():
            if getattr(module, target.__name__, None) is target:
                return f"{name}.{target.__name__}"
        for module in (torch, torch.nn.functional, torch._C._nn, torch._C, torch.Tensor, torch.special):
            if getattr(module, target.__name__, None) is target:
                return f"{module.__name__}.{target.__name__}"
    raise _Unknown


def _value(x: Any, numbers: dict[fx.Node, int]) -> object:
    if isinstance(x, fx.Node):
        return ("node", numbers[x])
    if type(x) in _PLAIN:
        return x
    if isinstance(x, _TORCH):
        return (type(x).__name__, str(x))
    if type(x) in (tuple, list, torch.Size, fx.immutable_collections.immutable_list):
        return ("list" if isinstance(x, list) else "tuple", *(_value(y, numbers) for y in x))
    if isinstance(x, slice):
        return ("slice", *(_value(y, numbers) for y in (x.start, x.stop, x.step)))
    if isinstance(x, dict):
        return ("dict", *((_value(k, numbers), _value(v, numbers)) for k, v in x.items()))
    raise _Unknown
