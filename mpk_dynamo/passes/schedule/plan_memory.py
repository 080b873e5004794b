"""Where each plain (not flagged) scratch storage lies in the arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.tasks import TaskGraph
from ...ir.types import BufferKind
from ..tasks.predecessors import predecessors

ALIGNMENT = 256
"""Bytes. Enough for any vector access and bulk copy; whole cache lines, so that storages never share one."""


@dataclass
class _Life:
    """size: bytes, padded. users: bitset of tasks that access the storage. before: tasks ordered before all users."""

    size: int = 0
    users: int = 0
    before: int = -1


def plan_memory(tg: TaskGraph, queues: Sequence[Sequence[int]] = ()) -> tuple[dict[str, int], int]:
    """Byte offset of each plain SCRATCH storage, and the size of the region they need; multiples of 256 bytes.

    Two storages share bytes only if every user of one is ordered, by events and queues, before every user of the
    other: being last in the task list is not enough. Large storages are placed first, each in the tightest gap
    between those it may not share with (greedy by size, as in Pisarchyk and Lee, "Efficient Memory Management for
    Deep Neural Net Inference", 2020).
    """
    lives = _lives(tg, queues)
    order = sorted(lives, key=lambda name: (-lives[name].size, lives[name].users & -lives[name].users, name))
    arena: dict[str, int] = {}
    for name in order:
        life = lives[name]
        taken = sorted((arena[o], arena[o] + lives[o].size) for o in arena if not _ordered(life, lives[o]))
        arena[name] = tightest_gap(taken, life.size)
    end = max((arena[name] + life.size for name, life in lives.items()), default=0)
    return {name: arena[name] for name in lives}, end


def _lives(tg: TaskGraph, queues: Sequence[Sequence[int]]) -> dict[str, _Life]:
    lives: dict[str, _Life] = {}
    by_buffer: dict[str, _Life] = {}
    for buffer in tg.buffers.values():
        if buffer.kind is BufferKind.SCRATCH and buffer.storage not in tg.flagged:
            life = by_buffer[buffer.name] = lives.setdefault(buffer.storage, _Life())
            life.size = max(life.size, ALIGNMENT * max(1, -(-buffer.nbytes // ALIGNMENT)))
    for task, before in zip(tg.tasks, predecessors(tg, queues)):
        bit = 1 << task.id
        for access in (*task.reads, *task.writes):
            life = by_buffer.get(access.buffer)
            if life is not None and not life.users & bit:
                life.users |= bit
                life.before &= before
    return lives


def _ordered(a: _Life, b: _Life) -> bool:
    return a.users & b.before == a.users or b.users & a.before == b.users


def tightest_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Offset of the smallest gap between the taken ranges (sorted) that fits, else the end."""
    best, waste, end = -1, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best < 0 or gap < waste):
            best, waste = end, gap
        end = max(end, stop)
    return end if best < 0 else best
