"""What two nodes have in common when they differ in names only: the layers of a model repeat few structures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.expr import Expr, Load, Op, Reduce
from ..ir.graph import Node
from ..ir.types import Buffer

NAMES = frozenset(("name", "origin"))
"""Fields of a node that say nothing about its structure. Every other string in a node is the name of a buffer."""


@dataclass(frozen=True)
class Structure:
    """key: equal for two nodes exactly if one becomes the other by renaming node and buffers, and buffers that
    correspond agree in all but name and origin. buffers, exprs: of the node, in the order in which the key holds
    them, so that those of two nodes with equal keys correspond."""

    key: Hashable
    buffers: tuple[str, ...]
    exprs: tuple[Expr, ...]


def structure_of(node: Node, buffers: Mapping[str, Buffer]) -> Structure:
    """The structure of a node. Costs a few microseconds per distinct sub-expression."""
    walk = _Walk()
    shape = walk.value(node)
    storages: dict[str, int] = {}
    facts = []
    for name in walk.buffers:
        b = buffers[name]
        facts.append((b.dtype, b.shape, b.strides, b.kind, storages.setdefault(b.storage, len(storages))))
    return Structure((shape, tuple(walk.tokens), tuple(facts)), tuple(walk.buffers), tuple(walk.exprs))


@functools.cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind) if f.name not in NAMES)


class _Walk:
    """Numbers buffers by first use, and sub-expressions that load from them; those that do not stand for themselves,
    because equal expressions are one object."""

    def __init__(self) -> None:
        self.buffers: dict[str, int] = {}
        self.tokens: list[tuple[Any, ...]] = []
        self.exprs: list[Expr] = []
        self._numbers: dict[Expr, int] = {}

    def value(self, x: Any) -> Hashable:
        if isinstance(x, Expr):
            self.exprs.append(x)
            return self.expr(x)
        if isinstance(x, str):
            return "buffer", self.buffers.setdefault(x, len(self.buffers))
        if isinstance(x, tuple):
            return tuple(self.value(item) for item in x)
        if dataclasses.is_dataclass(x):
            return type(x), *(self.value(getattr(x, name)) for name in _fields(type(x)))
        if x is None or isinstance(x, (int, float, bool)):
            return type(x), repr(x)  # repr: 0.0 and -0.0 are equal, 1 and True too
        raise TypeError(f"a node holds a {type(x).__name__}, which structure_of does not know")

    def expr(self, e: Expr) -> Expr | int:
        if not e.buffers:
            return e
        known = self._numbers.get(e)
        if known is None:
            children = tuple(self.expr(c) for c in e.children)
            if isinstance(e, Load):
                what: tuple[Any, ...] = (self.buffers.setdefault(e.buffer, len(self.buffers)),)
            elif isinstance(e, Op):
                what = (e.name,)
            elif isinstance(e, Reduce):
                what = e.name, e.var
            else:
                raise TypeError(f"{type(e).__name__} is not known to structure_of")
            known = self._numbers[e] = len(self.tokens)
            self.tokens.append((type(e), e.dtype, *what, *children))
        return known
