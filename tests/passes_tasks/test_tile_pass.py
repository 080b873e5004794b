"""tile: asks operators, numbers tasks, collects buffers."""

from __future__ import annotations

import pytest

from mpk_dynamo import ops
from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import Graph, RowMap
from mpk_dynamo.ir.region import Access
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


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        tile(GRAPH, 0)
