"""Predict when each task of a schedule goes through its phases, without a device."""

from __future__ import annotations

from math import prod

import numpy as np

from ...ir.expr import reductions
from ...ir.graph import Attention, Linear
from ...ir.schedule import Schedule
from ...ir.tasks import Task, TaskGraph
from ...ops.attention import MIN_KEYS
from ...targets.machine import Machine
from .timeline import COMPUTED, INPUTS, READY, SIGNALLED, STREAMED, WAITS, Timeline, edges_of


def simulate(schedule: Schedule, machine: Machine, live: int | None = None) -> Timeline:
    """Run the queues on a model of the kernel. live: keys that attentions find; as many as fit when None.

    A task is ready when its worker is free and its events have come; it has its inputs when the flagged data is there.
    Meanwhile the worker's loader runs ahead until its ring is full. A linear then takes its weights as fast as its body
    can, or as they arrive at the worker's share of the bandwidth: an equal one, but not quite even from task to task,
    and the slowest of many is who is waited for (a fixed sequence of random numbers, so results repeat). Every other
    task takes a time of its kind, an attention as well the time of its keys and values.

    Not in the model: workers lend each other no bandwidth; polls and keys do not slow the stream.
    """
    tg, edges = schedule.tasks, edges_of(schedule)
    into: list[list[int]] = [[] for _ in tg.tasks]
    out: list[list[int]] = [[] for _ in tg.tasks]
    for i, edge in enumerate(edges):
        for t in edge.producers:
            out[t].append(i)
        for t in edge.waiters:
            into[t].append(i)
    signals = {t for event in tg.events for t in event.producers}
    came: list[dict[int, float]] = [{} for _ in edges]  # worker -> when its producers of the edge were last done
    workers = schedule.workers
    rate = machine.bandwidth / max(workers, 1)
    luck = np.random.default_rng(0).standard_normal(len(tg.tasks)).clip(-3.0, 3.0)
    free, ahead, since = [0.0] * workers, [0.0] * workers, [0.0] * workers  # ahead: bytes in the ring at `since`
    worker_of = {task: worker for worker, queue in enumerate(schedule.queues) for task in queue}
    clock = np.zeros((len(tg.tasks), SIGNALLED + 1))
    for task in tg.tasks:
        worker = worker_of[task.id]
        ready = free[worker] + machine.task
        polled = 0.0
        for i in into[task.id]:
            event = edges[i].mark == READY
            delay = machine.event if event else machine.poll
            for other, when in came[i].items():
                if other != worker:
                    when += delay
                if event:
                    ready = max(ready, when)
                else:
                    polled = max(polled, when)
        kind = _kind(tg, task)
        inputs = max(ready, polled)
        if kind == "linear":
            inputs += machine.prologue + _input_time(tg, task, machine)
        if kind in ("attention", "attention_combine"):
            inputs += machine.query
        streamed = inputs
        if kind == "linear":
            size = _weight_bytes(tg, task)
            held = min(ahead[worker] + min(rate, machine.waiting) * (inputs - since[worker]), machine.ring)
            tokens = tg.graph.nodes[task.node].t.size  # type: ignore[union-attr]
            body = size / (machine.fma if tokens == 1 else machine.mma)
            arrive = max(size - held, 0.0) / rate
            streamed = inputs + max(body, arrive + luck[task.id] * (machine.spread * arrive) ** 0.5)
            ahead[worker] = min(max(held + rate * (streamed - inputs) - size, 0.0), machine.ring)
            since[worker] = streamed
            computed = streamed + machine.finish
        elif kind == "attention":
            streamed = inputs
            size = task.bytes * _live_share(tg, task, live)
            early = min(size, machine.fetched)  # keys and values that come while the query is awaited
            keys = max(inputs, ready + early / machine.gather) + (size - early) / machine.gather
            computed = keys + machine.attend
        else:
            computed = inputs + machine.small
        done = computed + (machine.signal if task.id in signals else 0.0)
        clock[task.id, [WAITS, READY, INPUTS, STREAMED, COMPUTED, SIGNALLED]] = (
            free[worker], ready, inputs, streamed, computed, done,
        )  # fmt: skip
        free[worker] = done
        for i in out[task.id]:
            came[i][worker] = max(came[i].get(worker, 0.0), computed)
    return Timeline(schedule, clock, np.zeros(workers), predicted=True)


def _kind(tg: TaskGraph, task: Task) -> str:
    return "linear" if isinstance(tg.graph.nodes[task.node], Linear) else task.op


def _input_time(tg: TaskGraph, task: Task, machine: Machine) -> float:
    """Until a worker has x of several tokens: it fetches, and perhaps norms, all of it."""
    node = tg.graph.nodes[task.node]
    assert isinstance(node, Linear)
    if node.t.size == 1:
        return 0.0
    size = node.t.size * node.k.size * node.x.dtype.itemsize
    return size / (machine.normed if reductions(node.x) else machine.plain)


def _live_share(tg: TaskGraph, task: Task, live: int | None) -> float:
    """Of the keys that an attention task may have to read, those that are there when `live` are."""
    node = tg.graph.nodes[task.node]
    if live is None or not isinstance(node, Attention):
        return 1.0
    splits = task.tile[3]
    return min(1.0, max(live / splits, MIN_KEYS) * splits / node.s.size)


def _weight_bytes(tg: TaskGraph, task: Task) -> int:
    """What the loader brings for a task of a Linear."""
    node = tg.graph.nodes[task.node]
    assert isinstance(node, Linear)
    weights = {name for part in node.parts for name in part.weights}
    parts = [a for a in task.reads if a.buffer in weights]
    return sum(tg.buffers[a.buffer].dtype.itemsize * prod(stop - start for start, stop in a.box) for a in parts)
