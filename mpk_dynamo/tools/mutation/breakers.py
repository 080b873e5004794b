"""Ways to break a valid TaskGraph or Schedule, one thing at a time.

Each takes a random source and a program, and gives (what was done, broken program), or None where it finds nothing to
break. Changes to regions come twice: with events kept and, in command.py, with events derived anew from the wrong
declaration, as from an operator that forgets what it touches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ...ir.region import Access, Side
from ...ir.schedule import Schedule
from ...ir.tasks import Event, Task, TaskGraph
from ...ir.types import BufferKind

P = TypeVar("P")
Breaker = Callable[[random.Random, P], tuple[str, P] | None]


def _event(r: random.Random, tg: TaskGraph) -> Event | None:
    return r.choice(tg.events) if tg.events else None


def _with_event(tg: TaskGraph, e: Event) -> TaskGraph:
    return replace(tg, events=(*tg.events[: e.id], e, *tg.events[e.id + 1 :]))


def _member(role: str, redirect: bool, twice: bool = False) -> Breaker[TaskGraph]:
    """An event loses a member of one role, has another task in its place, or has it twice."""

    def breaker(r: random.Random, tg: TaskGraph) -> tuple[str, TaskGraph] | None:
        e = _event(r, tg)
        if e is None or not getattr(e, role):
            return None
        members: tuple[int, ...] = getattr(e, role)
        gone = r.choice(members)
        rest = tuple(t for t in members if t != gone)
        if twice:
            return f"event {e.id}: {role} {gone} twice", _with_event(tg, replace(e, **{role: (*members, gone)}))
        if not redirect:
            return f"event {e.id}: {role} without {gone}", _with_event(tg, replace(e, **{role: rest}))
        other = r.choice([t.id for t in tg.tasks if t.id not in members])
        changed = tuple(sorted((*rest, other)))
        return f"event {e.id}: {role} {other} for {gone}", _with_event(tg, replace(e, **{role: changed}))

    return breaker


def drop_event(r: random.Random, tg: TaskGraph) -> tuple[str, TaskGraph] | None:
    e = _event(r, tg)
    if e is None:
        return None
    rest = [x for x in tg.events if x.id != e.id]
    return f"no event {e.id}", replace(tg, events=tuple(replace(x, id=i) for i, x in enumerate(rest)))


def turn_event(r: random.Random, tg: TaskGraph) -> tuple[str, TaskGraph] | None:
    e = _event(r, tg)
    if e is None:
        return None
    return f"event {e.id} turned around", _with_event(tg, replace(e, producers=e.waiters, waiters=e.producers))


def flag(r: random.Random, tg: TaskGraph) -> tuple[str, TaskGraph] | None:
    """A storage becomes flagged, or is no longer, with events as they are."""
    name = r.choice(sorted({b.storage for b in tg.buffers.values()}))
    return f"{name} {'un' if name in tg.flagged else ''}flagged", replace(tg, flagged=tg.flagged ^ {name})


def drop_task(r: random.Random, tg: TaskGraph) -> tuple[str, TaskGraph]:
    """The task is gone everywhere, its signals too."""
    gone = r.randrange(len(tg.tasks))

    def moved(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(t - (t > gone) for t in ids if t != gone)

    events = [replace(e, producers=moved(e.producers), waiters=moved(e.waiters)) for e in tg.events]
    kept = [e for e in events if e.producers]
    tasks = tuple(replace(t, id=i) for i, t in enumerate(t for t in tg.tasks if t.id != gone))
    return f"no t{gone}", replace(tg, tasks=tasks, events=tuple(replace(e, id=i) for i, e in enumerate(kept)))


def exchange_tasks(r: random.Random, tg: TaskGraph) -> tuple[str, TaskGraph]:
    """Two tasks change places: what one did, the other does, and waits as that one did."""
    a, b = r.sample(range(len(tg.tasks)), 2)
    tasks = list(tg.tasks)
    tasks[a], tasks[b] = replace(tg.tasks[b], id=a), replace(tg.tasks[a], id=b)
    return f"t{a} and t{b} exchanged", replace(tg, tasks=tuple(tasks))


def _access(role: str, change: str) -> Breaker[TaskGraph]:
    """One declared access of a task changes."""

    def breaker(r: random.Random, tg: TaskGraph) -> tuple[str, TaskGraph] | None:
        choices = [t for t in tg.tasks if getattr(t, role)]
        t = r.choice(choices)
        accesses: tuple[Access, ...] = getattr(t, role)
        i = r.randrange(len(accesses))
        a = accesses[i]
        # memory that the program writes matters more often than weights, which are most of what is read
        if role == "reads" and tg.buffers[a.buffer].kind is BufferKind.PARAM and r.random() < 0.8:
            return None
        new = _changed(r, tg, t, a, change)
        if new is None or new == (a,):
            return None
        changed = replace(t, **{role: (*accesses[:i], *new, *accesses[i + 1 :])})
        tasks = (*tg.tasks[: t.id], changed, *tg.tasks[t.id + 1 :])
        return f"t{t.id} {role} {a.buffer}{list(a.box)}: {change} {[x.box for x in new]}", replace(tg, tasks=tasks)

    return breaker


def _changed(r: random.Random, tg: TaskGraph, t: Task, a: Access, change: str) -> tuple[Access, ...] | None:
    if change == "dropped":
        return ()
    if change == "also another's":
        same = [x for u in tg.tasks if u.id != t.id for x in u.writes if x.buffer == a.buffer and x.box != a.box]
        return (a, r.choice(same)) if same else None
    if change == "of another buffer":
        names = [b.name for b in tg.buffers.values() if len(b.shape) == len(a.box) and b.name != a.buffer]
        return (replace(a, buffer=r.choice(names)),) if names else None
    if change == "of another version":
        storage = tg.buffers[a.buffer].storage
        names = [b.name for b in tg.buffers.values() if b.storage == storage and b.name != a.buffer]
        return (replace(a, buffer=r.choice(names)),) if names else None
    if change == "on another side":
        if a.side is None:
            return (replace(a, partition="position", side=r.choice(list(Side))),)
        other = Side.OFF if a.side is Side.AT else Side.AT
        return (r.choice([replace(a, side=other), replace(a, partition="", side=None)]),)
    wide = [d for d, (start, stop) in enumerate(a.box) if stop - start >= 1]
    if not wide:
        return None
    d = r.choice(wide)
    start, stop = a.box[d]
    by = r.choice([1, max(1, (stop - start) // 2), stop - start])
    span = {
        "shrunk": r.choice([(start + by, stop), (start, stop - by)]),
        "grown": r.choice([(start - by, stop), (start, stop + by)]),
        "shifted": r.choice([(start + by, stop + by), (start - by, stop - by)]),
    }[change]
    if span[0] > span[1]:
        return None
    return (replace(a, box=(*a.box[:d], span, *a.box[d + 1 :])),)


EVENTS: dict[str, Breaker[TaskGraph]] = {
    "drop a wait": _member("waiters", redirect=False),
    "redirect a wait": _member("waiters", redirect=True),
    "wait twice": _member("waiters", redirect=False, twice=True),
    "drop a signal": _member("producers", redirect=False),
    "redirect a signal": _member("producers", redirect=True),
    "signal twice": _member("producers", redirect=False, twice=True),
    "drop an event": drop_event,
    "turn an event around": turn_event,
    "flag or unflag a buffer": flag,
}

TASKS: dict[str, Breaker[TaskGraph]] = {"drop a task": drop_task, "exchange tasks": exchange_tasks}

REGIONS: dict[str, Breaker[TaskGraph]] = {
    **{f"read {c}": _access("reads", c) for c in (
        "shrunk", "grown", "shifted", "dropped", "of another buffer", "of another version", "on another side")},
    **{f"write {c}": _access("writes", c) for c in (
        "shrunk", "grown", "shifted", "dropped", "of another buffer", "of another version", "on another side",
        "also another's")},
}  # fmt: skip


def _queues(s: Schedule, queues: list[list[int]]) -> Schedule:
    return replace(s, queues=tuple(map(tuple, queues)))


def swap_queue_order(r: random.Random, s: Schedule) -> tuple[str, Schedule] | None:
    queues = [list(q) for q in s.queues]
    w = r.randrange(len(queues))
    if len(queues[w]) < 2:
        return None
    a, b = sorted(r.sample(range(len(queues[w])), 2))
    queues[w][a], queues[w][b] = queues[w][b], queues[w][a]
    return f"queue {w}: places {a} and {b} exchanged", _queues(s, queues)


def move_task(r: random.Random, s: Schedule) -> tuple[str, Schedule]:
    queues = [list(q) for q in s.queues]
    w, v = r.sample(range(len(queues)), 2)
    if not queues[w]:
        w, v = v, w
    k = r.randrange(len(queues[w]))
    at = r.randint(0, len(queues[v]))
    queues[v].insert(at, queues[w].pop(k))
    return f"place {k} of queue {w} moved to place {at} of queue {v}", _queues(s, queues)


def lose_task(r: random.Random, s: Schedule) -> tuple[str, Schedule]:
    queues = [list(q) for q in s.queues]
    w = r.choice([w for w, q in enumerate(queues) if q])
    gone = queues[w].pop(r.randrange(len(queues[w])))
    return f"no queue has t{gone}", _queues(s, queues)


def repeat_task(r: random.Random, s: Schedule) -> tuple[str, Schedule]:
    queues = [list(q) for q in s.queues]
    t = r.choice([t for q in queues for t in q])
    v = r.randrange(len(queues))
    at = r.randint(0, len(queues[v]))
    queues[v].insert(at, t)
    return f"t{t} also at place {at} of queue {v}", _queues(s, queues)


def overlap_buffers(r: random.Random, s: Schedule) -> tuple[str, Schedule] | None:
    if len(s.arena) < 2:
        return None
    name, other = r.sample(sorted(s.arena), 2)
    at = s.arena[other] + r.choice([0, 0, 128, 256, -256])
    if at == s.arena[name]:
        return None
    return f"{name} at {at}, on {other}", replace(s, arena={**s.arena, name: at})


def shift_buffer(r: random.Random, s: Schedule) -> tuple[str, Schedule] | None:
    if not s.arena:
        return None
    name = r.choice(sorted(s.arena))
    by = r.choice([2, 8, 64, -64, 128, -128, 256, -256, s.arena_bytes, s.flagged_bytes or 16])
    return f"{name} moved by {by}", replace(s, arena={**s.arena, name: s.arena[name] + by})


def shift_flagged(r: random.Random, s: Schedule) -> tuple[str, Schedule] | None:
    if not s.flagged_bytes:
        return None
    field = r.choice(["flagged_start", "flagged_bytes", "arena_bytes"])
    by = r.choice([8, -8, 128, -128, 256, -256, 4096, -4096])
    return f"{field} {by:+}", replace(s, **{field: getattr(s, field) + by})


def share_slot(r: random.Random, s: Schedule) -> tuple[str, Schedule] | None:
    if not s.slots:
        return None
    e = r.randrange(len(s.slots))
    slot = r.choice([x for x in (*s.slots, -1) if x != s.slots[e]])
    return f"event {e} in slot {slot}", replace(s, slots=(*s.slots[:e], slot, *s.slots[e + 1 :]))


SCHEDULE: dict[str, Breaker[Schedule]] = {
    "swap queue order": swap_queue_order,
    "move a task": move_task,
    "lose a task": lose_task,
    "run a task twice": repeat_task,
    "overlap buffers": overlap_buffers,
    "shift a buffer": shift_buffer,
    "shift flagged memory": shift_flagged,
    "share a counter": share_slot,
}
