"""Node types from outside the package: what registering asks, what each stage makes of them, what the verifier refuses.

The operator is that of examples/add_an_op.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mpk_dynamo.codegen import generate
from mpk_dynamo.errors import Unsupported, VerificationError
from mpk_dynamo.ir.expr import index, op, var
from mpk_dynamo.ir.graph import ExtensionNode, Graph, Linear, Output, RowMap
from mpk_dynamo.ir.printer import print_graph
from mpk_dynamo.ir.region import Access
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.ops import OPERATORS, register
from mpk_dynamo.ops.sampling import Sample, sample_tensors
from mpk_dynamo.ops.spec import DeviceForm, TileSpec, Tiling
from mpk_dynamo.passes.graph import PASSES
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import choose_flagged, derive_events, tile
from mpk_dynamo.passes.tasks.choose_flagged import flaggable
from mpk_dynamo.reference import Executor
from mpk_dynamo.targets import known
from mpk_dynamo.verify import verify_graph, verify_program, verify_schedule, verify_tasks

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")


@pytest.fixture(scope="module")
def example():
    """The example's module. Its operator is registered while the tests of this file run, not for others."""
    sys.path.insert(0, EXAMPLES)
    try:
        from add_an_op import margin

        OPERATORS.setdefault(margin.Margin, margin.MarginOperator())
        yield margin
        del OPERATORS[margin.Margin]
    finally:
        sys.path.remove(EXAMPLES)


def graph_of(example, rows=1, nodes=1, columns=40):
    """x doubled into scratch memory, then the margin of it; `nodes` times."""
    s, made = Sample(), []

    i, j = var("i0", rows), var("i1", columns)
    for n in range(nodes):
        x, out = s.input(f"x{n}", DType.F32, rows, columns), s.output(f"out{n}", DType.F32, rows)
        mid = s.add(BufferKind.SCRATCH, f"mid{n}", DType.F32, rows, columns)
        made.append(RowMap(f"double{n}", (i, j), op("add", s.at(x, i, j), s.at(x, i, j)), mid, (i, j)))
        made.append(example.Margin(f"margin{n}", mid, out, origin="a.place"))
    outputs = tuple(Output(f"out{n}") for n in range(nodes))
    return Graph(tuple(made), s.buffers, outputs, ("test",))


def margin_of(x):
    best, second = x.topk(2).values.unbind(1)
    return best - second


def lower(graph, workers=4):
    verify_graph(graph)
    for graph_pass in PASSES:
        graph = graph_pass(graph)
    verify_graph(graph)
    tasks = derive_events(choose_flagged(tile(graph, workers)))
    verify_tasks(tasks)
    made = schedule(tasks, workers)
    verify_schedule(made)
    return made


def test_registering_takes_new_extension_nodes_only(example):
    operator = example.MarginOperator()
    for node_type in (int, Linear):
        with pytest.raises(TypeError, match="ExtensionNode"):
            register(node_type, operator)
    with pytest.raises(ValueError, match="Margin already has the operator 'margin'"):
        register(example.Margin, operator)


@pytest.mark.parametrize("rows", [1, 5])
def test_runs_behind_other_nodes(example, rows):
    graph = graph_of(example, rows)
    tensors = sample_tensors(graph.nodes[0], graph)
    got = Executor(lower(graph), order="random", poison=True)(tensors)["out0"]
    assert torch.equal(got, margin_of(2 * tensors["x0"]))
    assert "margin0 = margin(mid0) -> out0  # a.place" in print_graph(graph)


def test_graph_passes_fuse_around_an_extension(example):
    """A view before the doubling is folded into it; the doubling, which margin reads, is not."""
    graph = graph_of(example)
    double, margin = graph.nodes
    i, j = double.dims
    s = Sample()
    s.buffers.update(graph.buffers)
    copy = s.add(BufferKind.SCRATCH, "copy", DType.F32, 1, 40)
    view = RowMap("view", (i, j), s.at("x0", i, op("sub", index(39), j)), copy, (i, j))
    double = replace(double, body=op("add", s.at(copy, i, j), s.at(copy, i, j)))
    graph = Graph((view, double, margin), s.buffers, graph.outputs, ("test",))
    made = lower(graph)
    assert [n.name for n in made.tasks.graph.nodes] == ["double0", "margin0"]
    tensors = sample_tensors(view, graph)
    got = Executor(made, poison=True)(tensors)["out0"]
    assert torch.equal(got, margin_of(2 * tensors["x0"]))


def test_nodes_of_one_structure_share_a_body_and_the_source_stands_once(example):
    target = known("sm_90a")
    one, two = (generate(lower(graph_of(example, nodes=n)), target) for n in (1, 2))
    verify_program(two, target)
    assert one.source.count("MPK_DEVICE void margin(") == 1 and one.kinds == two.kinds
    other = generate(lower(graph_of(example, columns=41)), target)
    assert other.source != one.source and other.source.count("MPK_DEVICE void margin(") == 1


def test_what_an_extension_reads_is_not_flagged(example, monkeypatch):
    tasks = tile(graph_of(example), 4)
    assert flaggable(tasks) == frozenset()
    without = replace(tasks, graph=replace(tasks.graph, nodes=(tasks.graph.nodes[0],) * 2))
    assert flaggable(without) == {"mid0"}  # it is the extension that forbids it
    with pytest.raises(VerificationError, match=r"T12: .*margin.* uses flagged mid0; its operator is an extension"):
        verify_tasks(derive_events(replace(tasks, flagged=frozenset({"mid0"}))))


def test_an_operator_without_a_body_runs_on_the_reference_executor_only(example, monkeypatch):
    monkeypatch.delattr(example.MarginOperator, "device_forms")
    with pytest.raises(Unsupported, match="'margin' has no device form at a.place"):
        generate(lower(graph_of(example)), known("sm_90a"))


def test_a_tile_must_fit_a_task(example, monkeypatch):
    cut = example.MarginOperator.tile

    def wide(self, node, graph, workers):
        tiling = cut(self, node, graph, workers)
        return replace(tiling, tasks=tuple(replace(t, tile=(*t.tile, *range(6))) for t in tiling.tasks))

    monkeypatch.setattr(example.MarginOperator, "tile", wide)
    with pytest.raises(Unsupported, match="margin0: a tile of 7 numbers; a task carries 6"):
        generate(lower(graph_of(example)), known("sm_90a"))


def test_a_tiling_that_forgets_an_access_is_found(example, monkeypatch):
    cut = example.MarginOperator.tile
    for field, said in (("reads", r"T10: no task of margin0 reads \['mid0'\]"), ("writes", "T10: .*unwritten")):

        def forgetful(self, node, graph, workers, field=field):
            tiling = cut(self, node, graph, workers)
            return replace(tiling, tasks=tuple(replace(t, **{field: ()}) for t in tiling.tasks))

        with monkeypatch.context() as m, pytest.raises(VerificationError, match=said):
            m.setattr(example.MarginOperator, "tile", forgetful)
            verify_tasks(derive_events(tile(graph_of(example), 4)))


def test_definitions_are_checked(example):
    graph = graph_of(example)
    for nodes, said in (
        (graph.nodes[::-1], "G1: margin0 reads mid0, which no earlier node writes"),
        ((graph.nodes[0], replace(graph.nodes[1], x="nowhere")), "G1: margin0 uses 'nowhere', which is no buffer"),
        ((*graph.nodes, replace(graph.nodes[1], name="again")), "G1: margin0 and again both write out0"),
    ):
        with pytest.raises(VerificationError, match=said):
            verify_graph(replace(graph, nodes=nodes))


@dataclass(frozen=True)
class Update(ExtensionNode):
    name: str
    source: str
    out: str
    origin: str = ""

    def reads(self):
        return (self.source,)

    def writes(self):
        return (self.out,)


def test_memory_that_is_overwritten_is_not_read():
    states = [
        buffer("s", DType.F32, (8,), BufferKind.STATE),
        buffer("s@1", DType.F32, (8,), BufferKind.STATE, storage="s"),
    ]
    given = buffer("x", DType.F32, (8,), BufferKind.INPUT)
    buffers = {b.name: b for b in (*states, given)}
    verify_graph(Graph((Update("u", "x", "s@1"),), buffers, (Output("s@1"),)))
    with pytest.raises(VerificationError, match=r"G2: u: it reads \['s'\] and writes the same memory"):
        verify_graph(Graph((Update("u", "s", "s@1"),), buffers, (Output("s@1"),)))


class Total:
    """out[] = the sum of source, in two steps with a buffer of its own between them."""

    name = "total"

    def tile(self, node, graph, workers):
        (size,) = graph.buffers[node.source].shape
        part, cut = buffer(f"{node.name}.part", DType.F32, (2,), BufferKind.SCRATCH), size // 2
        sums = [
            TileSpec(
                "half", (k, *ends), (Access(node.source, (ends,)),), (Access(part.name, ((k, k + 1),)),), 4 * cut, cut
            )
            for k, ends in enumerate(((0, cut), (cut, size)))
        ]
        join = TileSpec("join", (), (Access(part.name, ((0, 2),)),), (Access(node.out, ()),), 12, 1)
        return Tiling((*sums, join), (part,))

    def context(self, node, graph, workers):
        return None

    def prepare(self, node, buffers, op, tile):
        def half(memory):
            memory[f"{node.name}.part"][tile[0]] = memory[node.source][tile[1] : tile[2]].sum()

        def join(memory):
            memory[node.out].copy_(memory[f"{node.name}.part"].sum())

        return half if op == "half" else join

    def device_forms(self, node, buffers):
        part, source = f"{node.name}.part", "namespace mpk {\n// two bodies\n}\n"
        return {
            "half": DeviceForm("half", source, "", (node.source, part), scratch=512),
            "join": DeviceForm("join", source, "", (part, node.out)),
        }


def test_partial_results_of_an_extension(monkeypatch):
    """Two nodes of one structure: the second is a renamed copy of the first, its partial results too."""
    monkeypatch.setitem(OPERATORS, Update, Total())
    s = Sample()
    nodes = tuple(
        Update(f"total{n}", s.input(f"x{n}", DType.F32, 10), s.output(f"out{n}", DType.F32)) for n in range(2)
    )
    graph = Graph(nodes, s.buffers, (Output("out0"), Output("out1")), ("test",))
    made = lower(graph)
    assert made.tasks.flagged == frozenset() and {"total0.part", "total1.part"} <= made.arena.keys()
    tensors = {name: torch.arange(10.0) * (n + 1) for n, name in enumerate(("x0", "x1"))}
    got = Executor(made, poison=True)(tensors)
    assert (got["out0"].item(), got["out1"].item()) == (45, 90)
    program = generate(made, known("sm_90a"))
    verify_program(program, known("sm_90a"))  # P3: operands are the node's own buffers
    assert [kind.split(":")[0] for kind in program.kinds] == ["half", "join"]
    assert program.source.count("// two bodies") == 1 and "largest(512)" in program.source
