"""Overlapping pairs of boxes, by a sweep along the dimension that separates them best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from ..ir.region import Box

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(i, j, number of common elements), each an array of equal length."""

PAIRS_AT_ONCE = 1 << 21
"""Candidate pairs held in memory at a time (about 100 MB of temporaries)."""

KEPT_PAIRS = 1 << 16
"""Pairs of two sets of boxes, at most, that are kept for the next two sets that are equal."""


def stack(boxes: Sequence[Box]) -> np.ndarray:
    """int64 [count, rank, 2]. A 0-d box becomes the 1-d box 0:1."""
    if not boxes:
        return np.zeros((0, 1, 2), dtype=np.int64)
    if not boxes[0]:
        return np.broadcast_to(np.array([[[0, 1]]], dtype=np.int64), (len(boxes), 1, 2))
    ends = chain.from_iterable(chain.from_iterable(boxes))
    return np.fromiter(ends, dtype=np.int64).reshape(len(boxes), -1, 2)


def volumes(boxes: np.ndarray) -> np.ndarray:
    """Elements in each box of `stack`."""
    return np.prod(np.maximum(boxes[:, :, 1] - boxes[:, :, 0], 0), axis=1)


class Overlaps:
    """`overlapping`, worked out once for equal boxes: the layers of a model have the same ones in other buffers."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[Pairs]] = {}

    def __call__(self, a: np.ndarray, b: np.ndarray) -> Iterable[Pairs]:
        key = a.shape, a.tobytes(), b.tobytes()
        found = self._known.get(key)
        if found is None:
            pieces = overlapping(a, b)
            first = list(islice(pieces, 1))
            if first and len(first[0][0]) > KEPT_PAIRS:
                return chain(first, pieces)
            found = self._known[key] = [*first, *pieces]
        return found


def overlapping(a: np.ndarray, b: np.ndarray) -> Iterator[Pairs]:
    """Every (i, j) where a[i] and b[j] have an element in common, with the number of common elements; in pieces."""
    if not len(a) or not len(b):
        return
    d = max(range(b.shape[1]), key=lambda k: len(np.unique(b[:, k, 0])))
    order = np.argsort(b[:, d, 0], kind="stable")
    # candidates of a[i] start before a[i] stops; those before `low` all stop before a[i] starts
    high = np.searchsorted(b[order, d, 0], a[:, d, 1], side="left")
    low = np.searchsorted(np.maximum.accumulate(b[order, d, 1]), a[:, d, 0], side="right")
    for i, k in ranges(low, np.maximum(high - low, 0)):
        j = order[k]
        shared = np.minimum(a[i, :, 1], b[j, :, 1]) - np.maximum(a[i, :, 0], b[j, :, 0])
        keep = (shared > 0).all(axis=1)
        if keep.any():
            yield i[keep], j[keep], np.prod(shared[keep], axis=1)


def ranges(first: np.ndarray, count: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(i, first[i] + 0), (i, first[i] + 1), ... for each i, as index arrays of bounded length.

    A single i with more than PAIRS_AT_ONCE elements comes as one piece.
    """
    ends = np.cumsum(count)
    begin = 0
    while begin < len(count):
        done = ends[begin - 1] if begin else 0
        stop = max(int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")), begin + 1)
        n = count[begin:stop]
        total = int(n.sum())
        if total:
            i = np.repeat(np.arange(begin, stop), n)
            yield i, np.arange(total) - np.repeat(ends[begin:stop] - n - done, n) + first[i]
        begin = stop


def products(
    tasks_a: "TaskLists", groups_a: np.ndarray, tasks_b: "TaskLists", groups_b: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each p: every (x, y) of tasks_a[groups_a[p]] x tasks_b[groups_b[p]], as arrays (p, x, y); in pieces."""
    width = tasks_b.counts[groups_b]
    for p, k in ranges(np.zeros(len(groups_a), dtype=np.int64), tasks_a.counts[groups_a] * width):
        x, y = np.divmod(k, width[p])
        yield p, tasks_a.flat[tasks_a.starts[groups_a[p]] + x], tasks_b.flat[tasks_b.starts[groups_b[p]] + y]


class TaskLists:
    """Lists of task ids, one per group, laid end to end."""

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        self.counts = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        self.starts = np.cumsum(self.counts) - self.counts
        self.flat = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(self.counts.sum()))
