"""Every operator keeps its contract, on its own samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mpk_dynamo.errors import VerificationError
from mpk_dynamo.ir.graph import Attention, writes
from mpk_dynamo.ir.region import Side
from mpk_dynamo.ops import OPERATORS, operator_of
from mpk_dynamo.ops.argmax import Argmax
from mpk_dynamo.ops.choice import Choice
from mpk_dynamo.ops.sampling import sample_tensors
from mpk_dynamo.passes.tasks import derive_events, tile
from mpk_dynamo.reference.guard import check_task
from mpk_dynamo.reference.memory import allocate
from mpk_dynamo.verify import verify_graph, verify_tasks

SAMPLES = [
    pytest.param(node, graph, id=f"{operator.name}-{i}-{node.name}")
    for operator in OPERATORS.values()
    for i, (node, graph) in enumerate(operator.samples())
]
WORKERS = (1, 4, 132)


def tiled(node, graph, workers):
    tiling = operator_of(node).tile(node, graph, workers)
    buffers = {**graph.buffers, **{b.name: b for b in tiling.buffers}}
    return tiling.tasks, buffers


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # one unit in the last place of the narrow types; sums in another order for the wide ones
    relative = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 2e-5)
    return {"rtol": relative, "atol": 2e-5 if dtype is torch.float32 else 1e-3 * (dtype is torch.bfloat16) + 1e-4}


def run_order(node, tasks, seed):
    """Random, but combining tasks follow the tasks whose partial results they read."""
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order, key=lambda i: combines(node, tasks[i]))


def combines(node, task):
    """Whether a task reads partial results: what tiling added is named after the node."""
    return any(a.buffer.startswith(f"{node.name}.") for a in task.reads)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("node, graph", SAMPLES)
def test_tiles_in_random_order_equal_the_oracle(node, graph, workers):
    operator = operator_of(node)
    tasks, buffers = tiled(node, graph, workers)
    for seed in range(2):
        got = allocate(buffers, sample_tensors(node, graph, seed), poison=True)
        want = allocate(buffers, sample_tensors(node, graph, seed), poison=True)
        for i in run_order(node, tasks, seed):
            operator.run(node, buffers, tasks[i].op, tasks[i].tile, got)
        operator.oracle(node, buffers, want)
        for name in writes(node):
            torch.testing.assert_close(got[name], want[name], **tolerance(got[name].dtype))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("node, graph", SAMPLES)
def test_tasks_touch_only_what_they_declare(node, graph, workers):
    tasks, buffers = tiled(node, graph, workers)
    memory = allocate(buffers, sample_tensors(node, graph, 3), poison=True)
    every = max(1, len(tasks) // 12)  # the guard copies all memory for each task
    for i, task in enumerate(tasks):
        if i % every in (0, every - 1):
            check_task(node, buffers, task, memory)
        else:
            operator_of(node).run(node, buffers, task.op, task.tile, memory)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("node, graph", SAMPLES)
def test_outputs_are_written_exactly_once(node, graph, workers):
    tasks, buffers = tiled(node, graph, workers)
    fresh = [b for b in buffers.values() if b.name in (*writes(node), *(a.buffer for t in tasks for a in t.writes))]
    for buffer in fresh:
        count = torch.zeros(buffer.shape, dtype=torch.int32)
        sides = set()
        for access in (a for t in tasks for a in t.writes if a.buffer == buffer.name):
            sides.add(access.side)
            if access.side is None:
                count[tuple(slice(*r) for r in access.box)] += 1
        if Side.AT in sides or buffer.name == "cache@1":  # a row at a position that only the device knows
            continue
        assert (count == 1).all(), f"{buffer.name}: {count.min()} to {count.max()} writes per element"


@pytest.mark.parametrize("workers", [1, 132])
@pytest.mark.parametrize("node, graph", SAMPLES)
def test_the_verifier_accepts(node, graph, workers):
    verify_graph(graph)
    verify_tasks(derive_events(tile(graph, workers)))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("node, graph", SAMPLES)
def test_costs_are_positive_and_shared_out(node, graph, workers):
    tasks, _ = tiled(node, graph, workers)
    main = [t for t in tasks if not combines(node, t)]
    assert all(t.bytes > 0 and t.flops >= 0 for t in tasks)
    apart = 1  # what a task never spans
    if isinstance(node, Attention):
        apart = node.b.size * node.g.size
    elif isinstance(node, Argmax | Choice):
        apart = graph.buffers[node.x].shape[0]
    assert len(main) <= max(workers, apart)


@pytest.mark.parametrize("node, graph", SAMPLES)
def test_the_guard_notices_a_missing_declaration(node, graph):
    """Without this the guard itself could be blind: each dropped access must be reported for some task."""
    tasks, buffers = tiled(node, graph, 4)
    memory = allocate(buffers, sample_tensors(node, graph, 5), poison=True)
    found = set()
    for task in tasks:
        for bare in (dataclasses.replace(task, reads=()), dataclasses.replace(task, writes=())):
            try:
                check_task(node, buffers, bare, copied(memory, buffers))
            except VerificationError as error:
                found.add(error.rule)
        operator_of(node).run(node, buffers, task.op, task.tile, memory)
    assert found == {"R1", "R2"} if any(t.reads for t in tasks) else {"R2"}


def copied(memory, buffers):
    """A copy of memory in which versions still share theirs."""
    storages = {buffers[n].storage: tensor for n, tensor in memory.items()}
    copies = {s: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for s, t in storages.items()}
    return {n: copies[buffers[n].storage] for n in memory}
