"""The torch renderer against an interpreter that computes one element at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpk_dynamo.ir.expr import (
    Acc,
    Const,
    Load,
    Op,
    Reduce,
    Var,
    acc,
    bounds,
    cast,
    const,
    index,
    load,
    op,
    reduce,
    var,
    where,
)
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.ops.access import flat_range_boxes, loads_over, store_boxes
from mpk_dynamo.ops.evaluate import compile_assignment, compile_exprs, evaluate

F32, I64, BF16 = DType.F32, DType.I64, DType.BF16
I0, I1, R = var("i0", 4), var("i1", 6), var("r0", 5)

ROUND = {
    F32: lambda v: np.float32(v), I64: int, DType.BOOL: bool,
    BF16: lambda v: np.float32(torch.tensor(float(v)).bfloat16().item()),
}
SCALAR = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "max": max, "min": min, "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "abs": abs,
    "lt": lambda a, b: a < b, "eq": lambda a, b: a == b, "ge": lambda a, b: a >= b,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": lambda a: not a,
    "sqrt": lambda a: np.sqrt(a), "relu": lambda a: max(a, np.float32(0)), "floor": np.floor,
}


def interpret(e, values, memory):
    """One element of `e`; only the chosen branch of a `where` is computed."""
    if isinstance(e, Const):
        return ROUND[e.dtype](e.value)
    if isinstance(e, Var):
        return values[e]
    if isinstance(e, Load):
        at = tuple(interpret(i, values, memory) for i in e.index)
        assert all(0 <= a < n for a, n in zip(at, memory[e.buffer].shape))
        return ROUND[e.dtype](memory[e.buffer][at].item())
    if isinstance(e, Reduce):
        parts = [interpret(e.body, {**values, e.var: r}, memory) for r in range(e.var.size)]
        return {"sum": math.fsum if e.dtype is F32 else sum, "max": max, "min": min}[e.name](parts)
    assert isinstance(e, Op)
    if e.name == "where":
        return interpret(e.children[1 if interpret(e.children[0], values, memory) else 2], values, memory)
    args = [interpret(c, values, memory) for c in e.children]
    if e.name == "cast":
        return ROUND[e.dtype](math.trunc(args[0]) if e.dtype is I64 else args[0])
    return ROUND[e.dtype](SCALAR[e.name](*args))


def memory():
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(7, 9, generator=g), "y": torch.randn(9, 7, generator=g).T.bfloat16(),
        "ids": torch.randint(0, 7, (9,), generator=g), "flag": torch.rand(7, generator=g) < 0.5,
    }


def indices(size):
    """Integer expressions that stay in [0, size)."""
    plain = st.sampled_from([I0, I1, R, index(2), op("floordiv", op("add", op("mul", I0, index(6)), I1), index(4))])
    sums = st.builds(lambda a, b: op("add", a, b), plain, plain)
    gathered = st.builds(lambda a: load("ids", (op("mod", a, index(9)),), I64), plain)
    return st.one_of(plain, sums, gathered).map(lambda e: op("mod", e, index(size)))


def floats(depth):
    leaf = st.one_of(
        st.builds(lambda a, b: load("x", (a, b), F32), indices(7), indices(9)),
        st.builds(lambda a, b: cast(load("y", (a, b), BF16), F32), indices(7), indices(9)),
        st.builds(lambda a: cast(a, F32), indices(5)),
        st.floats(-2, 2, width=32).map(lambda v: const(v, F32)),
    )
    if depth == 0:
        return leaf
    inner = floats(depth - 1)
    binary = st.builds(op, st.sampled_from(["add", "sub", "mul", "max", "min"]), inner, inner)
    unary = st.builds(op, st.sampled_from(["neg", "abs", "relu", "floor"]), inner)
    rounded = inner.map(lambda e: cast(cast(e, BF16), F32))
    compare = st.builds(op, st.sampled_from(["lt", "ge"]), inner, inner)
    flags = st.one_of(compare, st.builds(lambda a: load("flag", (a,), DType.BOOL), indices(7)),
                      st.builds(lambda a, b: op("lt", a, b), indices(5), indices(7)))
    chosen = st.builds(where, flags, inner, inner)
    reduced = st.builds(lambda n, e: reduce(n, R, e), st.sampled_from(["max", "min", "sum"]), inner)
    return st.one_of(leaf, binary, unary, rounded, chosen, reduced)


@settings(max_examples=150, deadline=None)
@given(floats(3).map(lambda e: reduce("max", R, e)), st.integers(0, 2), st.integers(0, 3))
def test_random_expressions_match_the_interpreter(e, i0, j0):
    mem = memory()
    ranges = {I0: (i0, 4), I1: (j0, 6)}
    got = evaluate(e, ranges, mem).expand(4 - i0, 6 - j0)
    for i in range(i0, 4):
        for j in range(j0, 6):
            want = interpret(e, {I0: i, I1: j}, mem)
            # sums may round in another order, and then floor or a comparison may jump: those are compared loosely
            exact = "sum" not in repr(e)
            value = got[i - i0, j - j0].item()
            if exact:
                assert value == float(want), (e, i, j)
            elif not {"floor", "lt", "ge"} & set(repr(e).replace("(", " ").split()) and "bf16" not in repr(e):
                assert value == pytest.approx(float(want), rel=1e-4, abs=1e-4), (e, i, j)


def test_a_variable_that_is_free_and_bound_is_shared_only_over_its_whole_range():
    mem = memory()
    k = var("k", 9)
    row = load("x", (I0, k), F32)
    e = op("div", row, reduce("sum", k, row))
    want = mem["x"][:4] / mem["x"][:4].sum(1, keepdim=True)
    torch.testing.assert_close(evaluate(e, {I0: (0, 4), k: (0, 9)}, mem), want)
    torch.testing.assert_close(evaluate(e, {I0: (1, 3), k: (2, 5)}, mem), want[1:3, 2:5])
    bound = {ld: dict(r) for ld, r in loads_over([reduce("sum", k, row)], {I0: (0, 4), k: (2, 5)})}
    assert bound == {row: {I0: (0, 4)}}


def test_nested_reductions_and_constant_bodies():
    mem = memory()
    a, b = var("r1", 7), var("r2", 9)
    total = reduce("sum", a, reduce("max", b, op("mul", load("x", (a, b), F32), cast(I0, F32))))
    want = (mem["x"][None] * torch.arange(4.0)[:, None, None]).amax(2).sum(1)
    torch.testing.assert_close(evaluate(total, {I0: (0, 4)}, mem), want)
    assert evaluate(reduce("sum", R, cast(I0, F32)), {I0: (0, 4)}, mem).tolist() == [0, 5, 10, 15]


def test_affine_loads_are_views_and_size_one_where_nothing_varies():
    mem = memory()
    view = evaluate(load("x", (I0, op("add", I1, index(1))), F32), {I0: (1, 3), I1: (0, 6)}, mem)
    assert view.data_ptr() == mem["x"][1:, 1:].data_ptr() and view.shape == (2, 6)
    flat = op("add", op("mul", I0, index(6)), I1)
    split = load("x", (op("floordiv", flat, index(8)), op("mod", flat, index(8))), F32)
    assert evaluate(split, {I0: (0, 1), I1: (0, 6)}, mem).data_ptr() == mem["x"].data_ptr()
    assert evaluate(const(1.0, F32), {I0: (0, 4), I1: (0, 6)}, mem).shape == (1, 1)
    assert evaluate(load("ids", (I1,), I64), {I0: (0, 4), I1: (0, 6)}, mem).shape == (1, 6)


def test_rounding_is_to_nearest_even():
    mem = {"v": torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])}
    i = var("i0", 3)
    assert evaluate(cast(load("v", (i,), F32), BF16), {i: (0, 3)}, mem).tolist() == [1, 1 + 2**-6, 1 + 2**-7]


def test_index_errors():
    mem = memory()
    outside = load("x", (op("add", I0, index(5)), index(0)), F32)
    with pytest.raises(IndexError, match="leaves dimension of size 7 of x"):
        evaluate(outside, {I0: (0, 4)}, mem)
    guarded = where(op("lt", I0, index(2)), outside, const(-1.0, F32))
    assert evaluate(guarded, {I0: (0, 4)}, mem).tolist() == [*mem["x"][5:, 0].tolist(), -1, -1]
    with pytest.raises(IndexError):
        evaluate(load("x", (load("ids", (I0,), I64), index(0)), F32), {I0: (0, 4)}, {**mem, "ids": torch.full((9,), 7)})
    with pytest.raises(KeyError, match="i1"):
        evaluate(cast(I1, F32), {I0: (0, 4)}, mem)


def test_accumulators_and_assignment_to_scattered_places():
    mem = {**memory(), "out": torch.zeros(7, 9)}
    buffers = {n: buffer(n, F32 if n != "ids" else I64, tuple(mem[n].shape), BufferKind.INPUT) for n in ("out", "ids")}
    body = op("mul", acc(0), acc(1))
    put = compile_assignment(body, "out", (load("ids", (I0,), I64), I1), {I0: (0, 1), I1: (2, 6)}, buffers, 2)
    a, b = torch.randn(1, 4), torch.randn(1, 4)
    put(mem, [a, b])
    want = torch.zeros(7, 9)
    want[mem["ids"][0], 2:6] = (a * b)[0]
    assert torch.equal(mem["out"], want)
    assert isinstance(body.children[0], Acc)


def test_common_sub_expressions_are_computed_once():
    x = op("exp", load("x", (I0, I1), F32))
    buffers = {"x": buffer("x", F32, (7, 9), BufferKind.INPUT)}
    plan = compile_exprs([op("add", x, x), x], {I0: (0, 4), I1: (0, 6)}, buffers)
    assert len(plan.steps) == 3  # load, exp, add


@given(st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple), st.data())
def test_flat_ranges_are_covered_once_by_few_boxes(sizes, data):
    total = math.prod(sizes)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    boxes = flat_range_boxes(sizes, start, stop)
    hit = torch.zeros(sizes, dtype=torch.int32)
    for box in boxes:
        hit[tuple(slice(*r) for r in box)] += 1
    assert hit.reshape(-1).tolist() == [int(start <= i < stop) for i in range(total)]
    assert len(boxes) <= max(1, 2 * len(sizes) - 1)


@given(st.integers(0, 95), st.integers(1, 96), st.sampled_from([3, 8, 32]))
def test_store_boxes_of_a_split_variable_are_exact(start, length, divisor):
    n = var("n", 96)
    stop = min(96, start + length)
    store = (op("floordiv", n, index(divisor)), op("mod", n, index(divisor)))
    hit = torch.zeros(96 // divisor, divisor, dtype=torch.int32)
    for box in store_boxes(store, tuple(hit.shape), {n: (start, stop)}):
        hit[tuple(slice(*r) for r in box)] += 1
    assert hit.reshape(-1).tolist() == [int(start <= i < stop) for i in range(96)]
    assert bounds(store[1]) == (0, divisor - 1)
