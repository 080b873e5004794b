"""Tensors during import: a view is an index map on a memory, a memory knows its newest buffer.

Views are resolved when they are read, so a view taken before an in-place operator sees what that wrote, as in
eager. A copy (`clone`, a reshape that cannot alias) is free until it or its source is written: until then its
memory only refers to the source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from ..ir import expr as E
from ..ir.expr import Expr
from ..ir.types import DType

DTYPES: dict[torch.dtype, DType] = {
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.float32: DType.F32,
    torch.float64: DType.F64,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.uint8: DType.U8,
    torch.bool: DType.BOOL,
}
Shape = tuple[int, ...]
Index = tuple[Expr, ...]


@lru_cache(maxsize=4096)
def variables(shape: Shape) -> tuple[E.Var, ...]:
    """Loop variables i0, i1, ... of a shape."""
    return tuple(E.var(f"i{k}", n) for k, n in enumerate(shape))


def point(v: E.Var) -> Expr:
    """A loop variable, or 0 when that is its only value."""
    return E.index(0) if v.size == 1 else v


@lru_cache(maxsize=4096)
def points(shape: Shape) -> Index:
    """The loop variables as an index, with 0 for dimensions of size 1, so that maps stay simple."""
    return tuple(E.index(0) if n == 1 else E.var(f"i{k}", n) for k, n in enumerate(shape))


@dataclass(eq=False)
class Memory:
    """One tensor's elements.

    name: base of the names of its buffers. buffer: the newest one, None while nothing is stored: then the elements
    are those of `source` (a copy not yet made) or `body` (an expression without loads, over the variables of
    `shape`). caller: whether the memory is the caller's, written in place; otherwise a write makes a new buffer.
    """

    name: str
    dtype: DType
    shape: Shape
    buffer: str | None = None
    source: "View | None" = None
    body: Expr | None = None
    caller: bool = False
    versions: int = 0
    copies: "list[Memory]" = field(default_factory=list)  # memories whose `source` is a view of this one


@dataclass(frozen=True, eq=False)
class View:
    """A tensor: element i of it is element `index(i)` of `memory`; index is over `variables(shape)`."""

    memory: Memory
    shape: Shape
    index: Index

    @property
    def dtype(self) -> DType:
        return self.memory.dtype

    @property
    def whole(self) -> bool:
        """Whether it is the memory itself, element for element."""
        return self.shape == self.memory.shape and self.index == points(self.shape)

    def base(self, at: Index) -> Index:
        """The index into the memory of element `at`."""
        if self.index == points(self.shape):
            return broadcast(self.shape, self.shape, at)
        return compose(self.index, self.shape, at)

    def load(self, at: Index) -> Expr:
        """The element at `at`, in the tensor's dtype, read from the newest buffer."""
        memory, base = self.memory, self.base(at)
        while memory.buffer is None and memory.source is not None:
            base, memory = memory.source.base(base), memory.source.memory
        if memory.buffer is not None:
            return E.load(memory.buffer, base, memory.dtype)
        assert memory.body is not None
        return E.substitute(memory.body, dict(zip(variables(memory.shape), base)))

    def resolve(self, at: Index) -> tuple[str, Index] | None:
        """Buffer and index of element `at`, or None when it is not stored anywhere."""
        found = self.load(at)
        return (found.buffer, found.index) if isinstance(found, E.Load) else None

    def through(self, shape: Shape, index: Index) -> "View":
        """The view whose element i is element `index(i)` of this one; index is over `variables(shape)`."""
        return View(self.memory, shape, self.base(index))


def compose(index: Index, shape: Shape, at: Index) -> Index:
    """index, over `variables(shape)`, at the point `at`."""
    values = dict(zip(variables(shape), at, strict=True))
    out = []
    for e in index:
        if isinstance(e, E.Var):
            out.append(values.get(e, e))
        elif isinstance(e, E.Const):
            out.append(e)
        else:
            out.append(E.substitute(e, values))
    return tuple(out)


def whole(memory: Memory) -> View:
    return View(memory, memory.shape, points(memory.shape))


def broadcast(shape: Shape, to: Shape, at: Index) -> Index:
    """The point of a tensor of `shape` that is read at point `at` of the shape it is broadcast to."""
    shift = len(to) - len(shape)
    return tuple(E.index(0) if n == 1 else at[k + shift] for k, n in enumerate(shape))


def convert(e: Expr, dtype: DType) -> Expr:
    """e as `dtype`, with torch's conversions; narrow floats convert by way of f32, as torch does."""
    if e.dtype is dtype:
        return e
    if e.dtype.is_narrow_float or dtype.is_narrow_float:
        e = E.cast(e, DType.F32)
    return E.cast(e, dtype)


def wide(dtype: DType) -> DType:
    """The type that arithmetic on `dtype` is done in."""
    return {DType.BF16: DType.F32, DType.F16: DType.F32, DType.U8: DType.I32}.get(dtype, dtype)


def constant(value: bool | int | float, dtype: DType) -> E.Const:
    """A Python number as a constant, rounded to f32 where torch would."""
    if dtype is DType.F32:
        value = torch.tensor(value, dtype=torch.float32).item()
    return E.const(value, dtype)


def bounded(e: Expr, low: int, high: int) -> Expr:
    """Integer e clamped into [low, high], left alone where it cannot leave it."""
    known = E.bounds(e)
    if known is None or known[0] < low:
        e = E.op("max", e, E.index(low))
    if known is None or known[1] > high:
        e = E.op("min", e, E.index(high))
    return e
