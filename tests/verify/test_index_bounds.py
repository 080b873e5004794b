"""Index bounds: intervals, guards, and every value tried where these are too coarse."""

from __future__ import annotations

import pytest

from mpk_dynamo.errors import VerificationError
from mpk_dynamo.ir import expr as ex
from mpk_dynamo.ir.graph import Graph, Output, RowMap
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.verify import verify_graph
from mpk_dynamo.verify.index_bounds import injective, interval, outside

F32 = DType.F32
ROW, COL = ex.var("i0", 8), ex.var("i1", 4)


LOW = ex.op("lt", ROW, ex.index(4))
DATA = ex.op("gt", ex.load("x", (ex.index(0),), F32), ex.const(0, F32))


def half(offset_then: int, offset_else: int, condition: ex.Expr) -> ex.Expr:
    def at(offset: int) -> ex.Expr:
        return ex.load("x", (ex.op("add", ROW, ex.index(offset)),), F32)

    return ex.where(condition, at(offset_then), at(offset_else))


@pytest.mark.parametrize(
    "body, fine",
    [
        (half(0, -4, LOW), True),
        (half(-4, 0, ex.op("not", LOW)), True),
        (half(0, -4, ex.op("lt", ROW, ex.index(5))), False),
        (half(0, -3, LOW), False),
        (half(0, -4, ex.op("and", LOW, DATA)), False),
        (half(0, 0, ex.op("and", LOW, DATA)), False),
        (ex.load("x", (ex.op("mod", ROW, ex.index(4)),), F32), True),
        (ex.load("x", (ex.op("floordiv", ROW, ex.index(2)),), F32), True),
        (ex.load("x", (ex.op("sub", ex.index(7), ROW),), F32), False),
        (ex.load("x", (ex.op("sub", ex.op("mod", ROW, ex.index(4)), ex.op("mod", ROW, ex.index(2))),), F32), True),
    ],
)  # fmt: skip
def test_g2_index_bounds_under_guards(body, fine):
    buffers = (buffer("x", F32, (4,), BufferKind.INPUT), buffer("z", F32, (8,), BufferKind.OUTPUT))
    g = Graph((RowMap("n", (ROW,), body, "z", (ROW,)),), {b.name: b for b in buffers}, (Output("z"),))
    if fine:
        verify_graph(g)
    else:
        with pytest.raises(VerificationError, match="load of x: index 0 of 0:4") as error:
            verify_graph(g)
        assert error.value.rule == "G2"


def index(e: ex.Expr) -> str:
    return ex.render(e)


@pytest.mark.parametrize(
    "e, value",
    [
        (ex.op("sub", ex.op("mul", ROW, ex.index(3)), COL), lambda i, j: 3 * i - j),
        (ex.op("mod", ex.op("add", ex.op("mul", ROW, ex.index(5)), COL), ex.index(6)), lambda i, j: (5 * i + j) % 6),
        (ex.op("floordiv", ex.op("sub", ROW, ex.index(5)), ex.index(3)), lambda i, j: (i - 5) // 3),
        (ex.op("max", ex.op("neg", ROW), ex.op("sub", COL, ex.index(2))), lambda i, j: max(-i, j - 2)),
        (ex.op("min", ROW, ex.op("mul", COL, COL)), lambda i, j: min(i, j * j)),
        (ex.op("abs", ex.op("sub", ROW, ex.index(3))), lambda i, j: abs(i - 3)),
        (ex.where(ex.op("lt", ROW, COL), ROW, ex.op("neg", COL)), lambda i, j: i if i < j else -j),
        (ex.cast(ex.op("lt", ROW, COL), DType.I64), lambda i, j: int(i < j)),
    ],
    ids=lambda x: index(x) if isinstance(x, ex.Expr) else "",
)
def test_bounds_agree_with_every_value(e, value):
    values = [value(i, j) for i in range(8) for j in range(4)]
    low, high = interval(e)
    assert low <= min(values) and max(values) <= high
    # the exact search finds a violation exactly where there is one
    moved = ex.op("sub", e, ex.index(min(values)))
    span = max(values) - min(values)
    assert outside(moved, span + 1, frozenset()) is None
    assert outside(moved, span, frozenset())[1] == span


def test_a_data_dependent_index_is_left_to_the_device():
    e = ex.op("add", ex.load("ids", (ROW,), DType.I64), ex.index(100))
    assert interval(e) is None and outside(e, 4, frozenset()) is None


@pytest.mark.parametrize(
    "store, expected",
    [
        ((ROW, COL), True),
        ((ex.op("add", ex.op("mul", ROW, ex.index(4)), COL),), True),
        ((ex.op("add", ex.op("mul", ROW, ex.index(3)), COL),), False),
        ((ex.op("floordiv", ROW, ex.index(2)), COL, ex.op("mod", ROW, ex.index(2))), True),
        ((ex.op("floordiv", ROW, ex.index(2)), COL), False),
        ((ROW,), False),
        ((ROW, ex.load("ids", (COL,), DType.I64)), None),
    ],
)
def test_injective(store, expected):
    assert injective(store, (ROW, COL)) is expected
