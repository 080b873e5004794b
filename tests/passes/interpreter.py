"""What a Graph means, node by node, as plainly as possible: the measure for passes.

Loads must be in bounds. Sums and transcendental functions are computed in f64 and rounded once to f32, so that the
result does not depend on the order of summation or on how torch vectorises. Versions of a STATE tensor are one
tensor, so a graph in an invalid order gives wrong results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from mpk_dynamo.ir import expr as E
from mpk_dynamo.ir.expr import Acc, Const, Expr, Load, Op, Reduce, Var
from mpk_dynamo.ir.graph import Attention, Graph, Linear, RowMap
from mpk_dynamo.ir.types import BufferKind, DType

TORCH = {
    DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32, DType.F64: torch.float64,
    DType.I64: torch.int64, DType.I32: torch.int32, DType.U8: torch.uint8, DType.BOOL: torch.bool,
}  # fmt: skip

Memory = dict[str, torch.Tensor]

_BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "floordiv": torch.floor_divide, "mod": torch.remainder,
    "max": torch.maximum, "min": torch.minimum, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le,
    "gt": torch.gt, "ge": torch.ge, "and": torch.logical_and, "or": torch.logical_or, "div": torch.div,
    "pow": torch.pow,
}  # fmt: skip
_EXACT = {"neg": torch.neg, "abs": torch.abs, "relu": torch.relu, "not": torch.logical_not, "floor": torch.floor}
_ROUNDED = frozenset("sqrt rsqrt exp sin cos tanh sigmoid erf log reciprocal".split())


class Evaluation:
    """Values of expressions for all points of `dims`, as tensors with one axis per dim and per open reduction."""

    def __init__(self, dims: tuple[Var, ...], memory: Mapping[str, torch.Tensor], accs: tuple[torch.Tensor, ...] = ()):
        self.dims, self.memory, self.accs = dims, memory, accs
        self.known: dict[tuple[Expr, tuple[Var, ...]], torch.Tensor] = {}
        self.rank = len(dims) + 3

    def __call__(self, e: Expr, dtype: DType | None = None) -> torch.Tensor:
        """The value with one axis per dim."""
        value = self.value(e, ())
        assert dtype is None or value.dtype is TORCH[dtype]
        return value.reshape(value.shape[: len(self.dims)]).expand([v.size for v in self.dims])

    def value(self, e: Expr, scope: tuple[Var, ...]) -> torch.Tensor:
        key = (e, scope)
        if key not in self.known:
            out = self.compute(e, scope)
            assert out.dtype is TORCH[e.dtype], (e, out.dtype)
            self.known[key] = out
        return self.known[key]

    def axis(self, position: int, n: int) -> torch.Tensor:
        return torch.arange(n).reshape([n if k == position else 1 for k in range(self.rank)])

    def compute(self, e: Expr, scope: tuple[Var, ...]) -> torch.Tensor:
        if isinstance(e, Var):
            order = (*self.dims, *scope)
            assert e in order, f"{e} is not bound"
            return self.axis(max(k for k, v in enumerate(order) if v is e), e.size)
        if isinstance(e, Const):
            return torch.full([1] * self.rank, e.value, dtype=TORCH[e.dtype])
        if isinstance(e, Acc):
            return self.accs[e.which].reshape(*self.accs[e.which].shape, *[1] * (self.rank - 2))
        if isinstance(e, Reduce):
            body = self.value(e.body, (*scope, e.var))
            position = len(self.dims) + len(scope)
            body = body.expand([e.var.size if k == position else n for k, n in enumerate(body.shape)])
            if e.name == "sum":
                return (body.double() if e.dtype.is_float else body).sum(position, keepdim=True).to(TORCH[e.dtype])
            return (body.amax if e.name == "max" else body.amin)(position, keepdim=True)
        args = [self.value(c, scope) for c in e.children]
        if isinstance(e, Load):
            tensor = self.memory[e.buffer]
            flat = torch.zeros([1] * self.rank, dtype=torch.int64)
            for i, n, stride in zip(args, tensor.shape, tensor.stride(), strict=True):
                assert bool(((i >= 0) & (i < n)).all()), f"{e} leaves its bounds"
                flat = flat + i * stride
            return tensor.reshape(-1)[flat]
        assert isinstance(e, Op)
        if e.name == "cast":
            return args[0].to(TORCH[e.dtype])
        if e.name == "where":
            return torch.where(*args)
        if e.name in _ROUNDED:
            return getattr(torch, e.name)(args[0].double()).to(TORCH[e.dtype])
        return (_EXACT.get(e.name) or _BINARY[e.name])(*args)


def run_row_map(node: RowMap, memory: Memory) -> None:
    at = Evaluation(node.dims, memory)
    store(memory[node.out], [at(e) for e in node.store], at(node.body))


def store(out: torch.Tensor, index: list[torch.Tensor], value: torch.Tensor) -> None:
    flat = torch.zeros(value.shape, dtype=torch.int64)
    for i, n, stride in zip(index, out.shape, out.stride(), strict=True):
        assert bool(((i >= 0) & (i < n)).all())
        flat = flat + i * stride
    assert value.dtype is out.dtype
    out.reshape(-1)[flat.reshape(-1)] = value.reshape(-1)


def run_linear(node: Linear, memory: Memory) -> None:
    x = Evaluation((node.t, node.k), memory)(node.x).double()
    results = []
    for p in node.parts:
        stored = [memory[w].double() for w in p.weights]
        accs = tuple((x @ (w if node.transposed else w.T)).float() for w in stored)
        at = Evaluation((node.t, p.n), memory, accs)
        results.append((memory[p.out], [at(e) for e in p.store], at(p.epilogue)))
    for result in results:
        store(*result)


def run_attention(node: Attention, memory: Memory) -> None:
    cache = Evaluation((node.b, node.g, node.s, node.d), memory)
    keys = cache(load(node.keys, node.key_index, memory)).double().clone()
    values = cache(load(node.values, node.value_index, memory)).double().clone()
    per_b = Evaluation((node.b,), memory)
    if node.append is not None:
        a, row = node.append, Evaluation((node.b, node.g, node.d), memory)
        key, value, position = row(a.key), row(a.value), per_b(a.position)
        for b in range(node.b.size):
            keys[b, :, position[b]], values[b, :, position[b]] = key[b].double(), value[b].double()
    q = Evaluation((node.b, node.h, node.d), memory)(node.q).double()
    group = node.h.size // node.g.size
    score = torch.einsum("bhd,bhsd->bhs", q, keys.repeat_interleave(group, 1)) * node.scale
    if node.softcap is not None:
        score = node.softcap * torch.tanh(score / node.softcap)
    if node.mask is not None:
        mask = Evaluation((node.b, node.h, node.s), memory)(node.mask)
        score = score.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else score + mask.double()
    for b in range(node.b.size):
        if node.first is not None:
            score[b, :, : int(per_b(node.first)[b])] = -math.inf
        if node.last is not None:
            score[b, :, max(int(per_b(node.last)[b]), 0) :] = -math.inf
    weight = torch.softmax(score, -1).nan_to_num(0.0)
    out = torch.einsum("bhs,bhsd->bhd", weight, values.repeat_interleave(group, 1)).float()
    at = Evaluation((node.b, node.h, node.d), memory)
    index = [at(e) for e in node.store]
    if node.append is not None:
        for name, where, new in ((a.keys, node.key_index, key), (a.values, node.value_index, value)):
            into = Evaluation((node.b, node.g, node.s, node.d), memory)
            full = [into(e) for e in where]
            for b in range(node.b.size):
                store(memory[name], [i[b, :, position[b]] for i in full], new[b])
    store(memory[node.out], index, out.to(memory[node.out].dtype))


def load(name: str, index: tuple[Expr, ...], memory: Memory) -> Expr:
    return E.load(name, index, next(d for d, t in TORCH.items() if t is memory[name].dtype))


def random_memory(graph: Graph, seed: int = 0, position: int = 5) -> Memory:
    """Random tensors for what the caller hands in. Integers are small; masks hide the first two keys, allow key
    `position` and are random elsewhere; 0-d counters are `position`."""
    made: Memory = {}
    rng = torch.Generator().manual_seed(seed)
    internal = (BufferKind.SCRATCH, BufferKind.OUTPUT)
    for b in sorted((b for b in graph.buffers.values() if b.kind not in internal), key=lambda b: b.name):
        if b.storage in made:
            continue
        if b.dtype is DType.BOOL:
            tensor = torch.randint(0, 2, b.shape, generator=rng).bool()
            tensor[..., : min(2, tensor.shape[-1])] = False
            tensor[..., position : position + 1] = True
        elif not b.dtype.is_float:
            tensor = torch.randint(0, 7, b.shape, generator=rng, dtype=TORCH[b.dtype])
            if not b.shape:
                tensor = torch.tensor(position, dtype=TORCH[b.dtype])
        else:
            scale = max(1, *b.shape[-1:]) ** 0.25 if b.shape else 1.0
            tensor = (torch.randn(b.shape, generator=rng) / scale).to(TORCH[b.dtype])
        made[b.storage] = tensor
    return made


def run(graph: Graph, inputs: Memory) -> tuple[list[torch.Tensor | object], Memory]:
    """(results, the caller's tensors afterwards) of running the nodes in order. `inputs` stay as they are."""
    callers = {name: t.clone() for name, t in inputs.items()}
    memory: Memory = {}
    for b in graph.buffers.values():
        if b.kind in (BufferKind.SCRATCH, BufferKind.OUTPUT):
            memory[b.name] = torch.full(b.shape, 77, dtype=torch.int64).to(TORCH[b.dtype])
        else:
            memory[b.name] = callers[b.storage]
    runners = {RowMap: run_row_map, Linear: run_linear, Attention: run_attention}
    for node in graph.nodes:
        runners[type(node)](node, memory)  # type: ignore[operator]
    results = [o.constant if o.buffer is None else memory[o.buffer].clone() for o in graph.outputs]
    return results, callers
