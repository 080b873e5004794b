"""What a decoder's step becomes, and what fusion must leave alone."""

from __future__ import annotations

import time
from dataclasses import replace

import graphs
import pytest
from graphs import Builder, Model, T
from test_same_results import assert_same

from mpk_dynamo.errors import Unsupported
from mpk_dynamo.ir import expr as E
from mpk_dynamo.ir.graph import Attention, Graph, Linear, Output, RowMap, expressions
from mpk_dynamo.ir.types import BufferKind, DType
from mpk_dynamo.passes import graph as passes
from mpk_dynamo.passes.graph import PASSES, rewrite
from mpk_dynamo.passes.graph.order import order

BF16, F32, I64 = DType.BF16, DType.F32, DType.I64
INPUT, STATE = BufferKind.INPUT, BufferKind.STATE


def fused(graph: Graph) -> Graph:
    for graph_pass in PASSES:
        graph = graph_pass(graph)
    return graph


def count(graph: Graph, kind: type) -> int:
    return sum(isinstance(n, kind) for n in graph.nodes)


def find(graph: Graph, kind: type) -> list:
    return [n for n in graph.nodes if isinstance(n, kind)]


# --- a decoder ---


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_layer_of_one_token_is_five_nodes(layers: int, qk_norm: bool) -> None:
    g = fused(graphs.decoder(Model(layers=layers, qk_norm=qk_norm)))
    assert count(g, Attention) == layers
    assert count(g, Linear) == 4 * layers + 1
    # embedding, cosine, sine, live keys, and a counter per layer
    assert count(g, RowMap) == 4 + layers
    for k in range(layers):
        qkv, o, gate_up, down = find(g, Linear)[4 * k : 4 * k + 4]
        assert [len(p.weights) for p in qkv.parts] == [1, 1, 1] and E.reductions(qkv.x)
        assert [len(p.weights) for p in gate_up.parts] == [2] and E.reductions(gate_up.x)
        for residual in (o, down):
            assert len(E.loads(residual.parts[0].epilogue)) == 1 and isinstance(residual.x, E.Load)
        attention = find(g, Attention)[k]
        assert attention.append is not None and attention.g.size == 2
        assert attention.keys == f"layers.{k}.keys" and attention.append.keys == f"layers.{k}.keys@1"
        assert bool(E.reductions(attention.q)) == bool(E.reductions(attention.append.key)) == qk_norm


@pytest.mark.parametrize(
    ("batch", "hidden", "stored"),
    [(3, 64, 0), (3, 3072, 0), (3, 3080, 5), (8, 2048, 0), (5, 2056, 5), (16, 1024, 0), (9, 1032, 5)],
)
def test_norms_of_several_tokens(batch: int, hidden: int, stored: int) -> None:
    """Part of the Linears that read them, as for one token, unless rows are too deep for registers."""
    g = fused(graphs.decoder(Model(layers=2, batch=batch, hidden=hidden, heads=2, kv_heads=2, size=32)))
    assert count(g, Linear) == 9 and count(g, Attention) == 2
    assert count(g, RowMap) == 4 + 2 + stored
    assert sum(bool(E.reductions(n.x)) for n in find(g, Linear)) == 5 - stored
    plain = [n for n in find(g, Linear) if isinstance(n.x, E.Load)]
    assert len(plain) == 4 + stored and all(n.x.index == (n.t, n.k) for n in plain)


def test_rotary_tables_are_computed_once() -> None:
    g = fused(graphs.decoder(Model(layers=3)))
    slow = [n for n in g.nodes for x in expressions(n) for e in E.walk(x) if getattr(e, "name", "") in ("sin", "cos")]
    assert len(slow) == 2 and all(isinstance(n, RowMap) and len(n.dims) == 1 for n in slow)


def test_live_keys_are_found_once_for_all_layers() -> None:
    for mask in ("input", "arithmetic"):
        g = fused(graphs.decoder(Model(layers=3, mask=mask)))
        firsts = {a.first for a in find(g, Attention)}
        assert len(firsts) == 1 and None not in firsts
        (found,) = [n for n in find(g, RowMap) if len(E.reductions(n.body)) == 2]
        assert g.buffers[found.out].dtype is DType.I32 and g.buffers[found.out].shape == (1, 2)


def test_counter_is_added_to_after_its_readers() -> None:
    g = fused(graphs.decoder(Model(layers=2, mask="arithmetic")))
    at = {n.name: k for k, n in enumerate(g.nodes)}
    # layer 0's counter also is the position that every layer's mask compares with
    for attention in find(g, Attention):
        assert at["write_length0@1"] > at[attention.name]


def test_upcast_result_is_stored_narrow() -> None:
    g = fused(graphs.decoder(Model()))
    assert {b.dtype for b in g.buffers.values() if b.kind is BufferKind.SCRATCH} == {BF16, DType.I32}


@pytest.mark.slow
def test_whole_model_does_not_grow_quadratically() -> None:
    """Fusing 36 layers (2,865 nodes) costs about as much per layer as fusing 12. Both are timed in one run, so that
    the speed of the machine cancels; a pass that is quadratic in the layers would cost three times as much."""

    def seconds_per_layer(layers: int) -> float:
        sizes = dict(hidden=4096, heads=32, kv_heads=8, size=128, ff=12288, vocab=151936, capacity=1024)
        g = graphs.decoder(Model(layers, 1, **sizes))
        start = time.process_time()
        g = fused(g)
        assert len(g.nodes) == layers * 6 + 5
        return (time.process_time() - start) / layers

    seconds_per_layer(
        36
    )  # makes all expressions, which are kept; without it the second run would profit from the first
    few, many = seconds_per_layer(12), seconds_per_layer(36)
    assert many < 2.5 * few, f"{many:.3f} s per layer of 36, {few:.3f} s per layer of 12"


# --- what must stay ---


def small_linear(g: Builder, x: T, rows: int, name: str) -> T:
    return g.linear(x, g.caller(name, (rows, x.shape[-1]), BF16), None, name)


def test_epilogue_leaves_a_result_with_another_reader() -> None:
    g = Builder()
    x = g.caller("x", (1, 16), BF16, INPUT)
    y = small_linear(g, x, 16, "w")
    before = g.graph(g.op("add", y, x), g.op("mul", small_linear(g, y, 16, "v"), 2.0))
    after = fused(before)
    first = find(after, Linear)[0]
    assert isinstance(first.parts[0].epilogue, E.Op) and not E.loads(first.parts[0].epilogue)
    assert_same(before, after)


def test_epilogue_does_not_wait_for_itself() -> None:
    """z = y0 * f(y1) where y0, y1 come from one Linear, and f goes through a second Linear: taking z into the first
    Linear would make it wait for the second, which waits for the first."""
    g = Builder()
    x = g.caller("x", (1, 16), BF16, INPUT)
    y0, y1 = small_linear(g, x, 16, "w0"), small_linear(g, x, 16, "w1")
    z = g.op("mul", y0, small_linear(g, y1, 16, "w2"))
    before = g.graph(z)
    after = fused(before)
    assert [len(n.parts) for n in find(after, Linear)] == [2, 1]
    assert after.nodes[-1].parts[0].out == z.name and E.loads(after.nodes[-1].parts[0].epilogue)
    assert_same(before, after)


def test_linears_of_one_input_merge_only_where_neither_waits() -> None:
    g = Builder()
    x = g.caller("x", (1, 16), BF16, STATE)
    old = small_linear(g, x, 16, "w0")
    x1 = g.assign(x, E.cast(E.op("add", g.wide(x, x.shape), g.wide(old, x.shape)), BF16))
    before = g.graph(small_linear(g, x1, 16, "w1"), small_linear(g, x1, 16, "w2"))
    after = fused(before)
    assert sorted(len(n.parts) for n in find(after, Linear)) == [1, 2]
    assert_same(before, after)


def test_read_of_an_old_version_is_not_moved_past_the_write() -> None:
    """z = copy of x before the write, used with something computed after it: the copy must stay."""
    g = Builder()
    x = g.caller("x", (1, 16), BF16, STATE)
    copy = g.view(x, (1, 16))
    written = g.assign(x, E.cast(E.op("mul", g.wide(x, x.shape), E.const(2.0, F32)), BF16))
    before = g.graph(g.op("add", copy, written))
    after = fused(before)
    assert len(after.nodes) == 3
    assert_same(before, after)


def test_two_moved_reads_do_not_cross() -> None:
    """r1 reads old x and new y, r2 reads old y and new x. Either copy can be folded into its reader, not both: r1
    would come before the write of x, that before r2, that before the write of y, that before r1."""
    g = Builder()
    x, y = (g.caller(name, (1, 16), BF16, STATE) for name in "xy")
    old_x, old_y = g.view(x, (1, 16)), g.view(y, (1, 16))
    new_x, new_y = (g.assign(z, E.cast(E.op("mul", g.wide(z, z.shape), E.const(2.0, F32)), BF16)) for z in (x, y))
    before = g.graph(g.op("add", old_x, new_y), g.op("sub", old_y, new_x))
    after = fused(before)
    assert len(after.nodes) == 5
    assert_same(before, after)


def test_shift_in_place_keeps_its_copy() -> None:
    """x[:] = roll(x): computed into a buffer first, since elements would overwrite what others still read."""
    g = Builder()
    x = g.caller("x", (16,), BF16, STATE)
    i = E.var("i0", 16)
    rolled = g.emit((16,), g.at(x, (E.op("mod", E.op("add", i, E.index(1)), E.index(16)),)))
    x1 = g.assign(x, g.at(rolled, (i,)))
    before = g.graph(g.op("neg", x1))
    after = fused(before)
    assert len(after.nodes) == 3
    assert_same(before, after)


def test_elementwise_update_in_place_is_fused() -> None:
    g = Builder()
    x = g.caller("x", (16,), BF16, STATE)
    y = g.op("mul", g.op("add", x, 1.0), 3.0)
    before = g.graph(g.op("neg", g.assign(x, g.at(y, graphs.points((16,))))))
    after = fused(before)
    assert len(after.nodes) == 2
    assert_same(before, after)


def append(extra_reader: bool, wide_position: bool = False) -> Graph:
    g = Builder()
    cache = (1, 2, 8, 4)
    keys, values = g.caller("keys", cache, BF16, STATE), g.caller("values", cache, BF16, STATE)
    k, v = g.caller("k", (1, 2, 1, 4), BF16, INPUT), g.caller("v", (1, 2, 1, 4), BF16, INPUT)
    q = g.caller("q", (1, 2, 1, 4), BF16, INPUT)
    where = g.caller("where", (2,) if wide_position else (1,), I64, INPUT)
    if wide_position:  # another row per head
        new = []
        for old, source in ((keys, k), (values, v)):
            written = g.new_version(old)
            dims = tuple(E.var(f"i{n}", s) for n, s in enumerate(source.shape))
            at = graphs.points(source.shape)
            store = (at[0], at[1], g.at(where, (at[1],)), at[3])
            g.nodes.append(RowMap(written.name, dims, g.at(source, at), written.name, store))
            new.append(written)
    else:
        new = [g.index_copy(keys, where, k), g.index_copy(values, where, v)]
    out = [g.attention(q, *new, None, 0.5)]
    return g.graph(*out, *([g.op("neg", new[0])] if extra_reader else []))


def test_append_is_absorbed_only_when_nothing_else_reads_the_cache() -> None:
    for extra, wide, absorbed in ((False, False, True), (True, False, False), (False, True, False)):
        before = append(extra, wide)
        after = fused(before)
        assert (find(after, Attention)[0].append is not None) == absorbed, (extra, wide)
        assert_same(before, after)


def test_heads_are_grouped_only_where_keys_and_values_repeat() -> None:
    for repeated in ("keys", "both"):
        g = Builder()
        few, many = (1, 2, 8, 4), (1, 4, 8, 4)
        caches = []
        for name in ("keys", "values"):
            if repeated in (name, "both"):
                one = g.view(g.caller(name, few, BF16, INPUT), (1, 2, 1, 8, 4))
                caches.append(g.view(g.expand(one, (1, 2, 2, 8, 4)), many))
            else:
                caches.append(g.caller(name, many, BF16, INPUT))
        before = g.graph(g.attention(g.caller("q", (1, 4, 1, 4), BF16, INPUT), *caches, None, 0.5))
        after = fused(before)
        assert [n.g.size for n in after.nodes] == [2 if repeated == "both" else 4]
        assert_same(before, after)


def test_mask_of_several_heads_keeps_every_key_some_head_sees() -> None:
    g = Builder()
    shape = (2, 2, 8, 4)
    keys, values = g.caller("keys", shape, BF16, INPUT), g.caller("values", shape, BF16, INPUT)
    q = g.caller("q", (2, 2, 1, 4), BF16, INPUT)
    mask = g.caller("mask", (2, 2, 1, 8), DType.BOOL, INPUT)
    before = g.graph(g.attention(q, keys, values, mask, 0.5))
    after = fused(before)
    (attention,) = find(after, Attention)
    assert attention.first is not None
    assert_same(before, after, seeds=5)


def test_norm_that_two_nodes_read_is_stored() -> None:
    g = Builder()
    x = g.caller("x", (1, 64), BF16, INPUT)
    wide = g.to(x, F32)
    y = g.to(g.op("mul", wide, g.op("rsqrt", g.op("add", g.mean(g.op("mul", wide, wide)), 1e-6))), BF16)
    z = small_linear(g, y, 64, "w0")
    before = g.graph(small_linear(g, g.op("sigmoid", z), 8, "w1"), g.op("add", small_linear(g, z, 64, "w2"), y))
    after = fused(before)
    assert sum(bool(E.reductions(x)) for n in after.nodes for x in expressions(n)) == 1
    assert_same(before, after)


def test_sum_of_two_buffers_that_many_read_is_stored() -> None:
    g = Builder()
    x, y = (g.caller(name, (1, 16), BF16, INPUT) for name in "xy")
    total = g.op("add", x, y)
    before = g.graph(*(small_linear(g, total, 8 * k, f"w{k}") for k in (1, 2)), g.op("neg", total), g.op("abs", total))
    after = fused(before)
    assert sum({"x", "y"} <= {ld.buffer for e in expressions(n) for ld in E.loads(e)} for n in after.nodes) == 1
    assert_same(before, after)


def test_gathered_row_that_two_nodes_read_is_stored() -> None:
    g = Builder()
    table, ids = g.caller("table", (32, 16), BF16), g.caller("ids", (1,), I64, INPUT)
    row = g.embedding(table, ids)
    before = g.graph(small_linear(g, row, 8, "w"), g.op("neg", row))
    after = fused(before)
    assert sum("table" in e.buffers for n in after.nodes for e in expressions(n)) == 1
    assert_same(before, after)


@pytest.mark.parametrize("batch", [1, 2])
def test_parts_of_different_length_stay_apart(batch: int) -> None:
    g = Builder()
    x = g.caller("x", (batch, 16), BF16, INPUT)
    short, long = small_linear(g, x, 8, "w0"), small_linear(g, x, 16, "w1")
    before = g.graph(g.op("mul", short, g.slice(long, 0, 8)), g.op("neg", x))
    after = fused(before)
    assert [len(p.weights) for n in find(after, Linear) for p in n.parts] == [1, 1]
    assert_same(before, after)


def test_windows_of_a_result_are_no_epilogue() -> None:
    """z[i, j] = y[i + j] has as many elements as y, but reads some of y several times."""
    g = Builder()
    y = small_linear(g, g.caller("x", (1, 16), BF16, INPUT), 16, "w")
    i, j = E.var("i0", 4), E.var("i1", 4)
    window = g.at(y, (E.index(0), E.op("add", i, j)))
    before = g.graph(g.emit((4, 4), E.cast(E.op("neg", E.cast(window, F32)), BF16)))
    after = fused(before)
    assert len(after.nodes) == 2
    assert_same(before, after)


def test_activation_in_many_steps_is_one_epilogue() -> None:
    """GELU by tanh, as GPT-2 writes it: the result of the Linear has three readers until they are one."""
    g = Builder()
    x = g.caller("x", (1, 16), BF16, INPUT)
    y = small_linear(g, x, 32, "w0")
    cubed = g.op("mul", g.op("mul", y, y), y)
    inner = g.op("tanh", g.op("mul", g.op("add", y, g.op("mul", cubed, 0.044715)), 0.79788))
    gelu = g.op("mul", g.op("mul", y, 0.5), g.op("add", inner, 1.0))
    before = g.graph(small_linear(g, gelu, 16, "w1"))
    after = fused(before)
    assert [type(n) for n in after.nodes] == [Linear, Linear]
    assert_same(before, after)


@pytest.mark.parametrize("n", [8, 64])
def test_product_written_as_a_reduction_is_not_repeated(n: int) -> None:
    """sum over r of (sum over s of x[s] w[s, r]) v[r, i]: the inner sum must not run once per i and r."""
    g = Builder()
    x, w, v = (g.caller(name, s, F32, INPUT) for name, s in (("x", (n,)), ("w", (n, n)), ("v", (n, n))))
    i, r = E.var("i0", n), E.var("r0", n)

    def product(a: T, m: T) -> T:
        return g.emit((n,), E.reduce("sum", r, E.op("mul", g.at(a, (r,)), g.at(m, (r, i)))))

    before = g.graph(product(product(x, w), v))
    after = fused(before)
    assert len(after.nodes) == 2
    assert_same(before, after)


def test_reduction_over_another_length_stays_out_of_a_linear() -> None:
    """A norm per head of 16 before a Linear over 64: its task would reduce in the wrong rows."""
    g = Builder()
    x = g.caller("x", (1, 4, 16), F32, INPUT)
    y = g.op("mul", x, g.op("rsqrt", g.mean(g.op("mul", x, x))))
    y = g.view(g.to(y, BF16), (1, 64))
    before = g.graph(small_linear(g, y, 8, "w"))
    after = fused(before)
    assert not E.reductions(find(after, Linear)[0].x)
    assert_same(before, after)


@pytest.mark.parametrize("after_linear", [False, True])
def test_long_chain_is_cut_into_bounded_nodes(after_linear: bool) -> None:
    g = Builder()
    x = g.caller("x", (1, 16), BF16, INPUT)
    if after_linear:
        x = small_linear(g, x, 16, "w")
    for _ in range(300):
        x = g.op("neg", g.op("mul", x, 1.5))
    before = g.graph(x)
    after = fused(before)
    assert 4 <= len(after.nodes) <= 20
    assert_same(before, after)


# --- views, copies, duplicates ---


def test_copy_of_a_weight_is_the_weight() -> None:
    g = Builder()
    weight = g.caller("w", (8, 16), BF16)
    x = g.caller("x", (1, 16), BF16, INPUT)
    turned = g.view(g.transpose(g.caller("v", (16, 8), BF16), 0, 1), (8, 16))
    before = g.graph(g.linear(x, g.view(weight, (8, 16))), g.linear(x, turned))
    after = fused(before)
    # the other one is no plain copy: it stays
    assert sorted(w for n in find(after, Linear) for p in n.parts for w in p.weights) == sorted(["w", turned.name])
    assert_same(before, after)


def test_same_computation_twice_is_done_once() -> None:
    g = Builder()
    x = g.caller("x", (1, 16), BF16, INPUT)
    twice = [g.op("sin", g.op("add", x, 1.0)) for _ in range(2)]
    before = g.graph(*(g.op("mul", y, 2.0) for y in twice))
    after = fused(before)
    assert sum(getattr(e, "name", "") == "sin" for n in after.nodes for x in expressions(n) for e in E.walk(x)) == 1
    assert_same(before, after)


# --- order ---


def test_order_refuses_a_cycle() -> None:
    """a = x@1 + 1 is read by the writer of x@1's own predecessor: no order exists."""
    g = Builder()
    x = g.caller("x", (4,), F32, STATE)
    x1 = g.assign(x, E.const(1.0, F32))
    late = g.op("add", x1, x)  # reads both versions
    made = replace(g.graph(late), outputs=(Output(late.name),))
    with pytest.raises(Unsupported, match="overwritten in place"):
        order(made)


def test_order_sorts_what_is_shuffled() -> None:
    before = fused(graphs.decoder(Model()))
    # the order of versions is that of the nodes, so only nodes without a successor version may move
    writers = [n for n in before.nodes if isinstance(n, RowMap)]
    rest = [n for n in before.nodes if not isinstance(n, RowMap)]
    shuffled = replace(before, nodes=(*reversed(rest), *writers))
    assert_same(before, order(shuffled))


def test_what_nothing_waits_for_runs_just_before_the_largest_linear() -> None:
    g = Builder()
    x, count = g.caller("x", (1, 16), BF16, INPUT), g.caller("count", (1,), F32, STATE)
    small, large = g.caller("small", (8, 16), BF16), g.caller("large", (64, 8), BF16)
    g.assign(count, E.op("add", g.at(count, (E.index(0),)), E.const(1.0, F32)))
    made = g.graph(g.op("sin", g.linear(g.linear(x, small), large)))
    counting, first, second, *_ = (n.name for n in made.nodes)
    assert [n.name for n in order(made).nodes][:3] == [first, counting, second]
    assert_same(made, order(made))


def test_passes_stamp_their_names() -> None:
    g = fused(graphs.decoder(Model(layers=1)))
    assert g.provenance[1:] == tuple(p.__name__ for p in passes.PASSES)


def test_reductions_over_equal_sizes_keep_their_variables() -> None:
    """Renaming the inner variable must not bind the outer one, which has the new name until its turn."""
    outer, inner = E.var("r0", 4), E.var("r1", 4)
    element = E.load("x", (outer, inner), DType.F32)
    named = rewrite.name_reductions(E.reduce("sum", outer, E.reduce("max", inner, element)))
    assert E.render(named) == "sum<r1:4>(max<r0:4>(x[r1, r0]))"
