"""The verifier: proves a stage right by numbered rules, or raises VerificationError with what is wrong.

It shares no code with the passes it checks, and skips nothing because a program is large. Each entry point returns
a Report of what was proven.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Graph
from ..ir.program import Program
from ..ir.schedule import Schedule
from ..ir.tasks import TaskGraph
from .accesses import AccessIndex, Storage
from .flagged_rules import Poll, check_flagged, check_polls, check_sets, polls
from .graph_rules import check_buffers, check_definitions, check_versions
from .graph_rules import check_nodes as check_graph_nodes
from .loader_rules import check_loader
from .needed_rules import check_needed
from .order import EventOrder, Order, QueueOrder
from .order_rules import check_storages, check_unwritten
from .program_rules import check_arguments, check_limits, check_opcodes, check_operands, check_waits
from .program_rules import check_queues as check_queue_tables
from .replay import replay
from .report import Report, without_collector
from .schedule_rules import check_lifetimes, check_offsets, check_queues, check_slots, check_workers
from .state_rules import check_states
from .tables import decode
from .task_rules import check_accesses, check_events, check_nodes, check_ready, check_tasks

__all__ = ["Report", "verify_graph", "verify_program", "verify_schedule", "verify_tasks"]


@dataclass(frozen=True)
class _Tasks:
    """A TaskGraph of which every T rule holds with tasks ordered by events alone, and what that took to know."""

    tg: TaskGraph
    index: AccessIndex
    polled: list[Poll]
    report: Report


_proven: list[_Tasks] = []
"""The last one, until a schedule of it is verified: the very same object need not be proven twice."""


@without_collector
def verify_graph(graph: Graph) -> Report:
    """Rules G1 to G3."""
    report = Report("graph")
    check_buffers(graph)
    check_definitions(graph)
    expressions = check_graph_nodes(graph)
    check_versions(graph)
    report.count(nodes=len(graph.nodes), buffers=len(graph.buffers), expressions=expressions)
    report.proved(
        G1="values are defined once, before use",
        G2="shapes, types and indices agree",
        G3="states are read before they are overwritten, and returned as they end",
    )
    return report.done()


@without_collector
def verify_tasks(tg: TaskGraph) -> Report:
    """Rules T1 to T6 and T9 to T12, with tasks ordered by events alone."""
    report = Report("tasks")
    index, storages, polled = _check_declared(tg, report)
    check_ready(tg)
    check_polls(tg, polled)
    _check_order(tg, index, storages, EventOrder(tg), report)
    report.proved(T3="waits and polls are for earlier tasks")
    _proven[:] = [_Tasks(tg, index, polled, report)]
    return report.done()


@without_collector
def verify_schedule(s: Schedule, target: object | None = None) -> Report:
    """Rules S1 to S3, S5, S6 and S8, and the T rules with tasks ordered by events and queues. When `verify_tasks` has
    just proven these for the same object, they hold: queues that keep S1 and S2 order more tasks, never fewer.

    `target` is a targets.Target; without one S6 is only that there is a worker."""
    report = Report("schedule")
    known = next((p for p in _proven if p.tg is s.tasks), None)
    _proven.clear()
    if known:
        index, storages, polled = known.index, None, known.polled
        report.include(known.report)
    else:
        index, storages, polled = _check_declared(s.tasks, report)
    check_workers(s, target)
    check_queues(s)
    check_slots(s)
    order = QueueOrder(s, replay(s, polled))
    if storages is not None:
        _check_order(s.tasks, index, storages, order, report)
    check_offsets(s, index)
    check_sets(s)
    report.count(shared_arena_pairs=check_lifetimes(s, index, order), workers=s.workers)
    report.proved(
        S1="each task is in one queue",
        S2="queues, events and polls do not block each other",
        S3="arena memory is reused between ordered lifetimes only",
        S5="event slots are unique",
        S6="workers fit the target" if target is not None else "there are workers; no target given",
        S8="flagged memory is apart, in two sets",
    )
    return report.done()


def _check_declared(tg: TaskGraph, report: Report) -> tuple[AccessIndex, list[Storage], list[Poll]]:
    check_tasks(tg)
    index = AccessIndex(tg)
    check_accesses(tg, index)
    check_events(tg)
    check_nodes(tg, index)
    storages = index.storages()
    check_flagged(tg, storages)
    polled = polls(tg, storages)
    report.count(tasks=len(tg.tasks), events=len(tg.events), accesses=index.accesses, needed_boxes=check_needed(tg))
    report.count(flagged=len(tg.flagged), polled_boxes=len(polled))
    report.proved(
        T1="accesses are inside their buffers",
        T2="event counts are their numbers of producers",
        T10="tasks touch what their nodes touch",
        T11="tasks read what the elements they write are made of",
        T12="flagged storages are scratch memory, each element of which is written once",
    )
    return index, storages, polled


def _check_order(tg: TaskGraph, index: AccessIndex, storages: list[Storage], order: Order, report: Report) -> None:
    check_storages(tg, storages, order, report)
    check_unwritten(tg, index.reads, storages)
    check_states(tg, storages)
    report.proved(
        T4="conflicting accesses are ordered, or are polls",
        T5="no read of unwritten memory",
        T6="outputs and scratch are written once, states where the graph says",
        T9="each access sees the version of a state that the graph says",
    )


@without_collector
def verify_program(p: Program, target: object | None = None) -> Report:
    """Rules P1 to P3, T7 and S4. The Schedule inside is taken as verified (verify_schedule)."""
    report = Report("program")
    check_limits(p, target)
    tables = decode(p)
    place = check_queue_tables(p.schedule, tables)
    check_opcodes(p, tables, place)
    check_arguments(p, tables, place)
    check_waits(p, tables, place)
    check_operands(p, tables, place)
    check_loader(p, tables, place)
    report.count(**{name: len(table) for name, table in tables.items()}, bindings=len(p.bindings))
    report.proved(
        P1="tables decode back to the schedule",
        P2="opcodes select the bodies made for their nodes",
        P3="references are those the bodies expect, inside arena and bindings",
        T7="waits demand the full count",
        S4="threads and shared memory fit the target" if target is not None else "threads are sane; no target given",
    )
    return report.done()
