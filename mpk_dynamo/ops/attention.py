"""Attention: one query token per sequence against a key-value cache, with an absorbed append.

Task kind `attention`, tile = (b, g, split, splits): the query heads of KV head g of sequence b against one of
`splits` ranges of the live keys, which is found at run time (`key_range`). With one split it writes the result.
With more it writes, per query head, the un-normalised sum of exp(score - m) V to `<name>.partial`
[B, Hq, splits, D] and (m, l) to `<name>.stats` [B, Hq, splits, 2], both f32: m the largest score, l the sum of
exp(score - m). Only the first splits have keys, as many as `used_splits` says: the others write nothing. Where no key
counts, m = -inf, l = 0, partial = 0.

Task kind `attention_combine`, tile = (b, h_start, h_stop): merges the used splits of these heads.

Every attention task of (b, g) computes the appended key and value row itself and uses it at s == position, so it
need not wait for the cache; the task of split 0 also writes the row. Hence caches are read off the position only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..ir.expr import Expr, acc, cast, const, index, load, op, render, substitute, var, where
from ..ir.graph import Append, Attention, Graph, Node
from ..ir.region import Access, Side
from ..ir.types import Buffer, BufferKind, DType, buffer
from .access import access_bytes, arithmetic, index_box, read_accesses, write_accesses
from .evaluate import compile_assignment, compile_exprs, evaluate
from .sampling import F32, Sample, rms_norm
from .spec import Memory, TileSpec, Tiling

MIN_KEYS = 128
"""Keys per split, at least: 16 for each warp of a worker, which is what it has under way at once anyway. A split more
is one more partial result to publish and to combine."""


def split_count(node: Attention, workers: int) -> int:
    """Key ranges per (sequence, KV head): enough to use the workers, none below MIN_KEYS keys of a full cache."""
    return max(1, min(workers // (node.b.size * node.g.size), -(-node.s.size // MIN_KEYS)))


def partial_names(node: Attention) -> tuple[str, str]:
    """Names of the buffers of partial results: (partial, stats)."""
    return f"{node.name}.partial", f"{node.name}.stats"


def group_size(node: Attention) -> int:
    """Query heads per KV head."""
    return node.h.size // node.g.size


def key_range(first: int, last: int, keys: int, split: int, splits: int) -> tuple[int, int]:
    """Half-open range of keys of one split, given the half-open live range [first, last) of a cache of `keys` rows:
    equal ranges of at least MIN_KEYS keys, the last one shorter, so that splits may be left without any."""
    low, high = min(max(0, first), keys), min(max(0, last), keys)
    start = low + split * _chunk(high - low, splits)
    return min(start, max(low, high)), max(low, min(high, start + _chunk(high - low, splits)))


def used_splits(first: int, last: int, keys: int, splits: int) -> int:
    """How many splits write partial results, the first ones: those with keys, and one at least."""
    live = min(max(0, last), keys) - min(max(0, first), keys)
    return max(1, -(-live // _chunk(live, splits)))


def _chunk(live: int, splits: int) -> int:
    return max(MIN_KEYS, -(-live // splits))


class AttentionOperator:
    """See ops/spec.py for the contract."""

    name = "attention"

    def tile(self, node: Attention, graph: Graph, workers: int) -> Tiling:
        """Attention tasks by (b, g, split), then combining tasks when there are several splits."""
        splits = split_count(node, workers)
        extra: tuple[Buffer, ...] = ()
        if splits > 1:
            partial, stats = partial_names(node)
            shape = (node.b.size, node.h.size, splits)
            extra = (
                buffer(partial, DType.F32, (*shape, node.d.size), BufferKind.SCRATCH, origin=node.origin),
                buffer(stats, DType.F32, (*shape, 2), BufferKind.SCRATCH, origin=node.origin),
            )
        buffers = {**graph.buffers, **{b.name: b for b in extra}}
        tasks = [
            task
            for b in range(node.b.size)
            for g in range(node.g.size)
            for task in self._attention(node, buffers, b, g, splits)
        ]
        if splits > 1:
            per_b = max(1, min(node.h.size, workers // node.b.size))
            cuts = [node.h.size * i // per_b for i in range(per_b + 1)]
            for b in range(node.b.size):
                tasks += [self._combine(node, buffers, b, *cuts[i : i + 2], splits) for i in range(per_b)]
        return Tiling(tuple(tasks), extra)

    def context(self, node: Attention, graph: Graph, workers: int) -> None:
        """Nothing."""

    def _attention(
        self, node: Attention, buffers: Mapping[str, Buffer], b: int, g: int, splits: int
    ) -> list[TileSpec]:
        """The tasks of one KV head: they read the same, for which keys a split has is known at run time only."""
        heads = (g * group_size(node), (g + 1) * group_size(node))
        ranges = {node.b: (b, b + 1), node.h: heads, node.g: (g, g + 1), node.d: (0, node.d.size)}
        shared = [e for e in (node.q, node.mask, node.first, node.last) if e is not None]
        appended = (node.append.position, node.append.key, node.append.value) if node.append else ()
        rest = read_accesses((*shared, *appended), ranges, buffers)
        partition = render(node.append.position) if node.append else ""
        side = Side.OFF if node.append else None
        caches = []
        for name, idx in ((node.keys, node.key_index), (node.values, node.value_index)):
            caches.append(Access(name, index_box(idx, buffers[name].shape, ranges), partition, side))
            rest += [a for a in read_accesses(idx, ranges, buffers) if a not in rest]
        read = access_bytes(rest, buffers)
        read += access_bytes(caches, buffers) // splits  # as if every key were live
        flops = 4 * group_size(node) * node.d.size * node.s.size // splits + arithmetic((*shared, *appended), ranges)
        reads = (*rest, *caches)
        tasks = []
        for split in range(splits):
            if splits == 1:
                writes = write_accesses(node.out, node.store, ranges, buffers)
            else:
                partial, stats = partial_names(node)
                at = ((b, b + 1), heads, (split, split + 1))
                writes = [Access(partial, (*at, (0, node.d.size))), Access(stats, (*at, (0, 2)))]
            moved = read + access_bytes(writes, buffers)
            if node.append and split == 0:
                rows = [(node.append.keys, node.key_index), (node.append.values, node.value_index)]
                for name, idx in rows:
                    box = index_box(idx, buffers[name].shape, ranges)
                    writes.append(Access(name, box, partition, Side.AT))
                    moved += node.d.size * buffers[name].dtype.itemsize
            tasks.append(TileSpec("attention", (b, g, split, splits), reads, tuple(writes), moved, flops))
        return tasks

    def _combine(
        self, node: Attention, buffers: Mapping[str, Buffer], b: int, start: int, stop: int, splits: int
    ) -> TileSpec:
        partial, stats = partial_names(node)
        at = ((b, b + 1), (start, stop), (0, splits))
        ranges = {node.b: (b, b + 1), node.h: (start, stop), node.d: (0, node.d.size)}
        limits = read_accesses([e for e in (node.first, node.last) if e is not None], ranges, buffers)
        reads = (Access(partial, (*at, (0, node.d.size))), Access(stats, (*at, (0, 2))), *limits)
        writes = tuple(write_accesses(node.out, node.store, ranges, buffers))
        moved = access_bytes((*reads, *writes), buffers)
        flops = (stop - start) * splits * (2 * node.d.size + 4)
        return TileSpec("attention_combine", (b, start, stop), reads, writes, moved, flops)

    def prepare(
        self, node: Attention, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...]
    ) -> Callable[[Memory], None]:
        """A task of either kind as a function of memory."""
        prepare = self._prepare_attention if op == "attention" else self._prepare_combine
        return prepare(node, buffers, *tile)

    def run(
        self, node: Attention, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...], memory: Memory
    ) -> None:
        """Execute one task."""
        self.prepare(node, buffers, op, tile)(memory)

    def _prepare_attention(
        self, node: Attention, buffers: Mapping[str, Buffer], b: int, g: int, split: int, splits: int
    ) -> Callable[[Memory], None]:
        heads, keys = (g * group_size(node), (g + 1) * group_size(node)), node.s.size
        at_b, at_g, every_d = {node.b: (b, b + 1)}, {node.g: (g, g + 1)}, {node.d: (0, node.d.size)}
        query = compile_exprs((node.q,), {**at_b, node.h: heads, **every_d}, buffers)
        cache_loads = [
            load(name, idx, buffers[name].dtype)
            for name, idx in ((node.keys, node.key_index), (node.values, node.value_index))
        ]
        caches = compile_exprs(cache_loads, {**at_b, **at_g, node.s: (0, keys), **every_d}, buffers)
        live = _live_range(node, b, buffers)
        mask = None
        if node.mask is not None:
            mask = compile_exprs((node.mask,), {**at_b, node.h: heads, node.s: (0, keys)}, buffers)
        if splits == 1:
            ranges = {**at_b, node.h: heads, **every_d}
            finish = compile_assignment(
                cast(acc(0), buffers[node.out].dtype), node.out, node.store, ranges, buffers, accumulators=1
            )
        partial_name, stats_name = partial_names(node)
        append = node.append
        if append is not None:
            appended = compile_exprs((append.key, append.value), {**at_b, **at_g, **every_d}, buffers)
            position = compile_exprs((append.position,), at_b, buffers)
            rows = [
                compile_assignment(
                    cast(acc(0), buffers[name].dtype),
                    name,
                    tuple(substitute(i, {node.s: append.position}) for i in idx),
                    {**at_b, **at_g, **every_d},
                    buffers,
                    accumulators=1,
                )
                for name, idx in ((append.keys, node.key_index), (append.values, node.value_index))
            ]

        def task(memory: Memory) -> None:
            device = memory[node.out].device
            first, last = live(memory)
            start, stop = key_range(first, last, keys, split, splits)
            q = query(memory, (), device)[0].expand(1, group_size(node), node.d.size)[0].float()
            # a copy even when the cache is f32: the appended row is put into it
            k, v = (c[0, 0, start:stop].to(torch.float32, copy=True) for c in caches(memory))
            if append is not None:
                new = [r.expand(1, 1, node.d.size).float() for r in appended(memory, (), device)]
                at = int(position(memory, (), device)[0])
                if start <= at < stop:
                    k[at - start], v[at - start] = new[0][0, 0], new[1][0, 0]
            score = capped((q @ k.T) * node.scale, node.softcap)
            if mask is not None:
                score = apply_mask(score, mask(memory, (), device)[0].expand(1, -1, keys)[0, :, start:stop])
            top, weight, total = softmax_parts(score)
            v.masked_fill_((weight == 0).all(0).unsqueeze(1), 0.0)  # what an ignored key holds, even NaN, is no matter
            result = weight @ v
            if splits == 1:
                finish(memory, [divide(result, total).unsqueeze(0)])
            elif split < used_splits(first, last, keys, splits):
                memory[partial_name][b, heads[0] : heads[1], split] = result
                memory[stats_name][b, heads[0] : heads[1], split] = torch.cat((top, total), 1)
            if append is not None and split == 0:
                for row, value in zip(rows, new, strict=True):
                    row(memory, [value])

        return task

    def _prepare_combine(
        self, node: Attention, buffers: Mapping[str, Buffer], b: int, start: int, stop: int
    ) -> Callable[[Memory], None]:
        partial_name, stats_name = partial_names(node)
        splits, live = buffers[partial_name].shape[2], _live_range(node, b, buffers)
        ranges = {node.b: (b, b + 1), node.h: (start, stop), node.d: (0, node.d.size)}
        finish = compile_assignment(
            cast(acc(0), buffers[node.out].dtype), node.out, node.store, ranges, buffers, accumulators=1
        )

        def task(memory: Memory) -> None:
            used = used_splits(*live(memory), node.s.size, splits)
            partial, stats = memory[partial_name][b, start:stop, :used], memory[stats_name][b, start:stop, :used]
            top, total = stats[..., 0], stats[..., 1]
            _, weight, _ = softmax_parts(top)
            result = (weight.unsqueeze(-1) * partial).sum(1)
            finish(memory, [divide(result, (weight * total).sum(1, keepdim=True)).unsqueeze(0)])

        return task

    def oracle(self, node: Attention, buffers: Mapping[str, Buffer], memory: Memory) -> None:
        """Softmax over all keys of all heads at once, on copies of the caches with the new row in place."""
        over_b, over_g = {node.b: (0, node.b.size)}, {node.g: (0, node.g.size)}
        over_h, over_d = {node.h: (0, node.h.size)}, {node.d: (0, node.d.size)}
        over_s = {node.s: (0, node.s.size)}
        batch, keys, depth = node.b.size, node.s.size, node.d.size
        q = evaluate(node.q, {**over_b, **over_h, **over_d}, memory).float().expand(batch, node.h.size, depth)
        key_shape = (batch, node.g.size, keys, depth)
        k, v = (
            evaluate(load(name, idx, buffers[name].dtype), {**over_b, **over_g, **over_s, **over_d}, memory)
            .float().expand(key_shape).clone()
            for name, idx in ((node.keys, node.key_index), (node.values, node.value_index))
        )
        if node.append is not None:
            at = evaluate(node.append.position, over_b, memory).expand(batch).tolist()
            rows = [
                evaluate(e, {**over_b, **over_g, **over_d}, memory).expand(batch, node.g.size, depth).clone()
                for e in (node.append.key, node.append.value)
            ]
            places = ((node.append.keys, node.key_index, k), (node.append.values, node.value_index, v))
            for (name, idx, copy), row in zip(places, rows, strict=True):
                for i, s in enumerate(at):
                    copy[i, :, s] = row[i].float()
                    ranges = {node.b: (i, i + 1), **over_g, node.s: (s, s + 1), **over_d}
                    where = tuple(
                        evaluate(e, ranges, memory).expand(1, node.g.size, 1, depth)[0, :, 0] for e in idx
                    )
                    memory[name][where] = row[i]
        group = node.h.size // node.g.size
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        score = torch.einsum("bhd,bhsd->bhs", q, k) * node.scale
        if node.softcap is not None:
            score = torch.tanh(score / node.softcap) * node.softcap
        if node.mask is not None:
            mask = evaluate(node.mask, {**over_b, **over_h, **over_s}, memory).expand(score.shape)
            score = score.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else score + mask.float()
        s = torch.arange(keys, device=score.device)
        for limit, dead in ((node.first, s.lt), (node.last, s.ge)):
            if limit is not None:
                edge = evaluate(limit, over_b, memory).expand(batch)
                score = score.masked_fill(torch.stack([dead(int(e)) for e in edge])[:, None], -torch.inf)
        weight = torch.softmax(score, -1).nan_to_num(0.0)  # no live key at all: zeros
        result = torch.einsum("bhs,bhsd->bhd", weight, v)
        ranges = {**over_b, **over_h, **over_d}
        where = tuple(evaluate(e, ranges, memory).expand(result.shape) for e in node.store)
        memory[node.out][where] = result.to(memory[node.out].dtype)

    def samples(self) -> list[tuple[Node, Graph]]:
        """Group sizes 1 to 9; head sizes 16 to 256; cache lengths that divide by nothing; masks; live ranges;
        with and without append; prologues on q and k; capped scores; keys that begin in the middle of their cache."""
        bf16, f16, f32 = DType.BF16, DType.F16, DType.F32
        return [
            _sample(bf16, 1, 2, 1, 37, 16), _sample(f16, 2, 1, 7, 45, 80, append=True),
            _sample(f32, 2, 2, 2, 131, 64, append=True, mask="bool"),
            _sample(bf16, 1, 1, 4, 200, 128, append=True, mask="bool", live=True, norm=True),
            _sample(bf16, 3, 1, 2, 67, 64, mask="float"), _sample(f32, 1, 3, 4, 9, 16, mask="heads", live=True),
            _sample(bf16, 2, 2, 7, 100, 64, append=True, mask="causal", norm=True),
            _sample(f16, 2, 2, 1, 71, 16, append=True, live=True),
            _sample(bf16, 2, 2, 2, 83, 64, append=True, mask="float", cap=True),
            _sample(bf16, 2, 1, 9, 300, 256, append=True, mask="bool", live=True),
            _sample(f16, 1, 2, 3, 520, 96, append=True, mask="float", norm=True),
            _sample(f32, 1, 1, 3, 300, 72, append=True, live=True),
            _sample(bf16, 1, 2, 4, 1100, 64, append=True, live=True), _sample(bf16, 2, 1, 2, 9, 64, append=True),
            _sample(f16, 1, 2, 3, 150, 64, append=True, mask="bool", live=True, turned=True),
        ]

    def at_position(
        self, node: Attention, buffers: Mapping[str, Buffer], access: Access, memory: Memory
    ) -> torch.Tensor:
        """Which elements of `access.box` lie at its partition's position: bool, shaped like the box.

        For checking tools. Raises ValueError for a partition this node does not have."""
        if node.append is None or access.partition != render(node.append.position):
            raise ValueError(f"{node.name} has no partition {access.partition!r}")
        of_keys = access.buffer in (node.keys, node.append.keys)
        idx = node.key_index if of_keys else node.value_index
        out = torch.zeros([stop - start for start, stop in access.box], dtype=torch.bool)
        at = evaluate(node.append.position, {node.b: (0, node.b.size)}, memory).expand(node.b.size).tolist()
        for b, s in enumerate(at):
            ranges = {node.b: (b, b + 1), node.g: (0, node.g.size), node.s: (s, s + 1), node.d: (0, node.d.size)}
            box = index_box(idx, buffers[access.buffer].shape, ranges)
            inside = [(max(a, c) - a, min(z, e) - a) for (a, z), (c, e) in zip(access.box, box, strict=True)]
            if all(start < stop for start, stop in inside):
                out[tuple(slice(start, stop) for start, stop in inside)] = True
        return out


def _live_range(node: Attention, b: int, buffers: Mapping[str, Buffer]) -> Callable[[Memory], tuple[int, int]]:
    """The half-open range of live keys of a sequence, as a function of memory: all keys without limits."""
    limits = compile_exprs([e for e in (node.first, node.last) if e is not None], {node.b: (b, b + 1)}, buffers)

    def live(memory: Memory) -> tuple[int, int]:
        found = iter(int(v) for v in limits(memory, (), memory[node.out].device))
        first = next(found) if node.first is not None else 0
        return first, next(found) if node.last is not None else node.s.size

    return live


def capped(score: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scaled scores, bent so that none exceeds `softcap` in size."""
    return score if softcap is None else softcap * torch.tanh(score / softcap)


def apply_mask(score: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores under a mask: bool, False ignores the key; float, added."""
    return score.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else score + mask.float()


def softmax_parts(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m, exp(score - m), its sum) over the last dimension, m and the sum with one column. Without a score above
    -inf: -inf, zeros, 0."""
    if score.shape[-1] == 0:
        empty = score.new_zeros((*score.shape[:-1], 1))
        return empty - torch.inf, score, empty
    top = score.amax(-1, keepdim=True)
    weight = torch.exp(score - top.masked_fill(top == -torch.inf, 0.0))
    return top, weight, weight.sum(-1, keepdim=True)


def divide(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Quotient, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _sample(
    dtype: DType, batch: int, groups: int, group: int, keys: int, depth: int,
    append: bool = False, mask: str = "", live: bool = False, norm: bool = False,
    cap: bool = False, turned: bool = False,
) -> tuple[Node, Graph]:
    s, heads = Sample(), groups * group
    b, h, g, k, d = var("b", batch), var("h", heads), var("g", groups), var("s", keys), var("d", depth)
    q, out = s.input("q", dtype, batch, heads, depth), s.output("out", dtype, batch, 1, heads * depth)
    k_old, k_new = s.state("keys", dtype, batch, groups, keys, depth)
    v_old, v_new = s.state("values", dtype, batch, keys, groups, depth)
    query: Expr = s.at(q, b, h, d)
    if norm:
        weight = s.param("q_norm", dtype, depth)
        query = rms_norm(lambda i: s.wide(q, b, h, i), d, lambda i: s.wide(weight, i), dtype)
    added = None
    if append:
        position, new = s.input("position", DType.I64), s.input("new", dtype, batch, groups, 2, depth)
        half = index(depth // 2)
        partner = where(
            op("lt", d, half),
            op("neg", s.wide(new, b, g, 0, op("add", d, half))),
            s.wide(new, b, g, 0, op("sub", d, half)),
        )
        key = cast(op("add", s.wide(new, b, g, 0, d), op("mul", partner, const(0.25, F32))), dtype)
        added = Append(s.at(position), key, s.at(new, b, g, 1, d), k_new, v_new)
    masks: dict[str, Expr | None] = {"": None}
    if mask == "bool":
        masks[mask] = s.at(s.input("mask", DType.BOOL, batch, 1, 1, keys), b, 0, 0, k)
    elif mask == "float":
        masks[mask] = s.at(s.input("mask", dtype, batch, 1, 1, keys), b, 0, 0, k)
    elif mask == "heads":
        masks[mask] = s.at(s.input("mask", F32, heads, keys), h, k)
    elif mask == "causal":
        length = added.position if added else index(keys // 2)
        masks[mask] = op("le", k, length)
    first = last = None
    if live:
        first = s.at(s.input("first", DType.I64, batch), b)
        last = s.at(s.input("last", DType.I64, batch), b)
    store = (b, index(0), op("add", op("mul", h, index(depth)), d))
    row = op("mod", op("add", k, index(3)), index(keys)) if turned else k
    node = Attention(
        "attention", b, h, g, k, d, query, k_old, (b, g, row, d), v_old, (b, row, g, d), depth**-0.5, out, store,
        masks[mask], first, last, added, 0.7 if cap else None,
    )
    if not append:
        for name in (k_new, v_new):
            del s.buffers[name]
    return s.graph(node)
