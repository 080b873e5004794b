"""G1 to G3: one accepted and several refused graphs each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpk_dynamo.errors import VerificationError
from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import Append, Attention, Graph, Linear, LinearPart, Output, RowMap
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.verify import verify_graph

F32, BF16, I64, BOOL = DType.F32, DType.BF16, DType.I64, DType.BOOL
PARAM, INPUT, STATE, SCRATCH, OUTPUT = (BufferKind(k) for k in ("param", "input", "state", "scratch", "output"))
ZERO = ex.index(0)


def graph(nodes, buffers, outputs=()):
    return Graph(tuple(nodes), {b.name: b for b in buffers}, tuple(Output(o) for o in outputs))


def refuses(rule: str, text: str, g: Graph) -> None:
    with pytest.raises(VerificationError, match=text) as error:
        verify_graph(g)
    assert error.value.rule == rule


def copy(source: str, out: str, size: int, name: str = "n", dtype: DType = F32) -> RowMap:
    i = ex.var("i0", size)
    return RowMap(name, (i,), ex.load(source, (i,), dtype), out, (i,), "model.copy")


X, H, Y = buffer("x", F32, (4,), INPUT), buffer("h", F32, (4,), SCRATCH), buffer("y", F32, (4,), OUTPUT)
S0, S1, S2 = (buffer(n, F32, (4,), STATE, storage="s") for n in ("s", "s@1", "s@2"))
CHAIN = [copy("x", "h", 4, "a"), copy("h", "y", 4, "b")]


def test_g1_accepts_definitions_before_uses():
    report = verify_graph(graph(CHAIN, [X, H, Y], ["y"]))
    assert report.counts["nodes"] == 2 and set(report.rules) == {"G1", "G2", "G3"}


@pytest.mark.parametrize(
    "nodes, buffers, outputs, text",
    [
        (CHAIN[::-1], [X, H, Y], ["y"], "b reads h, which no earlier node writes"),
        (CHAIN[:1], [X, H, Y], [], "no node writes output y"),
        ([*CHAIN, copy("x", "y", 4, "c")], [X, H, Y], ["y"], "b and c both write y"),
        ([CHAIN[0], copy("h", "y", 4, "a")], [X, H, Y], ["y"], "two nodes are called a"),
        (CHAIN, [X, Y], ["y"], "'h', which is no buffer"),
        ([copy("h", "x", 4)], [X, H], [], "h, which no earlier"),
        ([copy("x", "s", 4)], [X, S0], [], "a state as the caller passed it"),
        ([copy("s", "x", 4)], [X, S0], [], "writes x, a input"),
        (CHAIN, [X, H, Y], ["h"], "returns 'h'"),
        ([copy("s@1", "y", 4)], [S0, S1, Y], ["y"], "reads s@1, which no earlier"),
        (CHAIN, [X, H, Y, S0, S1], ["s@1"], "returns s@1, which no node writes"),
    ],
)
def test_g1_refuses(nodes, buffers, outputs, text):
    refuses("G1", text, graph(nodes, buffers, outputs))


def test_g3_accepts_reads_before_the_overwrite_and_of_the_new_version():
    nodes = [copy("s", "h", 4, "a"), copy("x", "s@1", 4, "b"), copy("s@1", "y", 4, "c")]
    verify_graph(graph(nodes, [X, H, Y, S0, S1], ["y", "s@1"]))


@pytest.mark.parametrize(
    "nodes, outputs, text",
    [
        ([copy("x", "s@1", 4, "a"), copy("s", "y", 4, "b")], ["y"], "b reads s after s@1 has overwritten it"),
        (
            [copy("x", "s@1", 4, "a"), copy("x", "s@2", 4, "b"), copy("s@1", "y", 4, "c")],
            ["y"],
            "c reads s@1 after s@2",
        ),
        ([copy("x", "s@1", 4, "a"), copy("x", "y", 4, "b")], ["y", "s"], "returns s, but its memory holds s@1"),
    ],
)
def test_g3_refuses(nodes, outputs, text):
    refuses("G3", text, graph(nodes, [X, Y, S0, S1, S2], outputs))


def linear(x=None, epilogue=None, **part) -> Graph:
    t, k, n = ex.var("t", 2), ex.var("k", 8), ex.var("n", 6)
    x = ex.load("a", (t, k), BF16) if x is None else x
    epilogue = ex.cast(ex.op("mul", ex.acc(0), ex.acc(1)), BF16) if epilogue is None else epilogue
    made = LinearPart(**{"weights": ("w", "v"), "rows": 6, "epilogue": epilogue, "out": "o", "store": (t, n), **part})
    buffers = [buffer("a", BF16, (2, 8), INPUT), buffer("o", BF16, (2, 6), OUTPUT), buffer("f", F32, (6, 8), PARAM)]
    buffers += [buffer("w", BF16, (6, 8), PARAM), buffer("v", BF16, (6, 8), PARAM), buffer("u", BF16, (5, 8), PARAM)]
    buffers.append(buffer("m", BF16, (6, 8), PARAM, strides=(1, 6)))
    buffers.append(buffer("st", F32, (2, 8), STATE))
    return graph([Linear("l", t, k, x, (made,), "model.up")], buffers, ["o"])


POS = ex.load("pos", (), I64)
T, K, N = ex.var("t", 2), ex.var("k", 8), ex.var("n", 6)


def test_g2_accepts_a_linear():
    verify_graph(linear())


@pytest.mark.parametrize(
    "change, text",
    [
        ({"weights": ("w",)}, "accumulator 1 of 1"),
        ({"weights": ("w", "u")}, r"weight u of shape \[5, 8\] is not \[6, 8\]"),
        ({"weights": ("w", "f")}, "weight f is f32, its input bf16"),
        ({"weights": ("w", "m")}, "weight m has strides"),
        ({"epilogue": ex.acc(0)}, "acc0 is f32, not bf16"),
        ({"epilogue": ex.load("a", (T, K), BF16)}, "depends on k<8"),
        ({"epilogue": ex.cast(ex.load("a", (T, N), F32), BF16)}, "a is bf16, not f32"),
        ({"epilogue": ex.load("a", (T,), BF16)}, "1 indices for shape"),
        ({"epilogue": ex.load("a", (T, ex.op("add", N, ex.index(3))), BF16)}, "index 1 of 0:8, .*: is 8 at"),
        ({"epilogue": ex.cast(ex.reduce("sum", ex.var("r", 2), ex.acc(0)), BF16)}, "inside a reduction"),
        ({"store": (N, T)}, "store to o: index 0 of 0:2"),
        ({"store": (T,)}, "has 1 indices"),
        ({"store": (T, ZERO)}, "give the same element"),
        ({"store": (T, ex.op("mod", N, ex.index(3)))}, "give the same element"),
        ({"rows": 5}, "is not"),
        ({"x": ex.cast(ex.load("a", (T, K), BF16), F32)}, "weight w is bf16, its input f32"),
        ({"x": ex.load("a", (N, K), BF16)}, "depends on n<6"),
    ],
)
def test_g2_refuses_a_linear(change, text):
    refuses("G2", text, linear(**change))


def test_g2_knows_how_transposed_weights_lie():
    made = linear()
    turned = replace(made.nodes[0], transposed=True)
    refuses("G2", r"weight w of shape \[6, 8\] is not \[8, 6\]", replace(made, nodes=(turned,)))
    weights = {name: buffer(name, BF16, (8, 6), PARAM) for name in ("w", "v")}
    verify_graph(replace(made, nodes=(turned,), buffers={**made.buffers, **weights}))


def test_g3_refuses_a_linear_that_overwrites_its_own_input():
    t, k, n = ex.var("t", 2), ex.var("k", 8), ex.var("n", 8)
    buffers = [buffer("w", F32, (8, 8), PARAM), *(buffer(s, F32, (2, 8), STATE, storage="st") for s in ("st", "st@1"))]
    part = LinearPart(("w",), 8, ex.op("add", ex.acc(0), ex.load("st", (t, n), F32)), "st@1", (t, n))
    given = buffer("a", F32, (2, 8), INPUT)
    verify_graph(graph([Linear("l", t, k, ex.load("a", (t, k), F32), (part,))], [*buffers, given]))
    refuses("G3", "another index", graph([Linear("l", t, k, ex.load("st", (t, k), F32), (part,))], buffers))


def attention(**change) -> Graph:
    b, h, g, s, d = (ex.var(n, size) for n, size in (("b", 2), ("h", 4), ("g", 2), ("s", 8), ("d", 3)))
    position = ex.load("pos", (), I64)
    row = ex.load("new", (b, g, d), BF16)
    fields = {
        "name": "att", "b": b, "h": h, "g": g, "s": s, "d": d, "q": ex.load("q", (b, h, d), BF16), "keys": "keys",
        "key_index": (b, g, s, d), "values": "values", "value_index": (b, g, s, d), "scale": 0.5, "out": "o",
        "store": (b, ex.op("add", ex.op("mul", h, ex.index(3)), d)), "mask": ex.load("mask", (b, s), BOOL),
        "append": Append(position, row, row, "keys@1", "values@1"), "origin": "model.attn",
    }  # fmt: skip
    fields |= change
    buffers = [
        buffer("q", BF16, (2, 4, 3), INPUT),
        buffer("new", BF16, (2, 2, 3), INPUT),
        buffer("pos", I64, (), INPUT),
    ]
    buffers += [buffer("mask", BOOL, (2, 8), INPUT), buffer("o", BF16, (2, 12), OUTPUT)]
    for cache in ("keys", "values"):
        buffers += [buffer(n, BF16, (2, 2, 8, 3), STATE, storage=cache) for n in (cache, f"{cache}@1")]
    return graph([Attention(**fields)], buffers, ["o"])


def test_g2_accepts_an_attention_that_names_its_cache_before_or_after_the_append():
    verify_graph(attention())
    verify_graph(attention(keys="keys@1", values="values@1"))


@pytest.mark.parametrize(
    "rule, change, text",
    [
        ("G2", {"g": ex.var("g", 3)}, "4 query heads are no multiple of 3"),
        ("G2", {"scale": float("nan")}, "scale"),
        ("G2", {"mask": ex.load("pos", (), I64)}, "is i64, not bool or"),
        ("G2", {"last": ex.load("mask", (ex.var("b", 2), ZERO), BOOL)}, "is bool, not i64 or i32"),
        ("G2", {"mask": ex.load("mask", (ex.var("b", 2), ex.var("d", 3)), BOOL)}, "depends on d<3"),
        ("G2", {"key_index": (ZERO, ZERO, ZERO)}, "has 3 indices"),
        ("G2", {"s": ex.var("s", 9), "key_index": (ZERO, ZERO, ex.var("s", 9), ZERO)}, "index 2 of 0:8"),
        ("G2", {"append": Append(POS, ex.const(0.0, F32), ex.const(0.0, F32), "keys@1", "values@1")},
         "is f32, not bf16"),
        ("G2", {"append": Append(POS, ex.const(0.0, BF16), ex.const(0.0, BF16), "values@1", "keys@1")},
         "values@1, which is no version of keys"),
        ("G3", {"q": ex.load("keys", (ex.var("b", 2), ZERO, ex.var("h", 4), ex.var("d", 3)), BF16)}, "another index"),
    ],
)  # fmt: skip
def test_refuses_an_attention(rule, change, text):
    refuses(rule, text, attention(**change))


@pytest.mark.parametrize(
    "bad, text",
    [
        (replace(H, strides=(2,)), "has strides"),
        (replace(H, storage="x"), "lies in the storage of x"),
        (replace(S1, shape=(5,)), "differs from s"),
        (replace(S1, storage="gone"), "which is no state"),
        (replace(H, strides=()), "shape"),
    ],
)
def test_g2_refuses_a_buffer(bad, text):
    refuses("G2", text, graph(CHAIN, [b for b in (X, Y, H, S0) if b.name != bad.name] + [bad], ["y"]))


def test_g2_refuses_a_written_state_that_overlaps_itself():
    wide = [replace(buffer(n, F32, (4, 4), STATE, storage="s"), strides=(0, 1)) for n in ("s", "s@1")]
    refuses("G2", "overlaps itself", graph(CHAIN, [X, H, Y, *wide], ["y"]))


def test_g2_scatter_into_scratch_may_leave_elements_unset():
    i = ex.var("i0", 4)
    scatter = RowMap("n", (i,), ex.load("x", (i,), F32), "h", (ex.load("ids", (i,), I64),))
    refuses("G2", "may stay unset", graph([scatter], [X, H, buffer("ids", I64, (4,), INPUT)]))


def test_g2_partial_store_to_scratch():
    i = ex.var("i0", 3)
    refuses(
        "G2",
        "3 elements are stored to h, which has 4",
        graph([RowMap("n", (i,), ex.load("x", (i,), F32), "h", (i,))], [X, H]),
    )


def test_g2_ill_typed_expressions():
    i, j = ex.var("i0", 8), ex.var("i1", 4)
    narrow = ex._make(ex.Op, BF16, (ex.load("b", (i,), BF16),) * 2, name="add")
    mixed = ex._make(ex.Op, F32, (ex.load("b", (i,), BF16), j), name="add")
    buffers = [buffer("b", BF16, (8,), INPUT), buffer("z", F32, (32,), OUTPUT)]
    store = (ex.op("add", ex.op("mul", i, ex.index(4)), j),)
    for body, text in (
        (ex.cast(narrow, F32), "arithmetic on bf16"),
        (mixed, "operands"),
        (ex._make(ex.Op, F32, (j,), name="cosh"), "unknown operator"),
        (ex._make(ex.Op, F32, (j, j), name="add"), "result f32, not i64"),
        (ex.cast(ex._make(ex.Op, I64, (j,), name="sqrt"), F32), "sqrt of i64"),
        (ex.cast(ex._make(ex.Op, I64, (j, j, j), name="where"), F32), "where of"),
        (ex.cast(ex._make(ex.Reduce, I64, (j,), name="median", var=ex.var("r", 2)), F32), "ill-typed reduction"),
    ):
        refuses("G2", text, graph([RowMap("n", (i, j), body, "z", store)], buffers, ["z"]))
