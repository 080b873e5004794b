"""Attention: one query token per sequence against a key-value cache, with an absorbed append.

Task kind `attention`, tile = (b, g, split, splits): the query heads of KV head g of sequence b against one of
`splits` ranges of the live keys, which is found at run time (`key_range`). With one split it writes the result.
With more it writes, per query head, the un-normalised sum of exp(score - m) V to `<name>.partial`
[B, Hq, splits, D] and (m, l) to `<name>.stats` [B, Hq, splits, 2], both f32: m the largest score, l the sum of
exp(score - m). A split without live keys has m = -inf, l = 0, partial = 0.

Task kind `attention_combine`, tile = (b, h_start, h_stop): merges the splits of these heads.

Every attention task of (b, g) computes the appended key and value row itself and uses it at s == position, so it
need not wait for the cache; the task of split 0 also writes the row. Hence caches are read off the position only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from ..ir.expr import Expr, Var, const, render, substitute
from ..ir.graph import Attention, Graph
from ..ir.region import Access, Side
from ..ir.types import Buffer, BufferKind, DType, buffer
from .access import Ranges, access_bytes, arithmetic, index_box, read_accesses, write_accesses
from .spec import Memory, TileSpec, Tiling

MIN_KEYS = 32
"""Keys per split, at least, when all of the cache is live."""


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
    """Half-open range of keys of one split, given the inclusive live range of a cache of `keys` rows."""
    low, high = max(0, first), min(keys, last + 1)
    chunk = -(-max(0, high - low) // splits)
    start = low + split * chunk
    return start, max(start, min(high, start + chunk))


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
            self._attention(node, buffers, b, g, split, splits)
            for b in range(node.b.size)
            for g in range(node.g.size)
            for split in range(splits)
        ]
        if splits > 1:
            per_b = max(1, min(node.h.size, workers // node.b.size))
            cuts = [node.h.size * i // per_b for i in range(per_b + 1)]
            for b in range(node.b.size):
                tasks += [self._combine(node, buffers, b, *cuts[i : i + 2], splits) for i in range(per_b)]
        return Tiling(tuple(tasks), extra)

    def _attention(self, node: Attention, buffers: Mapping[str, Buffer], b: int, g: int, split: int, splits: int) -> TileSpec:
        heads = (g * group_size(node), (g + 1) * group_size(node))
        ranges = {node.b: (b, b + 1), node.h: heads, node.g: (g, g + 1), node.d: (0, node.d.size)}
        shared = [e for e in (node.q, node.mask, node.first, node.last) if e is not None]
        appended = (node.append.position, node.append.key, node.append.value) if node.append else ()
        rest = read_accesses((*shared, *appended), ranges, buffers)
        partition = render(node.append.position) if node.append else ""
        side = Side.OFF if node.append else None
        caches = []
        for name, index in ((node.keys, node.key_index), (node.values, node.value_index)):
            caches.append(Access(name, index_box(index, buffers[name].shape, ranges), partition, side))
            rest += [a for a in read_accesses(index, ranges, buffers) if a not in rest]
        if splits == 1:
            writes = write_accesses(node.out, node.store, ranges, buffers)
        else:
            partial, stats = partial_names(node)
            at = ((b, b + 1), heads, (split, split + 1))
            writes = [Access(partial, (*at, (0, node.d.size))), Access(stats, (*at, (0, 2)))]
        moved = access_bytes(rest, buffers) + access_bytes(writes, buffers)
        moved += access_bytes(caches, buffers) // splits  # as if every key were live
        flops = 4 * group_size(node) * node.d.size * node.s.size // splits + arithmetic((*shared, *appended), ranges)
        if node.append and split == 0:
            rows = [(node.append.keys, node.key_index), (node.append.values, node.value_index)]
            for name, index in rows:
                box = index_box(index, buffers[name].shape, ranges)
                writes.append(Access(name, box, partition, Side.AT))
                moved += node.d.size * buffers[name].dtype.itemsize
        return TileSpec("attention", (b, g, split, splits), (*rest, *caches), tuple(writes), moved, flops)

    def _combine(self, node: Attention, buffers: Mapping[str, Buffer], b: int, start: int, stop: int, splits: int) -> TileSpec:
        partial, stats = partial_names(node)
        at = ((b, b + 1), (start, stop), (0, splits))
        reads = (Access(partial, (*at, (0, node.d.size))), Access(stats, (*at, (0, 2))))
        ranges = {node.b: (b, b + 1), node.h: (start, stop), node.d: (0, node.d.size)}
        writes = tuple(write_accesses(node.out, node.store, ranges, buffers))
        moved = access_bytes((*reads, *writes), buffers)
        flops = (stop - start) * splits * (2 * node.d.size + 4)
        return TileSpec("attention_combine", (b, start, stop), reads, writes, moved, flops)
