"""Cut every node of a graph into tasks, as its operator says."""

from __future__ import annotations

from ... import ops
from ...ir.graph import Graph
from ...ir.tasks import Task, TaskGraph


def tile(graph: Graph, workers: int) -> TaskGraph:
    """Tasks of all nodes in execution order, numbered from 0, for `workers` equal workers; no events yet.

    `buffers` of the result are the graph's and those the operators add for partial results. Raises ValueError
    when an operator adds a buffer under a taken name or declares an access to a buffer that does not exist.
    """
    if workers < 1:
        raise ValueError(f"tile: {workers} workers; at least one is needed")
    buffers = dict(graph.buffers)
    tasks: list[Task] = []
    for index, node in enumerate(graph.nodes):
        tiling = ops.operator_of(node).tile(node, graph, workers)
        for extra in tiling.buffers:
            if extra.name in buffers:
                raise ValueError(f"{node.name}: its operator adds buffer {extra.name!r}, a name already taken")
            buffers[extra.name] = extra
        for t in tiling.tasks:
            unknown = [a.buffer for a in (*t.reads, *t.writes) if a.buffer not in buffers]
            if unknown:
                raise ValueError(f"{node.name}: task {t.op}{list(t.tile)} accesses undeclared buffers {unknown}")
            tasks.append(Task(len(tasks), index, t.op, t.tile, t.reads, t.writes, t.bytes, t.flops))
    return TaskGraph(graph, buffers, tuple(tasks))
