"""tile: asks operators, numbers tasks, collects buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from renaming import renamed
from scale import Sizes, qwen3_8b_like

from mpk_dynamo import ops
from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import Graph, RowMap
from mpk_dynamo.ir.region import Access, Side
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.ops.spec import TileSpec, Tiling
from mpk_dynamo.passes.tasks import tile

NODES = tuple(RowMap(f"map{i}", (), ex.const(0, DType.F32), f"b{i}", ()) for i in range(2))
GRAPH = Graph(NODES, {f"b{i}": buffer(f"b{i}", DType.F32, (8,), BufferKind.SCRATCH) for i in range(2)}, ())


class Halves:
    """Fake operator: one task per worker, each writing its share of a partial result."""

    def __init__(self, extra: str = "", touches: str = "") -> None:
        self.extra, self.touches = extra, touches

    def tile(self, node, graph, workers):
        extra = buffer(self.extra or f"{node.name}.partial", DType.F32, (workers,), BufferKind.SCRATCH)
        tasks = [
            TileSpec("half", (i,), (), (Access(self.touches or extra.name, ((i, i + 1),)),), 10 + i, 20 + i)
            for i in range(workers)
        ]
        return Tiling(tuple(tasks), (extra,))

    def context(self, node, graph, workers):
        return None


def test_tasks_are_numbered_in_order_of_nodes(monkeypatch):
    monkeypatch.setattr(ops, "operator_of", lambda node: Halves())
    tg = tile(GRAPH, 3)
    assert [(t.id, t.node, t.op, t.tile, t.bytes, t.flops) for t in tg.tasks] == [
        (i, i // 3, "half", (i % 3,), 10 + i % 3, 20 + i % 3) for i in range(6)
    ]
    assert tg.tasks[4].writes == (Access("map1.partial", ((1, 2),)),)
    assert list(tg.buffers) == ["b0", "b1", "map0.partial", "map1.partial"]
    assert list(GRAPH.buffers) == ["b0", "b1"]
    assert tg.graph is GRAPH and tg.events == ()


@pytest.mark.parametrize(
    "operator, says", [(Halves(extra="b1"), "already taken"), (Halves(touches="nowhere"), "undeclared buffers")]
)
def test_an_operator_that_breaks_the_contract_is_named(monkeypatch, operator, says):
    monkeypatch.setattr(ops, "operator_of", lambda node: operator)
    with pytest.raises(ValueError, match=f"map0.*{says}"):
        tile(GRAPH, 2)


@pytest.mark.parametrize("workers", [3, 8, 132])
def test_a_renamed_tiling_is_what_the_operator_says(workers):
    """Against one call of the operator per node, for a whole small decoder of three layers and for samples."""
    small = Sizes(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ff=96, vocab=200, capacity=96, splits=2)
    graphs = [_twice(*sample) for o in ops.OPERATORS.values() for sample in o.samples()]
    graphs.append(qwen3_8b_like(small, workers=1).graph)
    for graph in graphs:
        expected, held = [], dict(graph.buffers)
        for i, node in enumerate(graph.nodes):
            tiling = ops.operator_of(node).tile(node, graph, workers)
            held |= {b.name: b for b in tiling.buffers}
            expected += [(i, t.op, t.tile, t.reads, t.writes, t.bytes, t.flops) for t in tiling.tasks]
        tg = tile(graph, workers)
        assert [(t.node, t.op, t.tile, t.reads, t.writes, t.bytes, t.flops) for t in tg.tasks] == expected
        assert tg.buffers == held and list(tg.buffers) == list(held)


def _twice(node, graph):
    """A graph of a node and of the same node with other names, which only `tile` is to look at."""
    names = {name: f"again.{name}" for name in graph.buffers}
    others = {
        names[b.name]: replace(b, name=names[b.name], storage=names[b.storage]) for b in graph.buffers.values()
    }
    again = replace(renamed(node, names), name="again", origin="again")
    return Graph((node, again), graph.buffers | others, ())


class Misnamed(Halves):
    def tile(self, node, graph, workers):
        tiling = super().tile(node, graph, workers)
        return replace(tiling, tasks=tuple(
            replace(t, reads=(Access(node.out, ((0, 1),), "position of nothing", Side.OFF),)) for t in tiling.tasks
        ))


@pytest.mark.parametrize(
    "operator, says", [(Halves(extra="free"), "not named map0"), (Misnamed(), "position of nothing")]
)
def test_names_that_cannot_be_carried_over_are_refused(monkeypatch, operator, says):
    monkeypatch.setattr(ops, "operator_of", lambda node: operator)
    with pytest.raises(ValueError, match=says):
        tile(GRAPH, 2)


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        tile(GRAPH, 0)
