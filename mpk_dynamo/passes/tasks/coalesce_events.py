"""Fewer counters and signals, at the price of some waits for more than is needed.

Exact events (order_conflicts) cost one wait per task, but a producer signals once for each distinct set of consumers'
needs it is in. A signal is a device-wide atomic at the end of a task, on the critical path of whatever it precedes.
Two changes pay:

1. A cheap task that nothing waits for (a length counter after the last reader of its old value) needs no counter of
   its own: it waits for an event that implies its own and is there anyway. This saves one signal of each producer
   and delays only work that nobody needs in this step. Tasks that move much memory keep their own event: starting
   them late would leave bandwidth unused.
2. Where the tasks of one node signal more than `max_signals` events for one consuming node, neighbouring events are
   merged into one that waits for the union, doubling the group until the limit holds. In the end this is the plain
   barrier between two operators.

An event may only gain producers that come before all its waiters in the task list. So every edge still goes from a
smaller task id to a larger one, queues are in order of id, and no deadlock can arise.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from ...ir.tasks import Event, TaskGraph
from .predecessors import closures

CHEAP_BYTES = 64 * 1024
"""Memory traffic below which a task may start late: about 2 us of one worker's share of the bandwidth."""

_Pair = tuple[tuple[int, ...], tuple[int, ...]]  # producers, waiters


def coalesce_events(tg: TaskGraph, max_signals: int = 4) -> TaskGraph:
    """The same tasks and at least the same order, with fewer events. `max_signals`: of a task to one other node."""
    if max_signals < 1:
        raise ValueError(f"coalesce_events: max_signals is {max_signals}; a producer needs at least one signal")
    pairs = _merge_fan_out(tg, _share_with_leaves(tg), max_signals)
    pairs.sort(key=lambda pair: pair[1])
    return replace(tg, events=tuple(Event(i, *pair) for i, pair in enumerate(pairs)))


def _share_with_leaves(tg: TaskGraph) -> list[_Pair]:
    signalling = set(chain.from_iterable(e.producers for e in tg.events))

    def is_leaf(task: int) -> bool:
        return task not in signalling and tg.tasks[task].bytes <= CHEAP_BYTES

    leaves = [e for e in tg.events if len(e.producers) > 1 and all(map(is_leaf, e.waiters))]
    if not leaves:
        return [(e.producers, e.waiters) for e in tg.events]
    closed = closures(tg)
    waiters = {e.id: e.waiters for e in tg.events}
    by_completion = sorted(tg.events, key=lambda e: (e.producers[-1], e.id))
    for leaf in leaves:
        needed = sum(1 << p for p in leaf.producers)
        for other in by_completion:
            if other.producers[-1] >= waiters[leaf.id][0]:
                break
            if other is not leaf and other.id in waiters and closed[other.id] & needed == needed:
                waiters[other.id] = tuple(sorted((*waiters[other.id], *waiters.pop(leaf.id))))
                break
    return [(tg.events[e].producers, tasks) for e, tasks in waiters.items()]


def _merge_fan_out(tg: TaskGraph, pairs: list[_Pair], max_signals: int) -> list[_Pair]:
    groups: dict[tuple[frozenset[int], int], list[_Pair]] = {}
    for producers, waiters in pairs:
        key = frozenset(tg.tasks[p].node for p in producers), tg.tasks[waiters[0]].node
        groups.setdefault(key, []).append((producers, waiters))
    out: list[_Pair] = []
    for group in groups.values():
        group.sort()
        size = 1
        merged = group
        while size < len(group) and _most_signals(merged) > max_signals:
            size *= 2
            merged = [pair for i in range(0, len(group), size) for pair in _union(group[i : i + size])]
        out += merged
    return out


def _most_signals(pairs: list[_Pair]) -> int:
    counts: dict[int, int] = {}
    for producers, _ in pairs:
        for p in producers:
            counts[p] = counts.get(p, 0) + 1
    return max(counts.values())


def _union(pairs: list[_Pair]) -> list[_Pair]:
    producers = tuple(sorted(set(chain.from_iterable(p for p, _ in pairs))))
    waiters = tuple(sorted(chain.from_iterable(w for _, w in pairs)))
    return [(producers, waiters)] if producers[-1] < waiters[0] else pairs
