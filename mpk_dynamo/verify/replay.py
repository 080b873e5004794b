"""Run queues, events and polls without doing any work, to see that they come to an end."""

from __future__ import annotations

from ..errors import VerificationError
from ..ir.schedule import Schedule
from ..ir.tasks import task_name
from .flagged_rules import Poll

_Wait = tuple[object, tuple[int, ...]]
"""What is waited for (its text names it), and the tasks that must be done."""


def replay(s: Schedule, polled: list[Poll]) -> list[int]:
    """Task ids in the order of one complete execution; every other execution completes too, because a finished
    event never becomes unfinished, nor a published element a sentinel. Raises S2 when queues, events and polls block
    each other.

    A task that polls holds its worker, as one that waits for an event does; that the device lets it begin before all
    is there only makes it finish earlier."""
    waits, signals = s.tasks.waits(), s.tasks.signals()
    needs: list[_Wait] = [(f"event {e.id}", e.producers) for e in s.tasks.events]
    for p in polled:
        for t in p.writers:
            signals[t].append(len(needs))
        for t in p.readers:
            waits[t].append(len(needs))
        needs.append((p.read, p.writers))
    missing = [len(producers) for _, producers in needs]
    asleep: dict[int, list[int]] = {}
    heads = [0] * s.workers
    sequence: list[int] = []
    runnable = list(range(s.workers))
    while runnable:
        w = runnable.pop()
        queue = s.queues[w]
        while heads[w] < len(queue):
            t = queue[heads[w]]
            blocking = next((e for e in waits[t] if missing[e]), None)
            if blocking is not None:
                asleep.setdefault(blocking, []).append(w)
                break
            heads[w] += 1
            sequence.append(t)
            for e in signals[t]:
                missing[e] -= 1
                if not missing[e]:
                    runnable += asleep.pop(e, ())
    if len(sequence) < len(s.tasks.tasks):
        raise VerificationError("S2", _deadlock(s, heads, missing, waits, needs))
    return sequence


def _deadlock(s: Schedule, heads: list[int], missing: list[int], waits: list[list[int]], needs: list[_Wait]) -> str:
    """The cycle of workers that wait for each other, in words."""
    tasks = s.tasks.tasks
    where = {t: (w, k) for w, q in enumerate(s.queues) for k, t in enumerate(q)}
    w = next(w for w, q in enumerate(s.queues) if heads[w] < len(q))
    lines, seen = [], set()
    while w not in seen:
        seen.add(w)
        t = s.queues[w][heads[w]]
        e = next(e for e in waits[t] if missing[e])
        p = next(p for p in needs[e][1] if where[p][1] >= heads[where[p][0]])
        w2, k2 = where[p]
        lines.append(
            f"worker {w} at {task_name(s.tasks, tasks[t])} waits for {needs[e][0]}, which lacks "
            f"{task_name(s.tasks, tasks[p])} at place {k2} of worker {w2}, itself stopped at place {heads[w2]}"
        )
        w = w2
    return "deadlock: " + "; ".join(lines)
