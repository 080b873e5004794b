"""Unfused graphs made by hand, one node per operator and view, as PyTorch writes a decoder's step.

`Builder` is a small eager-like front end: every call adds one RowMap, Linear or Attention. `decoder` follows the
operators of a HuggingFace Llama, Qwen2 or Qwen3 with a static cache and one new token per sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mpk_dynamo.ir import expr as E
from mpk_dynamo.ir.expr import Expr
from mpk_dynamo.ir.graph import Attention, Graph, Linear, LinearPart, Node, Output, RowMap
from mpk_dynamo.ir.types import Buffer, BufferKind, DType, buffer

Shape = tuple[int, ...]


def points(shape: Shape) -> tuple[Expr, ...]:
    return tuple(E.index(0) if n == 1 else E.var(f"i{k}", n) for k, n in enumerate(shape))


@dataclass(frozen=True)
class T:
    """A tensor of the graph under construction."""

    name: str
    shape: Shape
    dtype: DType


class Builder:
    def __init__(self) -> None:
        self.buffers: dict[str, Buffer] = {}
        self.nodes: list[Node] = []
        self.count = 0

    # --- tensors ---

    def caller(self, name: str, shape: Shape, dtype: DType, kind: BufferKind = BufferKind.PARAM) -> T:
        self.buffers[name] = buffer(name, dtype, shape, kind)
        return T(name, shape, dtype)

    def fresh(self, shape: Shape, dtype: DType, label: str = "v") -> T:
        self.count += 1
        return self.caller(f"{label}{self.count}", shape, dtype, BufferKind.SCRATCH)

    def at(self, x: T, index: tuple[Expr, ...]) -> Expr:
        return E.load(x.name, index, x.dtype)

    def emit(self, shape: Shape, body: Expr, label: str = "v") -> T:
        out = self.fresh(shape, body.dtype, label)
        dims = tuple(E.var(f"i{k}", n) for k, n in enumerate(shape))
        self.nodes.append(RowMap(out.name, dims, body, out.name, points(shape), label))
        return out

    # --- pointwise ---

    def wide(self, x: T | float, shape: Shape, kind: DType = DType.F32) -> Expr:
        if not isinstance(x, T):
            return E.const(x, kind)
        at = points(shape)[len(shape) - len(x.shape) :]
        index = tuple(E.index(0) if n == 1 else i for n, i in zip(x.shape, at, strict=True))
        value = self.at(x, index)
        return E.cast(value, DType.F32) if value.dtype.is_narrow_float else value

    def op(self, name: str, *xs: T | float, label: str = "") -> T:
        """op(x, ...) with broadcasting; computed in f32, rounded to the type of the tensors."""
        tensors = [x for x in xs if isinstance(x, T)]
        rank = max(len(x.shape) for x in tensors)
        padded = [(1,) * (rank - len(x.shape)) + x.shape for x in tensors]
        shape = tuple(max(column) for column in zip(*padded, strict=True))
        dtype = max((x.dtype for x in tensors), key=lambda d: (d is DType.F32, d.value))
        kind = DType.F32 if dtype.is_float else dtype
        value = E.op(name, *(E.cast(self.wide(x, shape, kind), kind) for x in xs))
        return self.emit(shape, value if value.dtype is DType.BOOL else E.cast(value, dtype), label or name)

    def to(self, x: T, dtype: DType) -> T:
        value = self.at(x, points(x.shape))
        if x.dtype is DType.I64 and dtype is DType.BF16:
            value = E.cast(value, DType.F32)
        return self.emit(x.shape, E.cast(value, dtype), "to")

    def mean(self, x: T) -> T:
        r = E.var("r0", x.shape[-1])
        total = E.reduce("sum", r, self.at(x, (*points(x.shape)[:-1], r)))
        return self.emit((*x.shape[:-1], 1), E.op("div", total, E.const(x.shape[-1], DType.F32)), "mean")

    def silu(self, x: T) -> T:
        value = self.wide(x, x.shape)
        return self.emit(x.shape, E.cast(E.op("mul", value, E.op("sigmoid", value)), x.dtype), "silu")

    # --- views, each a copy ---

    def view(self, x: T, shape: Shape) -> T:
        flat: Expr = E.index(0)
        for i, n in zip(points(shape), shape, strict=True):
            flat = E.op("add", E.op("mul", flat, E.index(n)), i)
        index = []
        for n in reversed(x.shape):
            index.append(E.op("mod", flat, E.index(n)) if n > 1 else E.index(0))
            flat = E.op("floordiv", flat, E.index(n))
        return self.emit(shape, self.at(x, tuple(reversed(index))), "view")

    def transpose(self, x: T, a: int, b: int) -> T:
        order = list(range(len(x.shape)))
        order[a], order[b] = b, a
        shape = tuple(x.shape[k] for k in order)
        at = points(shape)
        return self.emit(shape, self.at(x, tuple(at[k] for k in order)), "transpose")

    def expand(self, x: T, shape: Shape) -> T:
        index = tuple(E.index(0) if n == 1 else i for n, i in zip(x.shape, points(shape), strict=True))
        return self.emit(shape, self.at(x, index), "expand")

    def slice(self, x: T, start: int, stop: int) -> T:
        """x[..., start:stop]"""
        shape = (*x.shape[:-1], stop - start)
        *at, last = points(shape)
        return self.emit(shape, self.at(x, (*at, E.op("add", last, E.index(start)))), "slice")

    def cat(self, x: T, y: T) -> T:
        """Along the last dimension."""
        n, m = x.shape[-1], y.shape[-1]
        shape = (*x.shape[:-1], n + m)
        *at, last = points(shape)
        left = self.at(x, (*at, E.op("min", last, E.index(n - 1))))
        right = self.at(y, (*at, E.op("max", E.op("sub", last, E.index(n)), E.index(0))))
        return self.emit(shape, E.where(E.op("lt", last, E.index(n)), left, right), "cat")

    def arange(self, n: int) -> T:
        return self.emit((n,), E.index(0) if n == 1 else E.var("i0", n), "arange")

    # --- anchors and state ---

    def embedding(self, table: T, ids: T) -> T:
        shape = (*ids.shape, table.shape[1])
        at = points(shape)
        return self.emit(shape, self.at(table, (self.at(ids, at[:-1]), at[-1])), "embedding")

    def linear(self, x: T, weight: T, bias: T | None = None, origin: str = "") -> T:
        *lead, depth = x.shape
        rows = weight.shape[0]
        t, k, n = E.var("t", math.prod(lead)), E.var("k", depth), E.var("n", rows)
        token: list[Expr] = []
        flat: Expr = t
        for size in reversed(lead):
            token.insert(0, E.op("mod", flat, E.index(size)) if size > 1 else E.index(0))
            flat = E.op("floordiv", flat, E.index(size))
        y: Expr = E.acc(0)
        if bias is not None:
            y = E.op("add", y, E.cast(self.at(bias, (n,)), DType.F32))
        out = self.fresh((*lead, rows), x.dtype, "linear")
        part = LinearPart((weight.name,), rows, E.cast(y, x.dtype), out.name, (*token, n), origin)
        self.nodes.append(Linear(out.name, t, k, self.at(x, (*token, k)), (part,), origin))
        return out

    def attention(self, q: T, keys: T, values: T, mask: T | None, scale: float) -> T:
        """Like scaled_dot_product_attention with one query: keys and values already have the heads of q."""
        (batch, heads, _, size), capacity = q.shape, keys.shape[2]
        b, h, g = E.var("b", batch), E.var("h", heads), E.var("g", heads)
        s, d = E.var("s", capacity), E.var("d", size)
        out = self.fresh(q.shape, q.dtype, "attention")
        at = (b, h, E.index(0), d)
        masked = None
        if mask is not None:
            index = tuple(E.index(0) if n == 1 else v for n, v in zip(mask.shape, (b, h, E.index(0), s), strict=True))
            masked = self.at(mask, index)
        cache = (b, g, s, d)
        self.nodes.append(
            Attention(
                name=out.name,
                b=b,
                h=h,
                g=g,
                s=s,
                d=d,
                q=self.at(q, at),
                keys=keys.name,
                key_index=cache,
                values=values.name,
                value_index=cache,
                scale=scale,
                out=out.name,
                store=at,
                mask=masked,
            )  # fmt: skip
        )
        return out

    def new_version(self, old: T) -> T:
        b = self.buffers[old.name]
        n = sum(1 for other in self.buffers.values() if other.storage == b.storage)
        self.buffers[f"{b.storage}@{n}"] = replace(b, name=f"{b.storage}@{n}")
        return T(f"{b.storage}@{n}", old.shape, old.dtype)

    def assign(self, old: T, body: Expr) -> T:
        """old[...] = body, in place."""
        new = self.new_version(old)
        dims = tuple(E.var(f"i{k}", n) for k, n in enumerate(old.shape))
        self.nodes.append(RowMap(f"write_{new.name}", dims, body, new.name, points(old.shape), "assign"))
        return new

    def index_copy(self, old: T, position: T, source: T) -> T:
        """old.index_copy_(2, position, source) with one position."""
        new = self.new_version(old)
        dims = tuple(E.var(f"i{k}", n) for k, n in enumerate(source.shape))
        at = points(source.shape)
        store = (*at[:2], self.at(position, (E.index(0),)), *at[3:])
        self.nodes.append(RowMap(f"write_{new.name}", dims, self.at(source, at), new.name, store, "index_copy_"))
        return new

    def graph(self, *outputs: T) -> Graph:
        for x in outputs:
            if self.buffers[x.name].kind is BufferKind.SCRATCH:
                self.buffers[x.name] = replace(self.buffers[x.name], kind=BufferKind.OUTPUT)
        made = Graph(tuple(self.nodes), self.buffers, tuple(Output(x.name) for x in outputs))
        return made.replace("builder", nodes=made.nodes)


@dataclass(frozen=True)
class Model:
    """Sizes and traits of a decoder. `mask`: "input" as in generate(), "arithmetic" as in a direct call, None."""

    layers: int = 2
    batch: int = 1
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    ff: int = 96
    vocab: int = 128
    capacity: int = 16
    qk_norm: bool = True
    bias: bool = False
    mask: str | None = "input"
    dtype: DType = DType.BF16


def decoder(m: Model) -> Graph:
    """One step of a decoder, unfused."""
    g, bf = Builder(), m.dtype
    state = BufferKind.STATE

    def norm(x: T, weight: T) -> T:
        wide = g.to(x, DType.F32)
        scale = g.op("rsqrt", g.op("add", g.mean(g.op("mul", wide, wide)), 1e-6))
        return g.op("mul", weight, g.to(g.op("mul", wide, scale), bf))

    def rotate(x: T, cos: T, sin: T) -> T:
        half = m.size // 2
        turned = g.cat(g.op("neg", g.slice(x, half, m.size)), g.slice(x, 0, half))
        return g.op("add", g.op("mul", x, cos), g.op("mul", turned, sin))

    ids = g.caller("ids", (m.batch, 1), DType.I64, BufferKind.INPUT)
    x = g.embedding(g.caller("embed", (m.vocab, m.hidden), bf), ids)
    counters = [g.caller(f"length{i}", (), DType.I64, state) for i in range(m.layers)]
    mask = None
    if m.mask == "input":
        mask = g.caller("mask", (m.batch, 1, 1, m.capacity), DType.BOOL, BufferKind.INPUT)
        positions = g.caller("positions", (m.batch, 1), DType.I64, BufferKind.INPUT)
    else:
        positions = g.view(g.op("add", g.arange(1), counters[0]), (1, 1))
    if m.mask == "arithmetic":
        keys_at = g.view(g.arange(m.capacity), (1, 1, 1, m.capacity))
        mask = g.expand(g.op("le", keys_at, g.view(positions, (1, 1, 1, 1))), (m.batch, 1, 1, m.capacity))
    inverse = g.to(g.caller("inverse_frequency", (m.size // 2,), bf), DType.F32)
    angle = g.op("mul", g.to(g.view(positions, (*positions.shape, 1)), DType.F32), inverse)
    angle = g.cat(angle, angle)
    cos, sin = (g.to(g.op("mul", g.op(f, angle), 1.0), bf) for f in ("cos", "sin"))
    for i in range(m.layers):
        name = f"layers.{i}"

        def weight(label: str, *shape: int, name: str = name) -> T:
            return g.caller(f"{name}.{label}.weight", shape, bf)

        def project(y: T, label: str, rows: int, bias: bool = False, name: str = name) -> T:
            b = g.caller(f"{name}.{label}.bias", (rows,), bf) if bias else None
            return g.linear(y, g.caller(f"{name}.{label}.weight", (rows, y.shape[-1]), bf), b, f"{name}.{label}")

        y = norm(x, weight("input_norm", m.hidden))
        heads = []
        for label, count in (("q_proj", m.heads), ("k_proj", m.kv_heads), ("v_proj", m.kv_heads)):
            z = g.view(project(y, f"attention.{label}", count * m.size, m.bias), (m.batch, 1, count, m.size))
            if m.qk_norm and label != "v_proj":
                z = norm(z, weight(f"attention.{label}.norm", m.size))
            heads.append(g.transpose(z, 1, 2))
        q, k, v = heads
        cos4, sin4 = (g.view(z, (z.shape[0], 1, 1, m.size)) for z in (cos, sin))
        q, k = rotate(q, cos4, sin4), rotate(k, cos4, sin4)
        where = g.op("add", g.arange(1), counters[i])
        g.assign(counters[i], E.op("add", g.at(counters[i], ()), E.index(1)))
        shape = (m.batch, m.kv_heads, m.capacity, m.size)
        caches = [g.caller(f"{name}.{label}", shape, bf, state) for label in ("keys", "values")]
        written = [g.index_copy(c, where, z) for c, z in zip(caches, (k, v), strict=True)]
        repeated = []
        for c in written:
            wide = (m.batch, m.kv_heads, m.heads // m.kv_heads, m.capacity, m.size)
            one = g.view(c, (m.batch, m.kv_heads, 1, m.capacity, m.size))
            repeated.append(g.view(g.expand(one, wide), (m.batch, m.heads, m.capacity, m.size)))
        z = g.attention(q, *repeated, mask, m.size**-0.5)
        z = g.view(g.transpose(z, 1, 2), (m.batch, 1, m.heads * m.size))
        x = g.op("add", x, project(z, "attention.o_proj", m.hidden))
        y = norm(x, weight("post_norm", m.hidden))
        gate, up = project(y, "mlp.gate_proj", m.ff), project(y, "mlp.up_proj", m.ff)
        x = g.op("add", x, project(g.op("mul", g.silu(gate), up), "mlp.down_proj", m.hidden))
    x = norm(x, g.caller("norm.weight", (m.hidden,), bf))
    logits = g.linear(x, g.caller("lm_head", (m.vocab, m.hidden), bf), None, "lm_head")
    return g.graph(logits)
