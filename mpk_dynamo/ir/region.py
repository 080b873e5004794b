"""Boxes of a buffer, and accesses to them."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import LaunchError

Box = tuple[tuple[int, int], ...]  # half-open [start, stop) per dimension; () is a whole 0-d tensor


class Side(enum.Enum):
    """Side of a partition of a box at a position that only the device knows (the row a cache append writes)."""

    AT = "at"  # only the elements at the position
    OFF = "off"  # only the elements not at the position


@dataclass(frozen=True)
class Access:
    """Elements of `buffer` (a Buffer's name) that a task may touch: a box, optionally one side of a partition.

    `partition` names the data-dependent position (text of its expression). Two accesses with the same partition
    and different sides are disjoint, whatever the position is.
    """

    buffer: str
    box: Box
    partition: str = ""
    side: Side | None = None


def boxes_overlap(a: Box, b: Box) -> bool:
    return all(x0 < y1 and y0 < x1 for (x0, x1), (y0, y1) in zip(a, b, strict=True))


def box_size(box: Box) -> int:
    size = 1
    for start, stop in box:
        size *= max(0, stop - start)
    return size


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, s) for s in shape)


Span = tuple[int, int, bool, str]  # addresses [start, stop), whether it is written, name


def check_apart(spans: Iterable[Span]) -> None:
    """Raises LaunchError when two spans share a byte and one of them is written: the order of the program's accesses
    was made for tensors that are apart."""
    last, written = (0, ""), (0, "")  # the furthest stop so far, of all and of those that are written
    for start, stop, writes, name in sorted(spans):
        other, found = last if writes else written
        if start < other and start < stop:
            raise LaunchError(
                f"{found} and {name} share memory, and one of them is written in place",
                remedy="pass a clone() of one of them",
            )
        last = max(last, (stop, name))
        if writes:
            written = max(written, (stop, name))
