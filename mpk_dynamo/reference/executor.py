"""Runs task programs on torch tensors: a TaskGraph in any order its events and flagged buffers allow, a Schedule
worker by worker."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import VerificationError
from ..ir.schedule import Schedule
from ..ir.tasks import Task, TaskGraph, task_name
from ..ir.types import BufferKind
from ..ops import operator_of
from ..ops.spec import Memory
from ..passes.tasks import flagged_edges
from .memory import bind_callers, fresh_outputs, scratch_in_arena

Pick = Callable[[Sequence[int]], int]
"""Position of the task or worker to go next, among those that may (ascending)."""

PICKS = ("program", "reversed", "random")


class Progress:
    """Which events have fired, and which polls of flagged memory would succeed.

    A flagged box is as an event of the tasks that write it. The device starts a task whose polls do not succeed yet
    and lets it wait inside, holding its worker: to the order of finished tasks that is the same.
    """

    def __init__(self, tg: TaskGraph) -> None:
        self.tg = tg
        polls = flagged_edges(tg)
        self.events = [(e.producers, e.waiters) for e in tg.events] + polls
        self.waits, self.signals = tg.waits(), tg.signals()
        for e, (writers, readers) in enumerate(polls, len(tg.events)):
            for task in writers:
                self.signals[task].append(e)
            for task in readers:
                self.waits[task].append(e)
        self.missing = [len(producers) for producers, _ in self.events]
        self.blockers = [sum(self.missing[e] > 0 for e in waits) for waits in self.waits]
        self.done: list[int] = []

    def ready(self, task: int) -> bool:
        return not self.blockers[task]

    def finish(self, task: int) -> list[int]:
        """Signal; returns the tasks this made ready."""
        self.done.append(task)
        freed = []
        for e in self.signals[task]:
            self.missing[e] -= 1
            if self.missing[e] == 0:
                for waiter in self.events[e][1]:
                    self.blockers[waiter] -= 1
                    if not self.blockers[waiter]:
                        freed.append(waiter)
        return freed

    def explain(self, task: int) -> str:
        """Why a task cannot run, in the words of the model."""
        done = set(self.done)
        missing = list(dict.fromkeys(p for e in self.waits[task] for p in self.events[e][0] if p not in done))
        names = ", ".join(task_name(self.tg, self.tg.tasks[p]) for p in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return f"{task_name(self.tg, self.tg.tasks[task])} (t{task}) waits for {names}{more}"


def _picker(order: str, seed: int) -> Pick:
    if order == "program":
        return lambda ready: 0
    if order == "reversed":
        return lambda ready: len(ready) - 1
    if order == "random":
        rng = random.Random(seed)
        return lambda ready: rng.randrange(len(ready))
    raise ValueError(f"unknown order {order!r}, expected one of {', '.join(PICKS)}")


def task_order(tg: TaskGraph, order: str = "program", seed: int = 0) -> list[int]:
    """An order of all tasks that events and flagged buffers allow: "program" prefers low ids, "reversed" high ones,
    "random" any.

    Raises VerificationError (T3) when some tasks never become ready.
    """
    progress, pick = Progress(tg), _picker(order, seed)
    ready = [t.id for t in tg.tasks if progress.ready(t.id)]
    while ready:
        freed = progress.finish(ready.pop(pick(ready)))
        if freed:
            ready = sorted(ready + freed)
    if len(progress.done) != len(tg.tasks):
        stuck = sorted(set(range(len(tg.tasks))) - set(progress.done))
        raise VerificationError("T3", f"{len(stuck)} tasks never become ready; {progress.explain(stuck[0])}")
    return progress.done


def run_tasks(
    tg: TaskGraph,
    memory: Memory,
    order: str = "program",
    seed: int = 0,
    run: Callable[[Task, Memory], None] | None = None,
) -> list[int]:
    """Run every task once on `memory` (see `allocate`), in an order as `task_order` gives; returns that order.

    `run` replaces the execution of a task, e.g. by `guard.checked(tg)`. Raises VerificationError (T3) on deadlock.
    """
    sequence = task_order(tg, order, seed)
    for i in sequence:
        task = tg.tasks[i]
        if run is not None:
            run(task, memory)
        else:
            node = tg.graph.nodes[task.node]
            operator_of(node).run(node, tg.buffers, task.op, task.tile, memory)
    return sequence


def interleave(schedule: Schedule, order: str = "round_robin", seed: int = 0) -> list[int]:
    """A possible order of tasks when workers run their queues: the head of a queue waits until its events fired and
    the flagged data it reads is there.

    "round_robin": workers take turns, one task each. "program": the first worker that can goes as far as it can;
    "reversed": the last one; "random": any; "starved": one worker, `seed` modulo their number, goes only when nobody
    else can. Raises VerificationError (S2) when all workers wait.
    """
    tg, progress = schedule.tasks, Progress(schedule.tasks)
    heads = [0] * schedule.workers
    hungry = seed % schedule.workers if order == "starved" and schedule.workers else None
    pick = None if order == "round_robin" else _picker("program" if order == "starved" else order, seed)
    left = sum(len(q) for q in schedule.queues)

    def can_go(worker: int) -> bool:
        queue = schedule.queues[worker]
        return heads[worker] < len(queue) and progress.ready(queue[heads[worker]])

    def step(worker: int) -> None:
        progress.finish(schedule.queues[worker][heads[worker]])
        heads[worker] += 1

    while len(progress.done) < left:
        before = len(progress.done)
        if pick is None:
            for worker in range(schedule.workers):
                if can_go(worker):
                    step(worker)
        else:
            able = [w for w in range(schedule.workers) if can_go(w)]
            able = [w for w in able if w != hungry] or able
            if able:
                step(able[pick(able)])
        if len(progress.done) == before:
            waiting = [(w, q[h]) for w, (q, h) in enumerate(zip(schedule.queues, heads, strict=True)) if h < len(q)]
            worker, task = waiting[0]
            origin = tg.graph.nodes[tg.tasks[task].node].origin
            message = f"deadlock: {len(waiting)} workers wait; worker {worker}: {progress.explain(task)}"
            raise VerificationError("S2", message, origin=origin)
    return progress.done


class Executor:
    """Runs a Schedule on torch tensors (CPU or any device), with the real arena offsets and queue order.

    `order` as in `interleave`; "random" draws another interleaving on each call. `poison` fills the arena and the
    outputs with NaN bytes before each call; flagged memory is filled in any case, as on the device. Raises
    VerificationError (S2) at once if the workers would deadlock. Not thread-safe: calls share the arena. Holds on to
    the parameters of the last call.
    """

    def __init__(self, schedule: Schedule, *, order: str = "round_robin", seed: int = 0, poison: bool = False) -> None:
        self.schedule, self.order, self.seed, self.poison = schedule, order, seed, poison
        tg = schedule.tasks
        self._buffers = tg.buffers
        self._params = {n: b for n, b in tg.buffers.items() if b.kind is BufferKind.PARAM}
        self._rest = {n: b for n, b in tg.buffers.items() if b.kind in (BufferKind.INPUT, BufferKind.STATE)}
        self._outputs = {n: b for n, b in tg.buffers.items() if b.kind is BufferKind.OUTPUT}
        self._sequence = interleave(schedule, order, seed)
        self._bodies: list[Callable[[Memory], None] | None] = [None] * len(tg.tasks)
        self._arena: torch.Tensor | None = None
        self._scratch: dict[str, torch.Tensor] = {}
        self._bound: dict[str, torch.Tensor] = {}

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one step. `tensors`: the caller's tensor of each PARAM, INPUT and STATE storage; STATE is updated in
        place. Returns a fresh tensor per OUTPUT storage. Raises MpkError for a missing or differently laid out
        tensor."""
        memory = self.memory(tensors)
        if self.order == "random":
            self.seed += 1
            self._sequence = interleave(self.schedule, self.order, self.seed)
        with torch.no_grad():
            for i in self._sequence:
                (self._bodies[i] or self._prepare(i))(memory)
        return {b.storage: memory[name] for name, b in self._outputs.items()}

    def memory(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensor of each buffer for one call."""
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        if self._arena is None or self._arena.device != device:
            self._arena = torch.zeros(max(self.schedule.arena_bytes, 1), dtype=torch.uint8, device=device)
            self._scratch = scratch_in_arena(self._buffers, self._arena, self.schedule.arena)
        if self.poison:
            self._arena.fill_(0xFF)  # NaN in every floating type
        elif self.schedule.flagged_bytes:
            start = self.schedule.flagged_start  # calls do not overlap: one of the two sets is enough here
            self._arena[start : start + self.schedule.flagged_bytes].fill_(0xFF)
        # a parameter that was bound as it is stays right even when its data is replaced
        stale = {n: b for n, b in self._params.items() if self._bound.get(n, self) is not tensors.get(b.storage)}
        self._bound.update(bind_callers(stale, tensors))
        outputs = fresh_outputs(self._outputs, device, self.poison)
        return {**self._bound, **self._scratch, **bind_callers(self._rest, tensors), **outputs}

    def _prepare(self, task_id: int) -> Callable[[Memory], None]:
        tg = self.schedule.tasks
        task = tg.tasks[task_id]
        node = tg.graph.nodes[task.node]
        body = operator_of(node).prepare(node, tg.buffers, task.op, task.tile)
        self._bodies[task_id] = body
        return body
