"""Linear: x @ weight.T for weights that share x, with a prologue on x and an epilogue on the accumulators.

Task kind `linear`, tile = (part, row, rows, part, row, rows, ...): segments, each a range of rows of a part, that
follow one another in the concatenation of the parts. Tasks move the same weight bytes up to one row (eight rows
when there are several tokens, the tensor-core tile; two when parts have different numbers of joint weights), since a
decode step is bound by them. Of transposed weights a row is a column, and tasks differ by one 16-byte vector of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from ..ir.expr import Expr, acc, cast, index, op, var
from ..ir.graph import Graph, Linear, LinearPart, Node
from ..ir.region import Access, Box
from ..ir.types import Buffer, DType
from .access import StoreSweep, Sweep, access_bytes, arithmetic, read_accesses
from .evaluate import compile_assignment, compile_exprs, evaluate
from .sampling import Sample, rms_norm, silu
from .spec import Memory, TileSpec, Tiling

TENSOR_CORE_ROWS = 8

VECTOR_BYTES = 16

CACHED_WEIGHTS = 1 << 18
"""Weights converted to f32 at a time by `run`: 1 MiB, so that the copy stays in a core's cache."""

Segment = tuple[int, int, int]
"""(part, first row, rows)"""


def segments(tile: tuple[int, ...]) -> list[Segment]:
    """The segments of a task's tile."""
    return [(tile[i], tile[i + 1], tile[i + 2]) for i in range(0, len(tile), 3)]


def cut_rows(parts: tuple[LinearPart, ...], workers: int, granularity: int, phase: int) -> list[list[Segment]]:
    """Contiguous ranges of the concatenated parts with equal weight bytes, one per worker (fewer when there are
    fewer blocks of `granularity` rows). When blocks do not divide evenly, the workers from `phase` on get one more.
    Where the parts can have workers of their own, no range goes over two of them: such a worker is the last to end."""
    blocks = [-(-p.rows // granularity) for p in parts]
    weight = [len(p.weights) for p in parts]
    total = sum(blocks)
    tasks = max(1, min(workers, total))
    if len(set(weight)) == 1:
        own, cuts = _own_tasks(blocks, tasks), [0]
        for count, ranges in zip(blocks, own, strict=True) if own else [(total, tasks)]:
            base, extra = divmod(count, ranges)
            for w in range(ranges):
                cuts.append(cuts[-1] + base + ((w - phase) % ranges < extra))
    else:
        cuts = _balanced_cuts([w for n, w in zip(blocks, weight, strict=True) for _ in range(n)], tasks)
    out = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        task, offset = [], 0
        for i, part in enumerate(parts):
            first, last = max(start, offset) - offset, min(stop, offset + blocks[i]) - offset
            if first < last:
                row = first * granularity
                task.append((i, row, min(last * granularity, part.rows) - row))
            offset += blocks[i]
        out.append(task)
    return out


def _own_tasks(blocks: list[int], tasks: int) -> list[int]:
    """Tasks of each part, when the parts can share them out so that none has fewer blocks than an equal share rounded
    down or more than that rounded up; otherwise none."""
    total = sum(blocks)
    own = [n * tasks // total for n in blocks]
    for i in sorted(range(len(blocks)), key=lambda i: -(blocks[i] * tasks % total))[: tasks - sum(own)]:
        own[i] += 1
    least, most = total // tasks, -(-total // tasks)
    return own if all(w and least <= n // w and -(-n // w) <= most for n, w in zip(blocks, own, strict=True)) else []


def _balanced_cuts(weights: list[int], tasks: int) -> list[int]:
    """Cut a list of block weights into `tasks` non-empty runs, each cut at the block boundary nearest to the ideal."""
    total, done, cuts = sum(weights), 0, [0]
    for position, weight in enumerate(weights):
        wanted = len(cuts)
        if wanted == tasks:
            break
        left_after = len(weights) - position - 1
        target = total * wanted / tasks
        done += weight
        nearer_here = abs(done - target) <= abs(done + sum(weights[position + 1 : position + 2]) - target)
        if nearer_here or left_after == tasks - wanted:
            cuts.append(position + 1)
    return [*cuts, len(weights)]


def granularity(node: Linear) -> int:
    """Rows per block: 8 when several tokens use the tensor cores, those of a 16-byte vector when weights are
    transposed, else 1."""
    if node.transposed:
        return VECTOR_BYTES // node.x.dtype.itemsize
    return TENSOR_CORE_ROWS if node.t.size > 1 else 1


def weight_box(node: Linear, start: int, stop: int) -> Box:
    """Where rows [start, stop) lie in a weight."""
    rows, depth = (start, stop), (0, node.k.size)
    return (depth, rows) if node.transposed else (rows, depth)


def phase_of(node: Linear, graph: Graph, workers: int) -> int:
    """First worker that gets an extra block: continues where the Linears before this one stopped, so that over the
    whole graph every worker gets the same number of extras."""
    phase = 0
    for other in graph.nodes:
        if other is node:
            break
        if isinstance(other, Linear):
            block = granularity(other)
            blocks = sum(-(-p.rows // block) for p in other.parts)
            phase += blocks % workers if blocks >= workers else blocks
    return phase % workers


class LinearOperator:
    """See ops/spec.py for the contract."""

    name = "linear"

    def tile(self, node: Linear, graph: Graph, workers: int) -> Tiling:
        """One task per worker, equal in weight bytes."""
        buffers = graph.buffers
        tokens = {node.t: (0, node.t.size)}
        whole_x = {**tokens, node.k: (0, node.k.size)}
        x_reads = read_accesses((node.x,), whole_x, buffers)
        x_bytes, x_flops = access_bytes(x_reads, buffers), arithmetic((node.x,), whole_x)
        sweeps = []
        for part in node.parts:
            n = part.n
            loads = Sweep((part.epilogue, *part.store), n, tokens, buffers)
            sweeps.append((n, loads, StoreSweep(part.out, part.store, n, tokens, buffers)))
        every_x = dict.fromkeys(x_reads)
        tasks = []
        for task in cut_rows(node.parts, workers, granularity(node), self.context(node, graph, workers)):
            reads, writes = every_x.copy(), {}
            moved, flops = x_bytes, x_flops
            for which, row, rows in task:
                part, (n, loads, stores), stop = node.parts[which], sweeps[which], row + rows
                weights = [Access(w, weight_box(node, row, stop)) for w in part.weights]
                loaded, stored = loads(row, stop), stores(row, stop)
                reads.update(dict.fromkeys([*weights, *loaded]))
                writes.update(dict.fromkeys(stored))
                moved += access_bytes([*weights, *loaded, *stored], buffers)
                flops += 2 * node.t.size * node.k.size * rows * len(part.weights)
                flops += arithmetic((part.epilogue,), {**tokens, n: (row, stop)})
            tile = tuple(i for segment in task for i in segment)
            tasks.append(TileSpec("linear", tile, tuple(reads), tuple(writes), moved, flops))
        return Tiling(tuple(tasks))

    def context(self, node: Linear, graph: Graph, workers: int) -> int:
        """Where the row ranges that are one block longer begin."""
        return phase_of(node, graph, workers)

    def prepare(
        self, node: Linear, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...]
    ) -> Callable[[Memory], None]:
        """The task of a tile's segments as a function of memory."""
        tokens = (0, node.t.size)
        prologue = compile_exprs((node.x,), {node.t: tokens, node.k: (0, node.k.size)}, buffers)
        shape = (node.t.size, node.k.size)
        work = []
        for which, row, rows in segments(tile):
            part = node.parts[which]
            ranges = {node.t: tokens, part.n: (row, row + rows)}
            store = compile_assignment(part.epilogue, part.out, part.store, ranges, buffers, len(part.weights))
            work.append((part.weights, row, row + rows, store))

        def task(memory: Memory) -> None:
            x = prologue(memory)[0].expand(shape).float()
            for weights, start, stop, store in work:
                store(memory, [multiply(x, _by_rows(node, memory[w]), start, stop) for w in weights])

        return task

    def run(self, node: Linear, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...], memory: Memory) -> None:
        """Execute one task."""
        self.prepare(node, buffers, op, tile)(memory)

    def oracle(self, node: Linear, buffers: Mapping[str, Buffer], memory: Memory) -> None:
        """One matrix product per weight."""
        x = evaluate(node.x, {node.t: (0, node.t.size), node.k: (0, node.k.size)}, memory).float()
        x = x.expand(node.t.size, node.k.size)
        for part in node.parts:
            ranges, sizes = {node.t: (0, node.t.size), part.n: (0, part.rows)}, (node.t.size, part.rows)
            accumulators = [torch.nn.functional.linear(x, _by_rows(node, memory[w]).float()) for w in part.weights]
            value = evaluate(part.epilogue, ranges, memory, accumulators).expand(sizes).clone()
            memory[part.out][tuple(evaluate(e, ranges, memory).expand(sizes) for e in part.store)] = value

    def samples(self) -> list[tuple[Node, Graph]]:
        """Types, token counts, depths that are no power of two, rows that divide by nothing, several parts, joint
        weights, prologues and epilogues."""
        bf16, f16, f32 = DType.BF16, DType.F16, DType.F32
        return [
            _plain(bf16, 1, 64, 37), _plain(f16, 3, 72, 50), _plain(f32, 8, 40, 133), _plain(bf16, 16, 136, 24),
            _plain(bf16, 1, 520, 510), _plain(f16, 2, 520, 510),  # more weights than `run` converts at a time
            _gated(bf16, 1, 72, 45), _gated(f16, 8, 64, 20), _gated(f32, 1, 24, 5),
            _residual(bf16, 1, 104, 33), _residual(f16, 16, 48, 17),
            _qkv(bf16, 1, 64, (6, 2, 2), 16), _qkv(bf16, 3, 64, (4, 1, 1), 24), _qkv(f32, 16, 32, (3, 3, 3), 8),
            _mixed(bf16, 1, 40),
            _transposed(bf16, 1, 64, (40,)), _transposed(f16, 3, 72, (56,)), _transposed(f32, 8, 40, (132,)),
            _transposed(bf16, 16, 136, (24, 8, 16)), _transposed(bf16, 1, 520, (512,)),
            _transposed(f32, 1, 1104, (20,)), _transposed(bf16, 1, 2304, (96,)), _transposed(f16, 13, 3072, (320,)),
            _transposed(bf16, 1, 72, (48,), 2), _transposed(f16, 4, 64, (24,), 2),
        ]


def _by_rows(node: Linear, weight: torch.Tensor) -> torch.Tensor:
    """A weight as [rows, K], whatever lies next to each other."""
    return weight.T if node.transposed else weight


def multiply(x: torch.Tensor, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """x [T, K] in f32 times rows [start, stop) of a weight [N, K], accumulated in f32: [T, stop - start] f32."""
    if weight.dtype is torch.float32:
        return x @ weight[start:stop].T
    depth = x.shape[1]
    step = max(1, CACHED_WEIGHTS // depth)
    room = workspace(x.device, max(CACHED_WEIGHTS, depth))
    out = x.new_empty((x.shape[0], stop - start))
    for first in range(start, stop, step):
        rows = min(step, stop - first)
        wide = room[: rows * depth].view(rows, depth)
        wide.copy_(weight[first : first + rows])
        torch.mm(x, wide.T, out=out[:, first - start : first - start + rows])
    return out


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, torch.Tensor] = {}


_ROOMS = _Rooms()


def workspace(device: torch.device, elements: int) -> torch.Tensor:
    """A reused f32 vector of this thread: a fresh megabyte for each conversion costs more in page faults than the
    conversion (5 times, on one machine)."""
    kept = _ROOMS.by_device.get(device)
    if kept is None or kept.numel() < elements:
        kept = _ROOMS.by_device[device] = torch.empty(elements, device=device)
    return kept


def _node(
    s: Sample, name: str, t: int, k: int, x: Expr, parts: list[LinearPart], transposed: bool = False
) -> tuple[Node, Graph]:
    return s.graph(Linear(name, var("t", t), var("k", k), x, tuple(parts), transposed=transposed))


def _plain(dtype: DType, t: int, k: int, n: int) -> tuple[Node, Graph]:
    s, tv, kv, nv = Sample(), var("t", t), var("k", k), var("n", n)
    x, w, out = s.input("x", dtype, t, k), s.param("w", dtype, n, k), s.output("out", dtype, t, n)
    part = LinearPart((w,), n, cast(acc(0), dtype), out, (tv, nv))
    return _node(s, "plain", t, k, s.at(x, tv, kv), [part])


def _normed(s: Sample, dtype: DType, t: int, k: int) -> Expr:
    x, w = s.input("x", dtype, t, 1, k), s.param("norm", dtype, k)
    tv, kv = var("t", t), var("k", k)
    return rms_norm(lambda i: s.wide(x, tv, 0, i), kv, lambda i: s.wide(w, i), dtype)


def _gated(dtype: DType, t: int, k: int, n: int) -> tuple[Node, Graph]:
    """silu(gate + bias) * up of a normed input, rounded like the unfused graph."""
    s, tv, nv = Sample(), var("t", t), var("n", n)
    x = _normed(s, dtype, t, k)
    gate, up, bias = s.param("gate", dtype, n, k), s.param("up", dtype, n, k), s.param("bias", dtype, n)
    out = s.output("out", dtype, t, 1, n)
    biased = cast(cast(op("add", acc(0), s.wide(bias, nv)), dtype), DType.F32)
    act = cast(cast(silu(biased), dtype), DType.F32)
    y = cast(op("mul", act, cast(cast(acc(1), dtype), DType.F32)), dtype)
    return _node(s, "gated", t, k, x, [LinearPart((gate, up), n, y, out, (tv, index(0), nv))])


def _residual(dtype: DType, t: int, k: int, n: int) -> tuple[Node, Graph]:
    s, tv, nv, kv = Sample(), var("t", t), var("n", n), var("k", k)
    heads, w = s.input("heads", dtype, t, k // 8, 8), s.param("w", dtype, n, k)
    residual, out = s.input("residual", dtype, t, n), s.output("out", dtype, t, n)
    x = s.at(heads, tv, op("floordiv", kv, index(8)), op("mod", kv, index(8)))
    rounded = cast(cast(acc(0), dtype), DType.F32)
    y = cast(op("add", s.wide(residual, tv, nv), rounded), dtype)
    return _node(s, "residual", t, k, x, [LinearPart((w,), n, y, out, (tv, nv))])


def _qkv(dtype: DType, t: int, k: int, heads: tuple[int, int, int], d: int) -> tuple[Node, Graph]:
    """Three parts, stored by head: [t, head, d]."""
    s, tv = Sample(), var("t", t)
    x, parts = _normed(s, dtype, t, k), []
    for name, h in zip("qkv", heads, strict=True):
        n, nv = h * d, var("n", h * d)
        w, b, out = s.param(f"w{name}", dtype, n, k), s.param(f"b{name}", dtype, n), s.output(name, dtype, t, h, d)
        y = cast(op("add", acc(0), s.wide(b, nv)), dtype)
        store = (tv, op("floordiv", nv, index(d)), op("mod", nv, index(d)))
        parts.append(LinearPart((w,), n, y, out, store))
    return _node(s, "qkv", t, k, x, parts)


def _mixed(dtype: DType, t: int, k: int) -> tuple[Node, Graph]:
    """A part with two joint weights beside one with a single weight of another output type."""
    s, tv, kv = Sample(), var("t", t), var("k", k)
    x = s.at(s.input("x", dtype, t, k), tv, kv)
    a, b, c = s.param("a", dtype, 29, k), s.param("b", dtype, 29, k), s.param("c", dtype, 18, k)
    joint, single = s.output("joint", dtype, t, 29), s.output("single", DType.F32, t, 18)
    return _node(s, "mixed", t, k, x, [
        LinearPart((a, b), 29, cast(op("mul", acc(0), acc(1)), dtype), joint, (tv, var("n", 29))),
        LinearPart((c,), 18, op("tanh", acc(0)), single, (tv, var("n", 18))),
    ])


def _transposed(dtype: DType, t: int, k: int, rows: tuple[int, ...], joint: int = 1) -> tuple[Node, Graph]:
    """Weights stored [K, rows], with a bias; of one token, and in 16-bit types, x is normed."""
    s, tv, kv = Sample(), var("t", t), var("k", k)
    x = s.at(s.input("x", dtype, t, k), tv, kv) if dtype is DType.F32 and t > 1 else _normed(s, dtype, t, k)
    parts = []
    for i, n in enumerate(rows):
        nv, bias = var("n", n), s.param(f"bias{i}", dtype, n)
        weights = tuple(s.param(f"w{i}_{j}", dtype, k, n) for j in range(joint))
        y = acc(0) if joint == 1 else op("mul", acc(0), op("tanh", acc(1)))
        y = cast(op("add", y, s.wide(bias, nv)), dtype)
        parts.append(LinearPart(weights, n, y, s.output(f"out{i}", dtype, t, n), (tv, nv)))
    return _node(s, "transposed", t, k, x, parts, transposed=True)
