"""The table of lowerings: ATen operator name -> function that imports a call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import Unsupported
from ..ir.types import DType
from .retrace import module_path, place_of, source_line
from .values import DTYPES, View

if TYPE_CHECKING:
    from .importer import Importer

Lowering = Callable[["Importer", "Call"], Any]
LOWERINGS: dict[str, Lowering] = {}
KNOWN_DTYPES = f"the fallback runs it; the kernel computes in {', '.join(str(d)[6:] for d in DTYPES)}"


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a function for ATen operators (all overloads; in-place variants end in `_`)."""

    def register(function: Lowering) -> Lowering:
        for name in names:
            assert name not in LOWERINGS, name
            LOWERINGS[name] = function
        return function

    return register


@dataclass(frozen=True)
class Call:
    """One ATen call: `op` without namespace and overload, arguments by schema name, defaults filled in, tensors
    as Views."""

    node: fx.Node
    op: str
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def value(self) -> torch.Tensor:
        """The fake result."""
        return self.node.meta["val"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> DType:
        return self.dtype_of(self.value)

    def dtype_of(self, value: torch.Tensor) -> DType:
        if value.dtype not in DTYPES:
            raise self.refuse(f"its result has dtype {value.dtype}", KNOWN_DTYPES)
        return DTYPES[value.dtype]

    def fake(self, position: int) -> torch.Tensor:
        """The fake tensor of a positional argument."""
        return self.node.args[position].meta["val"]  # type: ignore[union-attr]

    @property
    def aliases(self) -> bool:
        """Whether the result shares the memory of the first argument."""
        return self.value.untyped_storage()._cdata == self.fake(0).untyped_storage()._cdata

    @property
    def origin(self) -> str:
        return module_path(self.node) or source_line(self.node)

    def refuse(self, why: str, remedy: str = "", *, passing: bool = False) -> Unsupported:
        return refusal(self.node, why, remedy, passing=passing)


def refusal(node: fx.Node, why: str, remedy: str = "", *, passing: bool = False) -> Unsupported:
    """The error that says which operator cannot be captured, where in the model, and why."""
    return Unsupported(f"{node.target}: {why}", origin=place_of(node), remedy=remedy, passing=passing)


def bind(node: fx.Node, resolve: Callable[[Any], Any]) -> Call:
    """The Call of a call_function node of an OpOverload."""
    schema = node.target._schema  # type: ignore[union-attr]
    arguments = {}
    for k, a in enumerate(schema.arguments):
        if k < len(node.args):
            arguments[a.name] = resolve(node.args[k])
        elif a.name in node.kwargs:
            arguments[a.name] = resolve(node.kwargs[a.name])
        else:
            arguments[a.name] = a.default_value
    return Call(node, schema.name.split("::", 1)[1], arguments)


def is_tensor(x: Any) -> bool:
    return isinstance(x, View)
