"""Where each flagged storage lies."""

from __future__ import annotations

from ...ir.tasks import TaskGraph

ALIGNMENT = 128
"""Bytes: a cache line. Pollers of one buffer must not disturb the writers of another."""

SET_ALIGNMENT = 256
"""Bytes. Of the region and of its size, so that both sets start where plain storages may."""


def plan_flagged(tg: TaskGraph, start: int) -> tuple[dict[str, int], int, int]:
    """(byte offset of each flagged storage in the first set, start of the first set, bytes of one set).

    `start`: end of the plain storages. One storage after the other, in order of first use by a task, none reused:
    memory that was written holds no sentinel any more, and nothing orders who could put it back.
    """
    sizes = {b.storage: b.nbytes for b in tg.buffers.values() if b.storage in tg.flagged}
    used = (tg.buffers[a.buffer].storage for t in tg.tasks for a in (*t.writes, *t.reads))
    first = offset = _round_up(start, SET_ALIGNMENT)
    places: dict[str, int] = {}
    for name in dict.fromkeys((*used, *sorted(sizes))):
        if name in sizes:
            places[name] = offset
            offset = _round_up(offset + sizes[name], ALIGNMENT)
    return places, first, _round_up(offset, SET_ALIGNMENT) - first


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
