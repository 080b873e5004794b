"""TaskGraph: nodes cut into tasks, with derived events."""

from __future__ import annotations

from dataclasses import dataclass, field

from .graph import Graph
from .region import Access
from .types import Buffer


@dataclass(frozen=True)
class Task:
    """One tile of a node, run by one worker.

    op: the operator's task kind: "row_map", "linear", "attention", "attention_combine".
    tile: integers whose meaning the operator defines (ops/<op>.py).
    reads, writes: everything the task may touch, except that operators may leave out reads of PARAM buffers'
    padding; accesses to PARAM buffers are declared like any other.
    bytes: device-memory bytes it must move; flops: multiply-adds count as two.
    """

    id: int
    node: int
    op: str
    tile: tuple[int, ...]
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Event:
    """A counter. Each producer adds one when it is done; a waiter starts when all producers have."""

    id: int
    producers: tuple[int, ...]
    waiters: tuple[int, ...]


@dataclass(frozen=True)
class TaskGraph:
    """tasks[i].id == i, in an order in which running them one by one is right. `buffers` holds the graph's and
    those that tiling added (partial results).

    flagged: SCRATCH storages whose elements are their own flags. Before a launch each element holds the sentinel
    (all bits one, a NaN no writer produces); a reader polls what it reads until no sentinel is left. So a read of
    flagged memory needs no event, orders nothing else, and the memory is never reused within a launch."""

    graph: Graph
    buffers: dict[str, Buffer]
    tasks: tuple[Task, ...]
    events: tuple[Event, ...] = field(default=())
    flagged: frozenset[str] = frozenset()

    def waits(self) -> list[list[int]]:
        """Event ids each task waits for."""
        out: list[list[int]] = [[] for _ in self.tasks]
        for event in self.events:
            for task in event.waiters:
                out[task].append(event.id)
        return out

    def signals(self) -> list[list[int]]:
        """Event ids each task adds one to."""
        out: list[list[int]] = [[] for _ in self.tasks]
        for event in self.events:
            for task in event.producers:
                out[task].append(event.id)
        return out


def task_name(graph: TaskGraph, task: Task) -> str:
    """The task in the words of the model, e.g. `model.layers.3.mlp.down_proj#linear12[2]`."""
    node = graph.graph.nodes[task.node]
    first = next(t.id for t in graph.tasks if t.node == task.node) if task.id else 0
    return f"{node.origin or node.name}#{node.name}[{task.id - first}]"
