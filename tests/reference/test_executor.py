"""The executor: every order gives the same bits, buffer reuse is real, and a program that cannot finish is an error."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from mpk_dynamo.errors import MpkError, VerificationError
from mpk_dynamo.ir.expr import acc, cast, const, index, op, reduce, var
from mpk_dynamo.ir.graph import Append, Attention, Graph, Linear, LinearPart, Output, RowMap
from mpk_dynamo.ir.tasks import Event
from mpk_dynamo.ir.types import BufferKind, DType
from mpk_dynamo.ops import operator_of
from mpk_dynamo.ops.sampling import Sample, rms_norm, sample_tensors
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import derive_events, flagged_edges, tile
from mpk_dynamo.passes.tasks.choose_flagged import flaggable
from mpk_dynamo.reference import Executor, allocate, interleave, run_tasks, task_order
from mpk_dynamo.reference.guard import check_task, checked

BF16, F32, I64 = DType.BF16, DType.F32, DType.I64
T, K, HEADS, D, KEYS, LAYERS = 2, 48, 4, 12, 270, 2


def decoder() -> Graph:
    """Two layers of a decoder: gather, qkv with norm, attention with append, o with residual, counter, logits."""
    s, nodes = Sample(), []
    t, k, n = var("t", T), var("k", K), var("n", K)
    i, j = var("i0", T), var("i1", K)
    ids, table = s.input("ids", I64, T), s.param("table", BF16, 30, K)
    mask = s.input("mask", DType.BOOL, T, KEYS)
    scratch = lambda name, *shape: s.add(BufferKind.SCRATCH, name, BF16, *shape)  # noqa: E731
    h = scratch("h0", T, K)
    nodes.append(RowMap("embed", (i, j), s.at(table, s.at(ids, i), j), h, (i, j)))
    for layer in range(LAYERS):
        p = f"l{layer}."
        norm = s.param(p + "norm", BF16, K)
        x = rms_norm(lambda e, h=h: s.wide(h, t, e), k, lambda e, w=norm: s.wide(w, e), BF16)
        qkv, weights = [], []
        for name in "qkv":
            qkv.append(scratch(p + name, T, HEADS if name == "q" else 2, D))
            rows = s.buffers[qkv[-1]].numel // T
            weights.append((s.param(p + "w" + name, BF16, rows, K), rows, qkv[-1]))
        parts = []
        for w, rows, out in weights:
            v = var("n", rows)
            store = (t, op("floordiv", v, index(D)), op("mod", v, index(D)))
            parts.append(LinearPart((w,), rows, cast(acc(0), BF16), out, store))
        nodes.append(Linear(p + "qkv", t, k, x, tuple(parts)))
        keys, keys1 = s.state(p + "keys", BF16, T, 2, KEYS, D)
        values, values1 = s.state(p + "values", BF16, T, 2, KEYS, D)
        length, length1 = s.state(p + "length", I64)
        b, hv, g, kv, d = var("b", T), var("h", HEADS), var("g", 2), var("s", KEYS), var("d", D)
        append = Append(s.at(length), s.at(qkv[1], b, g, d), s.at(qkv[2], b, g, d), keys1, values1)
        mixed = scratch(p + "mixed", T, HEADS, D)
        nodes.append(Attention(
            p + "attention", b, hv, g, kv, d, s.at(qkv[0], b, hv, d), keys, (b, g, kv, d), values, (b, g, kv, d),
            D**-0.5, mixed, (b, hv, d), s.at(mask, b, kv), None, s.at(length), append,
        ))
        nodes.append(RowMap(p + "count", (), op("add", s.at(length), index(1)), length1, ()))
        wo, after = s.param(p + "wo", BF16, K, K), scratch(f"h{layer + 1}", T, K)
        y = cast(op("add", s.wide(h, t, n), cast(cast(acc(0), BF16), F32)), BF16)
        x = s.at(mixed, t, op("floordiv", k, index(D)), op("mod", k, index(D)))
        nodes.append(Linear(p + "o", t, k, x, (LinearPart((wo,), K, y, after, (t, n)),)))
        h = after
    head, logits, best = s.param("head", BF16, 30, K), s.output("logits", F32, T, 30), s.output("top", F32, T)
    part = LinearPart((head,), 30, acc(0), logits, (t, var("n", 30)))
    nodes.append(Linear("head", t, k, s.at(h, t, k), (part,)))
    r = var("r0", 30)
    nodes.append(RowMap("top", (i,), reduce("max", r, op("mul", s.at(logits, i, r), const(2.0, F32))), best, (i,)))
    return Graph(tuple(nodes), s.buffers, (Output(logits), Output(best)))


GRAPH = decoder()


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for node in GRAPH.nodes:  # integer ranges depend on the node that uses them
        for name, tensor in sample_tensors(node, GRAPH, seed).items():
            if name not in out or not tensor.is_floating_point() and tensor.numel() and tensor.max() > out[name].max():
                out[name] = tensor
    for layer in range(LAYERS):
        out[f"l{layer}.length"] = torch.tensor(40)
    out["ids"] = torch.tensor([3, 29])
    return out


def expected(seed: int = 0):
    memory = allocate(GRAPH.buffers, tensors(seed), poison=True)
    for node in GRAPH.nodes:
        operator_of(node).oracle(node, GRAPH.buffers, memory)
    return memory


def results(memory):
    kinds = (BufferKind.OUTPUT, BufferKind.STATE)
    return {n: memory[n] for n, b in GRAPH.buffers.items() if b.kind in kinds}


def tasks(workers: int, flagged: bool = False):
    tg = tile(GRAPH, workers)
    return derive_events(dataclasses.replace(tg, flagged=flaggable(tg)) if flagged else tg)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("workers", [1, 4, 16])
def test_every_order_of_tasks_gives_the_same_bits(workers, flagged):
    tg, runs = tasks(workers, flagged), []
    assert bool(tg.flagged) == flagged
    for order, seed in [("program", 0), ("reversed", 0), ("random", 1), ("random", 2)]:
        memory = allocate(tg.buffers, tensors(), poison=True)
        sequence = run_tasks(tg, memory, order, seed)
        assert sorted(sequence) == list(range(len(tg.tasks)))
        runs.append(results(memory))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][n], other[n]) for n in runs[0])
    want = results(expected())
    for name in want:
        torch.testing.assert_close(runs[0][name].float(), want[name].float(), rtol=2e-2, atol=2e-2)


def test_orders_really_differ():
    tg = tasks(4)
    orders = [task_order(tg, o, s) for o, s in [("program", 0), ("reversed", 0), ("random", 1), ("random", 2)]]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    with pytest.raises(ValueError, match="sideways"):
        task_order(tg, "sideways")


def test_a_whole_program_passes_the_guard():
    tg = tasks(4)
    memory = allocate(tg.buffers, tensors(), poison=True)
    run_tasks(tg, memory, "random", 3, run=checked(tg))
    assert memory["logits"].isfinite().all()


def test_a_starved_worker_goes_when_nobody_else_can():
    s = schedule(tasks(3), 3)
    worker = {t: w for w, queue in enumerate(s.queues) for t in queue}
    shares = []
    for seed in range(3):
        sequence = interleave(s, "starved", seed)
        assert sorted(sequence) == list(range(len(worker)))
        first = next(i for i, t in enumerate(sequence) if worker[t] == seed)
        early = [t for t in sequence[:first] if worker[t] != seed]
        shares.append(len(early))
    assert max(shares) > 0, "nobody was made to wait"


def test_an_undeclared_read_is_found():
    tg = tasks(4)
    task = next(t for t in tg.tasks if t.op == "linear")
    memory = allocate(tg.buffers, tensors(), poison=True)
    run_tasks(tg, memory)
    node = tg.graph.nodes[task.node]
    bare = dataclasses.replace(task, reads=tuple(a for a in task.reads if a.buffer != "h0"))
    with pytest.raises(VerificationError, match="R1"):
        check_task(node, tg.buffers, bare, memory)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("order", ["round_robin", "program", "reversed", "random", "starved"])
@pytest.mark.parametrize("workers", [1, 3, 16])
def test_schedules_run_in_a_poisoned_arena(workers, order, flagged):
    tg = tasks(workers, flagged)
    plain = allocate(tg.buffers, tensors(), poison=True)
    run_tasks(tg, plain)
    run = Executor(schedule(tg, workers), order=order, poison=True)
    state = tensors()
    got = run(state)
    assert torch.equal(got["logits"], plain["logits"]) and torch.equal(got["top"], plain["top"])
    assert state["l1.length"] == 41 and torch.equal(state["l1.keys"], plain["l1.keys"])
    # a second step on the same arena goes on from the state
    again, second = allocate(tg.buffers, state | {k: v.clone() for k, v in state.items()}), run(state)
    run_tasks(tg, again)
    assert torch.equal(second["logits"], again["logits"]) and not torch.equal(second["logits"], got["logits"])
    assert got["logits"].data_ptr() != second["logits"].data_ptr()


def test_overlapping_buffers_show():
    """The executor uses the real offsets: two live buffers at one place must spoil the result."""
    s = schedule(tasks(4), 4)
    good = Executor(s)(tensors())["logits"]
    bad = dataclasses.replace(s, arena={name: 0 for name in s.arena})
    assert not torch.equal(Executor(bad)(tensors())["logits"], good)


def test_a_missing_event_changes_the_result_in_some_order():
    tg = tasks(4)
    good = allocate(tg.buffers, tensors(), poison=True)
    run_tasks(tg, good)
    weak = dataclasses.replace(tg, events=())
    bad = allocate(tg.buffers, tensors(), poison=True)
    run_tasks(weak, bad, "reversed")
    assert not torch.equal(good["logits"], bad["logits"])


def test_readers_of_flagged_memory_come_after_its_writers():
    """Without events for it: in every order, every element a task reads has been written."""
    tg = tasks(16, flagged=True)
    assert "h1" in tg.flagged and "l0.attention.partial" in tg.flagged and not {"logits", "l0.keys"} & tg.flagged
    assert len(tg.events) < len(tasks(16).events) / 2
    for seed in range(5):
        place = {t: i for i, t in enumerate(task_order(tg, "random", seed))}
        for writers, readers in flagged_edges(tg):
            assert max(place[w] for w in writers) < min(place[r] for r in readers)
    loose = dataclasses.replace(tg, flagged=frozenset())  # neither events nor flags
    bad, good = (allocate(tg.buffers, tensors(), poison=True) for _ in range(2))
    run_tasks(loose, bad, "reversed")
    run_tasks(tg, good, "reversed")
    assert not torch.equal(good["logits"], bad["logits"])


def test_flagged_memory_starts_as_the_sentinel_in_every_call():
    """A task that leaves out its write shows, also in the second call and without poison."""
    run = Executor(schedule(tasks(4, flagged=True), 4))
    assert run(tensors())["logits"].isfinite().all()
    last = max(t.id for t in run.schedule.tasks.tasks if any(a.buffer == "h2" for a in t.writes))
    run._bodies[last] = lambda memory: None
    assert run(tensors())["logits"].isnan().any()


def test_a_deadlock_through_flagged_memory_is_an_error():
    tg = tasks(2, flagged=True)
    writer = next(t for t in tg.tasks if any(a.buffer == "h0" for a in t.writes))
    reader = next(t for t in tg.tasks if any(a.buffer == "h0" for a in t.reads))
    cycle = dataclasses.replace(tg, events=(*tg.events, Event(len(tg.events), (reader.id,), (writer.id,))))
    with pytest.raises(VerificationError, match=r"T3: .*never become ready; .*embed.* waits for .*qkv"):
        task_order(cycle)
    s = schedule(tg, 1)
    backwards = dataclasses.replace(s, queues=(tuple(reversed(s.queues[0])),))
    with pytest.raises(VerificationError, match="S2: deadlock"):
        Executor(backwards)


def test_deadlocks_are_errors_that_name_the_tasks():
    tg = tasks(2)
    s = schedule(tg, 2)
    backwards = dataclasses.replace(s, queues=tuple(tuple(reversed(q)) for q in s.queues))
    with pytest.raises(VerificationError, match=r"S2: deadlock: 2 workers wait; worker 0: .*waits for"):
        Executor(backwards)
    for order in ("program", "random"):
        with pytest.raises(VerificationError, match="S2"):
            interleave(backwards, order)
    last = tg.tasks[-1].id
    cycle = dataclasses.replace(tg, events=(*tg.events, Event(len(tg.events), (last,), (0,))))
    with pytest.raises(VerificationError, match="T3: .*never become ready"):
        task_order(cycle)


def test_tensors_of_another_layout_are_refused():
    run = Executor(schedule(tasks(2), 2))
    good = tensors()
    for name, wrong, text in [
        ("ids", torch.zeros(T, dtype=torch.int32), "dtype"),
        ("head", torch.zeros(31, K, dtype=torch.bfloat16), "shape"),
        ("mask", torch.ones(KEYS, T, dtype=torch.bool).T, "strides"),
    ]:
        with pytest.raises(MpkError, match=f"tensor of {name} has {text}"):
            run({**good, name: wrong})
    with pytest.raises(MpkError, match="no tensor for ids"):
        run({k: v for k, v in good.items() if k != "ids"})
    with pytest.raises(MpkError, match="no tensor for head"):
        run({k: v for k, v in good.items() if k != "head"})


def test_a_replaced_parameter_is_used():
    run, caller = Executor(schedule(tasks(2), 2)), tensors()
    before = run({k: v.clone() for k, v in caller.items()})["logits"]
    caller["head"] = caller["head"] * 2
    assert torch.equal(run(caller)["logits"], before * 2)
