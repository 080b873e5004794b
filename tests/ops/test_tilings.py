"""What the tilings promise beyond the conformance test: balance, granularity, exact reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpk_dynamo.ir.expr import acc, cast, index, load, op, reduce, var, where
from mpk_dynamo.ir.graph import Graph, Linear, LinearPart, RowMap
from mpk_dynamo.ir.region import Access
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.ops import OPERATORS, operator_of
from mpk_dynamo.ops.access import StoreSweep, Sweep, arithmetic, read_accesses, write_accesses
from mpk_dynamo.ops.attention import MIN_KEYS, key_range, split_count, used_splits
from mpk_dynamo.ops.linear import cut_rows, phase_of, segments
from mpk_dynamo.ops.row_map import row_dims

F32 = DType.F32


def part(rows: int, joint: int = 1) -> LinearPart:
    return LinearPart(tuple(f"w{i}" for i in range(joint)), rows, acc(0), "out", ())


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=3), st.sampled_from([1, 8]),
    st.integers(1, 40), st.integers(0, 40), st.integers(1, 2),
)
def test_rows_are_cut_evenly_in_order_and_completely(rows, granularity, workers, phase, joint):
    parts = tuple(part(r, joint) for r in rows)
    tasks = cut_rows(parts, workers, granularity, phase)
    every = [(p, r) for task in tasks for p, row, n in task for r in range(row, row + n)]
    assert every == [(p, r) for p, n in enumerate(rows) for r in range(n)]
    blocks = [sum(-(-n // granularity) for _, _, n in task) for task in tasks]
    assert len(tasks) == min(workers, sum(-(-r // granularity) for r in rows))
    assert min(blocks) >= 1 and max(blocks) - min(blocks) <= 1
    for p, row, n in (s for task in tasks for s in task):
        assert row % granularity == 0 and (n % granularity == 0 or row + n == rows[p])


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 3)), min_size=2, max_size=4), st.integers(1, 30))
def test_parts_with_different_joint_counts_are_balanced_in_bytes(shape, workers):
    parts = tuple(part(r, j) for r, j in shape)
    tasks = cut_rows(parts, workers, 1, 0)
    size = [sum(n * len(parts[p].weights) for p, _, n in task) for task in tasks]
    ideal = sum(size) / len(size)
    assert len(tasks) == min(workers, sum(r for r, _ in shape)) and min(size) >= 1
    if ideal >= 3:  # else some tasks are single rows
        assert max(abs(s - ideal) for s in size) <= 3


def test_parts_have_workers_of_their_own_where_that_is_fair() -> None:
    """q, k and v of 32, 8 and 8 heads share 132 workers as 88, 22 and 22; of 24, 8 and 8 they cannot."""
    apart = cut_rows(tuple(part(r) for r in (4096, 1024, 1024)), 132, 1, 5)
    assert [len(task) for task in apart] == [1] * 132
    assert [task[0][0] for task in apart] == [0] * 88 + [1] * 22 + [2] * 22
    assert {task[0][2] for task in apart} == {46, 47}
    shared = cut_rows(tuple(part(r) for r in (3072, 1024, 1024)), 132, 1, 5)
    assert max(len(task) for task in shared) == 2


def test_extra_rows_go_round_over_the_workers():
    buffers = {f"x{i}": buffer(f"x{i}", F32, (1, 8), BufferKind.SCRATCH) for i in range(5)}
    buffers |= {f"w{i}": buffer(f"w{i}", F32, (10, 8), BufferKind.PARAM) for i in range(4)}
    t, k, n = var("t", 1), var("k", 8), var("n", 10)
    nodes = tuple(
        Linear(f"l{i}", t, k, load(f"x{i}", (t, k), F32), (LinearPart((f"w{i}",), 10, acc(0), f"x{i + 1}", (t, n)),))
        for i in range(4)
    )
    graph = Graph(nodes, buffers, ())
    totals = [0] * 4
    for node in nodes:
        for worker, task in enumerate(operator_of(node).tile(node, graph, 4).tasks):
            totals[worker] += sum(rows for _, _, rows in segments(task.tile))
    assert [phase_of(node, graph, 4) for node in nodes] == [0, 2, 0, 2]
    assert totals == [10, 10, 10, 10]


@given(st.integers(-3, 1200), st.integers(-3, 1200), st.integers(1, 1100), st.integers(1, 9))
def test_splits_cover_the_live_keys_once(first, last, keys, splits):
    ranges = [key_range(first, last, keys, s, splits) for s in range(splits)]
    covered = [k for start, stop in ranges for k in range(start, stop)]
    assert covered == list(range(max(0, first), min(keys, last)))
    used = used_splits(first, last, keys, splits)
    assert 1 <= used <= splits
    assert all((start < stop) == (i < used and bool(covered)) for i, (start, stop) in enumerate(ranges))
    assert all(stop - start >= MIN_KEYS for start, stop in ranges[: used - 1])


def test_split_count_follows_workers_and_keys():
    node = OPERATORS[next(t for t in OPERATORS if t.__name__ == "Attention")].samples()[2][0]  # B 2, groups 2, S 131
    assert [split_count(node, w) for w in (1, 4, 8, 12, 132)] == [1, 1, 2, 2, 2]


def test_rows_are_the_dims_that_reductions_depend_on():
    i, j, k, r = var("i0", 2), var("i1", 3), var("i2", 50), var("r0", 50)
    x = load("x", (i, j, r), F32)
    out = (i, j, k)
    assert row_dims(RowMap("n", out, op("mul", reduce("sum", r, x), load("x", out, F32)), "y", out)) == 2
    assert row_dims(RowMap("n", out, load("x", out, F32), "y", out)) == 3
    assert row_dims(RowMap("n", out, reduce("max", r, load("w", (r,), F32)), "y", out)) == 0
    # a reduction on the second dim alone needs the first as well: rows are a prefix
    assert row_dims(RowMap("n", (i, j), reduce("max", r, load("w", (j, r), F32)), "y", (i, j))) == 2


def test_reads_are_clipped_and_branches_that_cannot_be_taken_are_left_out():
    i, j = var("i0", 10), var("i1", 6)
    buffers = {n: buffer(n, F32, (5, 6), BufferKind.INPUT) for n in "ab"}
    joined = where(
        op("lt", i, index(5)), load("a", (i, j), F32), load("b", (op("sub", i, index(5)), j), F32)
    )
    assert read_accesses([joined], {i: (0, 3), j: (0, 6)}, buffers) == [Access("a", ((0, 3), (0, 6)))]
    assert read_accesses([joined], {i: (4, 7), j: (2, 4)}, buffers) == [
        Access("a", ((4, 5), (2, 4))), Access("b", ((0, 2), (2, 4))),
    ]


def test_data_dependent_reads_take_the_whole_dimension_and_the_index():
    i, j = var("i0", 4), var("i1", 6)
    buffers = {
        "ids": buffer("ids", DType.I64, (4,), BufferKind.INPUT), "t": buffer("t", F32, (99, 6), BufferKind.PARAM),
    }
    e = load("t", (load("ids", (i,), DType.I64), j), F32)
    node = RowMap("gather", (i, j), e, "out", (i, j))
    buffers["out"] = buffer("out", F32, (4, 6), BufferKind.OUTPUT)
    (task,) = operator_of(node).tile(node, Graph((node,), buffers, ()), 8).tasks
    assert set(task.reads) == {Access("ids", ((0, 4),)), Access("t", ((0, 99), (0, 6)))}
    assert task.bytes == 4 * 8 + 4 * 6 * 4 + 4 * 6 * 4  # ids, four rows of the table, the output


def test_flops_count_common_work_once():
    i, r = var("i0", 4), var("r0", 8)
    x = load("x", (i, r), F32)
    total = reduce("sum", r, op("mul", x, x))
    e = op("add", op("sqrt", total), op("exp", total))
    assert arithmetic([e], {i: (0, 4)}) == 4 * 8 + 4 * 8 + 3 * 4  # squares, their sum, three per row
    assert arithmetic([cast(op("add", cast(x, DType.F64), cast(x, DType.F64)), F32)], {i: (0, 2), r: (0, 8)}) == 16


@pytest.mark.parametrize("workers", [1, 3, 132])
def test_in_place_shifts_are_one_task(workers):
    operator = OPERATORS[RowMap]
    shift = next((n, g) for n, g in operator.samples() if n.name == "shift")
    assert len(operator.tile(*shift, workers).tasks) == 1
    node, graph = next((n, g) for n, g in operator.samples() if n.name == "scale_in_place")
    assert len(operator.tile(node, graph, workers).tasks) == min(workers, 3)


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.integers(-4, 9), st.sampled_from(["n", "div", "mod", "k", "data", "max"])),
        min_size=1, max_size=4,
    ),
    st.integers(0, 11), st.integers(1, 12),
)
def test_sweeps_say_what_each_range_says(terms, start, length):
    """Indices that move with n at any step, leave the buffer, split n, or depend on data."""
    n, k = var("n", 12), var("k", 3)
    buffers = {"x": buffer("x", F32, (9, 5), BufferKind.INPUT), "p": buffer("p", DType.I64, (12,), BufferKind.INPUT)}
    made = {
        "n": n, "k": k, "div": op("floordiv", n, index(5)), "mod": op("mod", n, index(5)),
        "data": load("p", (n,), DType.I64), "max": op("max", n, index(4)),
    }
    idx = [op("add", op("mul", made[kind], index(step)), index(offset)) for step, offset, kind in terms]
    exprs = tuple(load("x", pair, F32) for pair in zip(idx, [*idx[1:], k], strict=True))
    stop = min(12, start + length)
    sweep = Sweep(exprs, n, {k: (1, 3)}, buffers)
    assert sweep(start, stop) == read_accesses(exprs, {k: (1, 3), n: (start, stop)}, buffers)
    store = StoreSweep("x", exprs[0].index, n, {k: (1, 3)}, buffers)
    assert store(start, stop) == write_accesses("x", exprs[0].index, {k: (1, 3), n: (start, stop)}, buffers)


def test_a_load_under_a_reduction_over_the_same_variable_is_swept_whole():
    n = var("n", 6)
    total = reduce("sum", n, load("x", (n,), F32))
    buffers = {"x": buffer("x", F32, (6,), BufferKind.INPUT)}
    assert Sweep((total,), n, {}, buffers)(2, 4) == [Access("x", ((0, 6),))]
