"""Which declared accesses of one storage can touch a common element."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import or_

from ...ir.region import Box, Side

Extent = tuple[Box, str, Side | None]
"""What distinguishes two accesses of one storage: box, partition, side (the last two empty when unpartitioned)."""


class Overlaps:
    """For a fixed list of extents: which others each one meets, and which it covers, as bitsets over the list.

    A box meets another when each dimension does, and in one dimension those that meet [a, b) are those that start
    before b and stop after a: two lookups among sorted ends. So the table costs n lookups per dimension and n
    bitset operations, instead of n * n comparisons of boxes.
    """

    def __init__(self, extents: Sequence[Extent]) -> None:
        everything = (1 << len(extents)) - 1
        self.meets = [everything] * len(extents)
        self.covers = [everything] * len(extents)
        for dim in range(len(extents[0][0]) if extents else 0):
            ends = [box[dim] for box, _, _ in extents]
            starts, started = _prefixes([(start, i) for i, (start, _) in enumerate(ends)])
            stops, stopped = _prefixes([(stop, i) for i, (_, stop) in enumerate(ends)])
            for i, (a, b) in enumerate(ends):
                before_b, until_a = started[bisect_left(starts, b)], stopped[bisect_right(stops, a)]
                self.meets[i] &= before_b & ~until_a
                self.covers[i] &= ~started[bisect_left(starts, a)] & stopped[bisect_right(stops, b)]
        empty = sum(1 << i for i, (box, _, _) in enumerate(extents) if any(a >= b for a, b in box))
        same: dict[tuple[str, Side | None], int] = {}
        for i, (_, partition, side) in enumerate(extents):
            same[partition, side] = same.get((partition, side), 0) | 1 << i
        for i, (_, partition, side) in enumerate(extents):
            self.meets[i] &= 0 if empty >> i & 1 else ~empty
            if side is not None:
                other = Side.OFF if side is Side.AT else Side.AT
                self.meets[i] &= ~same.get((partition, other), 0)
                # the rest of the box stays as it was, so only accesses of the same side are superseded
                self.covers[i] &= same[partition, side]
            self.covers[i] &= self.meets[i]


def _prefixes(ends: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Sorted values, and for each count n of them the bitset of the n extents with the smallest values."""
    ends.sort()
    return [value for value, _ in ends], list(accumulate((1 << i for _, i in ends), or_, initial=0))
