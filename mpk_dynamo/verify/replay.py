"""Run queues and events without doing any work, to see that they come to an end."""

from __future__ import annotations

from ..errors import VerificationError
from ..ir.schedule import Schedule
from ..ir.tasks import task_name


def replay(s: Schedule) -> list[int]:
    """Task ids in the order of one complete execution; every other execution completes too, because a finished
    event never becomes unfinished. Raises S2 when the queues and events block each other."""
    waits, signals = s.tasks.waits(), s.tasks.signals()
    missing = [len(e.producers) for e in s.tasks.events]
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
        raise VerificationError("S2", _deadlock(s, heads, missing, waits))
    return sequence


def _deadlock(s: Schedule, heads: list[int], missing: list[int], waits: list[list[int]]) -> str:
    """The cycle of workers that wait for each other, in words."""
    tasks = s.tasks.tasks
    where = {t: (w, k) for w, q in enumerate(s.queues) for k, t in enumerate(q)}
    w = next(w for w, q in enumerate(s.queues) if heads[w] < len(q))
    lines, seen = [], set()
    while w not in seen:
        seen.add(w)
        t = s.queues[w][heads[w]]
        e = next(e for e in waits[t] if missing[e])
        p = next(p for p in s.tasks.events[e].producers if where[p][1] >= heads[where[p][0]])
        w2, k2 = where[p]
        lines.append(
            f"worker {w} at {task_name(s.tasks, tasks[t])} waits for event {e}, which lacks "
            f"{task_name(s.tasks, tasks[p])} at place {k2} of worker {w2}, itself stopped at place {heads[w2]}"
        )
        w = w2
    return "deadlock: " + "; ".join(lines)
