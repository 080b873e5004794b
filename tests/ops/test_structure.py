"""Equal structures: equal up to names, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from renaming import renamed

from mpk_dynamo.ir.expr import cast, const, index, load, op, reduce, substitute, var
from mpk_dynamo.ir.graph import Linear, RowMap
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.ops import OPERATORS
from mpk_dynamo.ops.structure import structure_of

F32 = DType.F32
ROW, J, R = var("i0", 4), var("i1", 8), var("r0", 8)
SAMPLES = [
    pytest.param(node, graph, id=f"{o.name}-{n}")
    for o in OPERATORS.values()
    for n, (node, graph) in enumerate(o.samples())
]


@pytest.mark.parametrize("node, graph", SAMPLES)
def test_a_node_with_other_names_has_the_same_structure(node, graph):
    names = {name: f"other.{name}" for name in graph.buffers}
    storages = {b.storage: f"memory.{b.storage}" for b in graph.buffers.values()}
    buffers = {
        names[b.name]: replace(b, name=names[b.name], storage=storages[b.storage], origin="there")
        for b in graph.buffers.values()
    }
    other = replace(renamed(node, names), name="other", origin="there")
    one, two = structure_of(node, graph.buffers), structure_of(other, buffers)
    assert one.key == two.key and hash(one.key) == hash(two.key)
    assert tuple(names[name] for name in one.buffers) == two.buffers
    assert tuple(renamed(e, names) for e in one.exprs) == two.exprs


def test_samples_of_all_operators_differ():
    keys = [structure_of(node, graph.buffers).key for o in OPERATORS.values() for node, graph in o.samples()]
    assert len(set(keys)) == len(keys)


def scaled(a="x", b="w", out="y", factor=2.0):
    x, w = load(a, (ROW, J), F32), load(b, (ROW, J), F32)
    return RowMap("n", (ROW, J), op("mul", op("add", x, w), const(factor, F32)), out, (ROW, J))


def buffers(**changes):
    found = {n: buffer(n, F32, (4, 8), BufferKind.SCRATCH) for n in "xwyz"}
    return found | {n: replace(found[n], **c) for n, c in changes.items()}


BASE = structure_of(scaled(), buffers()).key


@pytest.mark.parametrize(
    "node, held",
    [
        (scaled(factor=3.0), buffers()),
        (scaled(factor=-2.0), buffers()),
        (scaled(b="x"), buffers()),  # one buffer twice
        (scaled(out="x"), buffers()),  # in place
        (replace(scaled(), store=(op("sub", index(3), ROW), J)), buffers()),
        (replace(scaled(), dims=(J, ROW)), buffers()),
        (scaled(), buffers(x={"strides": (1, 4)})),
        (scaled(), buffers(x={"kind": BufferKind.PARAM})),
        (scaled(), buffers(y={"dtype": DType.F64})),
        (scaled(), buffers(w={"shape": (9, 8)})),
        (scaled(), buffers(y={"storage": "x"})),  # two names for one memory
    ],
)
def test_what_is_not_a_name_makes_a_difference(node, held):
    assert structure_of(node, held).key != BASE


def test_negative_zero_and_the_variable_of_a_reduction_make_a_difference():
    def key(body):
        held = {n: buffer(n, F32, (4,), BufferKind.SCRATCH) for n in "xy"}
        return structure_of(RowMap("n", (ROW,), body, "y", (ROW,)), held).key

    x = load("x", (ROW,), F32)
    assert key(op("add", x, const(0.0, F32))) != key(op("add", x, const(-0.0, F32)))
    inner = load("x", (op("mod", R, index(4)),), F32)
    other = substitute(inner, {R: var("r1", 8)})
    assert key(reduce("sum", R, inner)) != key(reduce("sum", var("r1", 8), other))
    assert key(cast(cast(x, DType.BF16), F32)) != key(cast(cast(x, DType.F16), F32))


def test_parts_of_a_linear_are_told_apart():
    node, graph = next(
        (n, g) for n, g in OPERATORS[Linear].samples() if isinstance(n, Linear) and len(n.parts) > 1
    )
    other = replace(node, parts=node.parts[::-1])
    assert structure_of(other, graph.buffers).key != structure_of(node, graph.buffers).key


def test_a_value_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="holds a list"):
        structure_of(replace(scaled(), dims=[ROW, J]), buffers())
