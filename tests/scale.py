"""A task program of the size and shape of one decode step of Qwen3-8B, built by hand, without capture or operators.

For timing and checking passes and verifier at whole-model scale. Tiling is even: every linear node has one task
per worker, cut at any row; attention is one task per KV head and key range, then a combine per query head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import Append, Attention, Graph, Linear, LinearPart, Node, Output, RowMap
from mpk_dynamo.ir.region import Access, Box, Side
from mpk_dynamo.ir.tasks import Task, TaskGraph
from mpk_dynamo.ir.types import Buffer, BufferKind, DType, buffer


@dataclass(frozen=True)
class Sizes:
    """Shape of a Qwen3-like decoder at batch 1. `splits`: key ranges per KV head."""

    layers: int = 36
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ff: int = 12288
    vocab: int = 151936
    capacity: int = 1024
    splits: int = 16


@dataclass
class _Builder:
    workers: int
    buffers: dict[str, Buffer] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    extra: dict[str, Buffer] = field(default_factory=dict)

    def new(self, name: str, dtype: DType, shape: tuple[int, ...], kind: BufferKind, storage: str | None = None) -> str:
        self.buffers[name] = buffer(name, dtype, shape, kind, storage=storage)
        return name

    def scratch(self, name: str, width: int) -> str:
        return self.new(name, DType.BF16, (1, 1, width), BufferKind.SCRATCH)

    def task(self, op: str, tile: tuple[int, ...], reads: list[Access], writes: list[Access], nbytes: int) -> None:
        node = len(self.nodes) - 1
        self.tasks.append(Task(len(self.tasks), node, op, tile, tuple(reads), tuple(writes), nbytes, nbytes))

    def linear(
        self,
        origin: str,
        source: str,
        norm: str | None,
        parts: list[tuple[list[str], int, str]],
        add: str | None = None,
    ) -> None:
        """One task per worker over the rows of all parts; parts are (weights, rows, out)."""
        depth = self.buffers[source].shape[-1]
        t, k = ex.var("t", 1), ex.var("k", depth)
        at = (ex.index(0), ex.index(0))
        x: ex.Expr = ex.load(source, (*at, k), DType.BF16)
        if norm:
            r = ex.var("r0", depth)
            wide = ex.cast(ex.load(source, (*at, r), DType.BF16), DType.F32)
            total = ex.reduce("sum", r, ex.op("mul", wide, wide))
            mean = ex.op("div", total, ex.const(depth, DType.F32))
            factor = ex.op("rsqrt", ex.op("add", mean, ex.const(1e-6, DType.F32)))
            scaled = ex.cast(ex.op("mul", ex.cast(x, DType.F32), factor), DType.BF16)
            weight = ex.load(norm, (k,), DType.BF16)
            x = ex.cast(ex.op("mul", ex.cast(scaled, DType.F32), ex.cast(weight, DType.F32)), DType.BF16)
        made = []
        for weights, rows, out in parts:
            for w in weights:
                self.new(w, DType.BF16, (rows, depth), BufferKind.PARAM)
            n = ex.var("n", rows)
            y: ex.Expr = ex.acc(0)
            if len(weights) == 2:
                y = ex.op("mul", ex.op("mul", ex.acc(0), ex.op("sigmoid", ex.acc(0))), ex.acc(1))
            if add:
                y = ex.op("add", y, ex.cast(ex.load(add, (*at, n), DType.BF16), DType.F32))
            store = (ex.index(0), ex.index(0), n)
            made.append(LinearPart(tuple(weights), rows, ex.cast(y, DType.BF16), out, store))
        self.nodes.append(Linear(f"linear{len(self.nodes)}", t, k, x, tuple(made), origin))

        total_rows = sum(rows for _, rows, _ in parts)
        for i in range(self.workers):
            start, stop = total_rows * i // self.workers, total_rows * (i + 1) // self.workers
            reads, writes, nbytes, base = [Access(source, ((0, 1), (0, 1), (0, depth)))], [], 0, 0
            if norm:
                reads.append(Access(norm, ((0, depth),)))
            for weights, rows, out in parts:
                a, b = max(start - base, 0), min(stop - base, rows)
                base += rows
                if a < b:
                    reads += [Access(w, ((a, b), (0, depth))) for w in weights]
                    if add:
                        reads.append(Access(add, ((0, 1), (0, 1), (a, b))))
                    writes.append(Access(out, ((0, 1), (0, 1), (a, b))))
                    nbytes += 2 * (b - a) * depth * len(weights)
            if start < stop:
                self.task("linear", (start, stop), reads, writes, nbytes)

    def attention(self, layer: int, s: Sizes, q: str, k: str, v: str, out: str) -> None:
        cache, dim, group = (1, s.kv_heads, s.capacity, s.head_dim), s.head_dim, s.heads // s.kv_heads
        counter = self.new(f"counter{layer}", DType.I64, (), BufferKind.STATE)
        keys = self.new(f"keys{layer}", DType.BF16, cache, BufferKind.STATE)
        values = self.new(f"values{layer}", DType.BF16, cache, BufferKind.STATE)
        keys1 = self.new(f"keys{layer}@1", DType.BF16, cache, BufferKind.STATE, keys)
        values1 = self.new(f"values{layer}@1", DType.BF16, cache, BufferKind.STATE, values)
        b, h, g = ex.var("b", 1), ex.var("h", s.heads), ex.var("g", s.kv_heads)
        key, d, zero = ex.var("s", s.capacity), ex.var("d", dim), ex.index(0)

        def head(source: str, which: ex.Var) -> ex.Expr:
            column = ex.op("add", ex.op("mul", which, ex.index(dim)), d)
            return ex.load(source, (zero, zero, column), DType.BF16)

        position = ex.load(counter, (), DType.I64)
        mask = ex.load("mask", (zero, zero, zero, key), DType.BOOL)
        store = (zero, zero, ex.op("add", ex.op("mul", h, ex.index(dim)), d))
        append = Append(position, head(k, g), head(v, g), keys1, values1)
        where = f"model.layers.{layer}.self_attn"
        self.nodes.append(
            Attention(f"attention{len(self.nodes)}", b, h, g, key, d, head(q, h), keys1, (b, g, key, d), values1,
                      (b, g, key, d), dim**-0.5, out, store, mask, None, None, append, origin=where)
        )  # fmt: skip

        partition, node = ex.render(position), self.nodes[-1].name
        acc, stat = f"{node}.partial", f"{node}.maxsum"
        for name, last in ((acc, dim), (stat, 2)):
            self.extra[name] = buffer(name, DType.F32, (1, s.heads, s.splits, last), BufferKind.SCRATCH)
        for kv in range(s.kv_heads):
            heads = (kv * group, (kv + 1) * group)
            columns = ((0, 1), (0, 1), (heads[0] * dim, heads[1] * dim))
            mine = ((0, 1), (0, 1), (kv * dim, (kv + 1) * dim))
            for j in range(s.splits):
                span = (s.capacity * j // s.splits, s.capacity * (j + 1) // s.splits)
                old: Box = ((0, 1), (kv, kv + 1), span, (0, dim))
                part = ((0, 1), heads, (j, j + 1))
                reads = [Access(q, columns), Access(k, mine), Access(v, mine), Access(counter, ())]
                reads += [Access("mask", ((0, 1), (0, 1), (0, 1), span)), Access("rope", ((0, 1), (0, 1), (0, dim)))]
                reads += [Access(name, old, partition, Side.OFF) for name in (keys, values)]
                writes = [Access(acc, (*part, (0, dim))), Access(stat, (*part, (0, 2)))]
                if j == 0:  # one task of the head appends, wherever the position is
                    row: Box = ((0, 1), (kv, kv + 1), (0, s.capacity), (0, dim))
                    writes += [Access(name, row, partition, Side.AT) for name in (keys1, values1)]
                self.task("attention", (kv, j), reads, writes, 4 * (span[1] - span[0]) * dim)
        for i in range(s.heads):
            part = ((0, 1), (i, i + 1), (0, s.splits))
            reads = [Access(acc, (*part, (0, dim))), Access(stat, (*part, (0, 2)))]
            writes = [Access(out, ((0, 1), (0, 1), (i * dim, (i + 1) * dim)))]
            self.task("attention_combine", (i,), reads, writes, 4 * s.splits * (dim + 2))

        after = self.new(f"counter{layer}@1", DType.I64, (), BufferKind.STATE, counter)
        one = ex.op("add", position, ex.index(1))
        self.nodes.append(RowMap(f"map{len(self.nodes)}", (), one, after, (), where))
        self.task("row_map", (0, 1), [Access(counter, ())], [Access(after, ())], 16)


def qwen3_8b_like(sizes: Sizes = Sizes(), workers: int = 132) -> TaskGraph:
    """The TaskGraph, without events (`passes.tasks.derive_events` adds them): 24,937 tasks by default."""
    s, b = sizes, _Builder(workers)
    b.new("ids", DType.I64, (1, 1), BufferKind.INPUT)
    b.new("mask", DType.BOOL, (1, 1, 1, s.capacity), BufferKind.INPUT)
    b.new("rope", DType.F32, (1, 1, s.head_dim), BufferKind.INPUT)
    b.new("embed", DType.BF16, (s.vocab, s.hidden), BufferKind.PARAM)
    hidden = b.scratch("hidden", s.hidden)
    column, zero = ex.var("i0", s.hidden), ex.index(0)
    row = ex.load("embed", (ex.load("ids", (zero, zero), DType.I64), column), DType.BF16)
    b.nodes.append(RowMap("map0", (column,), row, hidden, (zero, zero, column), "model.embed_tokens"))
    reads = [Access("ids", ((0, 1), (0, 1))), Access("embed", ((0, s.vocab), (0, s.hidden)))]
    b.task("row_map", (0, s.hidden), reads, [Access(hidden, ((0, 1), (0, 1), (0, s.hidden)))], 4 * s.hidden)

    def norm(name: str) -> str:
        return b.new(name, DType.BF16, (s.hidden,), BufferKind.PARAM)

    width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    for i in range(s.layers):
        at = f"model.layers.{i}"
        q, k, v = b.scratch(f"q{i}", width), b.scratch(f"k{i}", kv_width), b.scratch(f"v{i}", kv_width)
        joined = [([f"wq{i}"], width, q), ([f"wk{i}"], kv_width, k), ([f"wv{i}"], kv_width, v)]
        b.linear(f"{at}.self_attn.q_proj", hidden, norm(f"norm{i}"), joined)
        mixed = b.scratch(f"mixed{i}", width)
        b.attention(i, s, q, k, v, mixed)
        middle = b.scratch(f"middle{i}", s.hidden)
        b.linear(f"{at}.self_attn.o_proj", mixed, None, [([f"wo{i}"], s.hidden, middle)], add=hidden)
        act = b.scratch(f"act{i}", s.ff)
        b.linear(f"{at}.mlp.gate_proj", middle, norm(f"post{i}"), [([f"gate{i}", f"up{i}"], s.ff, act)])
        hidden = b.scratch(f"hidden{i}", s.hidden)
        b.linear(f"{at}.mlp.down_proj", act, None, [([f"wd{i}"], s.hidden, hidden)], add=middle)
    logits = b.new("logits", DType.BF16, (1, 1, s.vocab), BufferKind.OUTPUT)
    b.linear("lm_head", hidden, norm("norm"), [(["lm_head"], s.vocab, logits)])
    graph = Graph(tuple(b.nodes), dict(b.buffers), (Output(logits),), ("by hand",))
    return TaskGraph(graph, {**b.buffers, **b.extra}, tuple(b.tasks))
