"""Building blocks of operators' samples, and tensors to run them on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..ir.expr import Expr, Load, Op, Var, cast, const, index, load, loads, op, reduce, walk
from ..ir.graph import Attention, Graph, Node, Output, expressions
from ..ir.types import Buffer, BufferKind, DType, buffer
from .evaluate import TORCH_DTYPE

F32 = DType.F32


class Sample:
    """Collects buffers while expressions are written; `graph(node)` closes it."""

    def __init__(self) -> None:
        self.buffers: dict[str, Buffer] = {}

    def add(
        self, kind: BufferKind, name: str, dtype: DType, *shape: int, strides: tuple[int, ...] | None = None
    ) -> str:
        """Declare a buffer; returns its name."""
        self.buffers[name] = buffer(name, dtype, shape, kind, strides=strides)
        return name

    def param(self, name: str, dtype: DType, *shape: int) -> str:
        return self.add(BufferKind.PARAM, name, dtype, *shape)

    def input(self, name: str, dtype: DType, *shape: int, strides: tuple[int, ...] | None = None) -> str:
        return self.add(BufferKind.INPUT, name, dtype, *shape, strides=strides)

    def output(self, name: str, dtype: DType, *shape: int) -> str:
        return self.add(BufferKind.OUTPUT, name, dtype, *shape)

    def state(self, name: str, dtype: DType, *shape: int) -> tuple[str, str]:
        """A STATE tensor: names of the version before and after the node."""
        old = buffer(name, dtype, shape, BufferKind.STATE)
        new = buffer(f"{name}@1", dtype, shape, BufferKind.STATE, storage=name)
        self.buffers.update({old.name: old, new.name: new})
        return old.name, new.name

    def at(self, name: str, *idx: Expr | int) -> Load:
        """The element of a declared buffer."""
        return load(name, tuple(index(i) if isinstance(i, int) else i for i in idx), self.buffers[name].dtype)

    def wide(self, name: str, *idx: Expr | int) -> Expr:
        """The same, as f32."""
        return cast(self.at(name, *idx), F32)

    def graph(self, node: Node) -> tuple[Node, Graph]:
        outputs = [b.name for b in self.buffers.values() if b.kind is BufferKind.OUTPUT]
        return node, Graph((node,), self.buffers, tuple(Output(o) for o in outputs), ("sample",))


def rms_norm(row: Callable[[Expr], Expr], over: Var, weight: Callable[[Expr], Expr], dtype: DType) -> Expr:
    """RMSNorm as HF writes it: normalise in f32, round, times weight in `dtype`. `row(k)` is f32."""
    mean = op("div", reduce("sum", over, op("mul", row(over), row(over))), const(float(over.size), F32))
    scale = op("rsqrt", op("add", mean, const(1e-6, F32)))
    rounded = cast(op("mul", row(over), scale), dtype)
    return cast(op("mul", weight(over), cast(rounded, F32)), dtype)


def silu(x: Expr) -> Expr:
    return op("mul", x, op("sigmoid", x))


def sample_tensors(node: Node, graph: Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    """A tensor for each storage that the caller hands in: floats normal (weights scaled down), integers valid as
    the indices they are used for, booleans mostly true."""
    generator = torch.Generator().manual_seed(seed)
    limits = _index_limits(node, graph)
    out = {}
    for name, b in graph.buffers.items():
        if b.kind in (BufferKind.SCRATCH, BufferKind.OUTPUT) or b.storage in out or b.storage != name:
            continue
        dtype = TORCH_DTYPE[b.dtype]
        if dtype is torch.bool:
            values = torch.rand(b.shape, generator=generator) < 0.7
        elif dtype.is_floating_point:
            values = torch.randn(b.shape, generator=generator)
            if b.kind is BufferKind.PARAM and len(b.shape) > 1:
                values *= b.shape[-1] ** -0.5
        else:
            values = torch.randint(0, limits.get(name, 4), b.shape, generator=generator)
        out[name] = torch.empty_strided(b.shape, b.strides, dtype=dtype).copy_(values)
    return out


def _index_limits(node: Node, graph: Graph) -> dict[str, int]:
    """Exclusive upper limit of the values of each integer buffer that is an index somewhere."""
    limits: dict[str, int] = {}

    def use(name: str, size: int) -> None:
        limits[name] = min(size, limits.get(name, size))

    places: list[tuple[str, tuple[Expr, ...]]] = [(ld.buffer, ld.index) for e in expressions(node) for ld in loads(e)]
    for name, store in ((p.out, p.store) for p in (node, *getattr(node, "parts", ())) if hasattr(p, "store")):
        places.append((name, store))
    for name, idx in places:
        for e, size in zip(idx, graph.buffers[name].shape, strict=True):
            for inner in walk(e):
                if isinstance(inner, Load):
                    use(inner.buffer, size)
    if isinstance(node, Attention):
        held = [node.first, node.last, node.append.position if node.append else None]
        for e in held:
            for inner in loads(e) if e is not None else ():
                use(inner.buffer, node.s.size - isinstance(e, Op))
    return limits
