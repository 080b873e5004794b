"""Cut every node of a graph into tasks, as its operator says."""

from __future__ import annotations

from collections.abc import Hashable

from ... import ops
from ...ir.graph import Graph
from ...ir.tasks import Task, TaskGraph
from ...ops.spec import Tiling
from ...ops.structure import Structure, structure_of
from .rename_tiling import rename_tiling


def tile(graph: Graph, workers: int) -> TaskGraph:
    """Tasks of all nodes in execution order, numbered from 0, for `workers` equal workers; no events yet.

    `buffers` of the result are the graph's and those the operators add for partial results. Each distinct structure
    is cut once: most nodes of a model are those of its first layer under other names. Raises ValueError when an
    operator adds a buffer under a taken name or declares an access to a buffer that does not exist.
    """
    if workers < 1:
        raise ValueError(f"tile: {workers} workers; at least one is needed")
    buffers = dict(graph.buffers)
    tasks: list[Task] = []
    known: dict[Hashable, tuple[str, Structure, Tiling]] = {}
    for index, node in enumerate(graph.nodes):
        operator = ops.operator_of(node)
        structure = structure_of(node, graph.buffers)
        key = structure.key, operator.context(node, graph, workers)
        if key in known:
            tiling = rename_tiling(*known[key], node, structure)
        else:
            tiling = operator.tile(node, graph, workers)
            known[key] = node.name, structure, tiling
        for extra in tiling.buffers:
            if extra.name in buffers:
                raise ValueError(f"{node.name}: its operator adds buffer {extra.name!r}, a name already taken")
            buffers[extra.name] = extra
        for t in tiling.tasks:
            unknown = [a.buffer for accesses in (t.reads, t.writes) for a in accesses if a.buffer not in buffers]
            if unknown:
                raise ValueError(f"{node.name}: task {t.op}{list(t.tile)} accesses undeclared buffers {unknown}")
            tasks.append(Task(len(tasks), index, t.op, t.tile, t.reads, t.writes, t.bytes, t.flops))
    return TaskGraph(graph, buffers, tuple(tasks))
