"""What goes wrong on the device ends within the timeout, is named in the model's words, and leaves the process well."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_forms import SAMPLES
from harness import DEVICE, Step, emit, gpu, kernel_only, lower, on_device, target
from small_models import VOCABULARY, empty_cache, make, token_ids, walk

from mpk_dynamo.errors import DeviceFault
from mpk_dynamo.ir.expr import index, load, op, var
from mpk_dynamo.ir.graph import Graph, Output, RowMap
from mpk_dynamo.ir.program import Program
from mpk_dynamo.ir.tasks import task_name
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.ops.evaluate import TORCH_DTYPE
from mpk_dynamo.ops.sampling import sample_tensors
from mpk_dynamo.runtime import build
from mpk_dynamo.verify.tables import decode

pytestmark = [*gpu, kernel_only]
SIZE, WORKERS = 4096, 4
TIMEOUT_NS = 300_000_000


def two_steps() -> Graph:
    """y = 2 * x; out = y + reversed(y). Integers in scratch memory: only events can order them."""
    i = var("i0", SIZE)
    buffers = {
        "x": buffer("x", DType.I64, (SIZE,), BufferKind.INPUT),
        "doubled": buffer("doubled", DType.I64, (SIZE,), BufferKind.SCRATCH),
        "out": buffer("out", DType.I64, (SIZE,), BufferKind.OUTPUT),
    }
    value = load("x", (i,), DType.I64)
    y, back = (load("doubled", (at,), DType.I64) for at in (i, op("sub", index(SIZE - 1), i)))
    nodes = (
        RowMap("double", (i,), op("add", value, value), "doubled", (i,), "model.first"),
        RowMap("reverse", (i,), op("add", y, back), "out", (i,), "model.second"),
    )
    return Graph(nodes, buffers, (Output("out"),), ("by hand",))


@pytest.fixture(scope="module")
def program() -> Program:
    return emit(lower(two_steps(), WORKERS))


@pytest.fixture
def runs(program: Program, cache_dir: Path) -> Callable[..., Step]:
    """A program (by default the one above) as a Step with a short timeout."""

    def make_step(changed: Program | None = None) -> Step:
        changed = changed or program
        return Step(changed.schedule, build(changed, target(), cache_dir=cache_dir), changed, timeout_ns=TIMEOUT_NS)

    return make_step


def works(step: Step) -> None:
    x = torch.randint(0, 100, (SIZE,), device=DEVICE)
    for _ in range(3):
        assert torch.equal(step({"x": x})["out"], 2 * x + 2 * x.flip(0))


def with_table(program: Program, name: str, change: Callable[[Any], None]) -> Program:
    table = decode(program)[name].copy()
    change(table)
    return dataclasses.replace(program, tables={**program.tables, name: table.tobytes()})


def fault_of(step: Step, tensors: dict[str, torch.Tensor]) -> DeviceFault:
    """Runs a step that must give up, soon, and stay given up."""
    start = time.perf_counter()
    with pytest.raises(DeviceFault) as found:
        step(tensors)
    assert time.perf_counter() - start < 10 * TIMEOUT_NS / 1e9
    with pytest.raises(DeviceFault):
        step(tensors)
    return found.value


def an_event(program: Program) -> Any:
    event = next(e for e in program.schedule.tasks.events if e.producers and e.waiters)
    assert program.schedule.tasks.tasks[event.waiters[0]].node == 1 and len(event.producers) == 2
    return event


@pytest.mark.parametrize("how", ["a signal is lost", "a wait asks for too much"])
def test_an_event_that_never_comes(how: str, program: Program, runs: Callable[..., Step]) -> None:
    tg, event = program.schedule.tasks, an_event(program)
    slot, needed, seen = program.schedule.slots[event.id], len(event.producers), len(event.producers)
    tables = decode(program)
    if how == "a signal is lost":
        seen -= 1

        def lose(tasks: Any) -> None:
            (row,) = [k for k, t in enumerate(tasks) if t["id"] == event.producers[-1]]
            at, count = tasks[row]["signals"], tasks[row]["signal_count"]
            assert tables["signals"]["slot"][at : at + count].tolist() == [slot]
            tasks[row]["signal_count"] = 0

        broken = with_table(program, "tasks", lose)
    else:
        needed += 1

        def ask(waits: Any) -> None:
            waits["count"][waits["slot"] == slot] += 1

        broken = with_table(program, "waits", ask)
    fault = fault_of(runs(broken), {"x": torch.zeros(SIZE, dtype=torch.int64, device=DEVICE)})
    assert fault.origin == "model.second" and "timeout_s" in fault.remedy
    assert any(task_name(tg, tg.tasks[t]) in fault.message for t in event.waiters), fault.message
    assert f"event {event.id} in slot {slot}" in fault.message and "model.first#double" in fault.message
    assert f"needed {needed}, seen {seen} (1 signals missing)" in fault.message
    works(runs())


def test_a_program_that_is_whole_works(runs: Callable[..., Step]) -> None:
    works(runs())


@pytest.mark.parametrize("position", [45, 1000, -1])
def test_a_full_cache(position: int, runs: Callable[..., Step]) -> None:
    node, graph = SAMPLES["attention-1-attention"]
    assert node.append is not None and node.s.size == 45
    step = runs(emit(lower(graph, 7)))
    tensors = on_device(sample_tensors(node, graph, 0))
    tensors["position"].fill_(position)
    kept = {n: tensors[n].clone() for n in ("keys", "values")}
    fault = fault_of(step, tensors)
    assert f"the cache is full?): index {position}, size 45" in fault.message and "max_cache_len" in fault.remedy
    assert all(torch.equal(tensors[n], kept[n]) for n in kept), "a row was written"
    works(runs())


@pytest.mark.parametrize("token", [50, 1 << 30, -1])
def test_a_token_outside_the_vocabulary(token: int, runs: Callable[..., Step]) -> None:
    node, graph = SAMPLES["row_map-3-gather"]
    assert graph.buffers["table"].shape[0] == 50
    step = runs(emit(lower(graph, 7)))
    tensors = on_device(sample_tensors(node, graph, 0))
    tensors["ids"][1, 2] = token
    fault = fault_of(step, tensors)
    assert f"an index is outside its tensor: index {token}, size 50" in fault.message and "token ids" in fault.remedy
    works(runs())


@pytest.mark.usefixtures("fresh_backend")
@pytest.mark.parametrize("what", ["cache", "token"])
def test_faults_of_a_whole_model(what: str) -> None:
    """The step after the one that failed raises, naming the cause; a model compiled anew works."""
    torch._dynamo.reset()
    model, capacity = make("qwen3"), 8
    tokens, cache = token_ids(1, capacity + 1), empty_cache(model, 1, capacity)
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options={"fallback": "error", "timeout_s": 0.3})
    walk(compiled, cache, tokens[:, : capacity - (what == "token")])
    if what == "token":
        tokens[:, -2] = VOCABULARY
    with pytest.raises(Exception) as found:
        for _ in range(2):
            walk(compiled, cache, tokens[:, -2:-1] if what == "token" else tokens[:, -1:])
            torch.cuda.synchronize()
    assert isinstance(found.value, DeviceFault), repr(found.value)
    text = str(found.value)
    if what == "cache":
        assert "cache is full" in text and f"index {capacity}, size {capacity}" in text and "layers.0" in text
    else:
        assert f"index {VOCABULARY}, size {VOCABULARY}" in text and "embed_tokens" in text
    torch._dynamo.reset()
    again = torch.compile(model, backend="mpk", fullgraph=True, options={"fallback": "error"})
    tokens = token_ids(1, capacity)
    ours, eager = (walk(f, empty_cache(model, 1, capacity), tokens) for f in (again, model))
    assert (ours - eager).norm() <= 0.05 * eager.norm()


class Replayed:
    """A step in a CUDA graph: `launches` of them per replay, on the same tensors."""

    def __init__(self, step: Step, tensors: dict[str, torch.Tensor], launches: int = 1) -> None:
        self.step, self.tensors = step, tensors
        outputs = [b for b in step.buffers.values() if b.kind is BufferKind.OUTPUT]
        self.out = {b.storage: torch.empty(b.shape, dtype=TORCH_DTYPE[b.dtype], device=DEVICE) for b in outputs}
        everything = {**tensors, **self.out}
        pointers = [everything[name].data_ptr() for name in step.program.bindings]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            for _ in range(launches):
                step.executable.launch(pointers)

    def __call__(self) -> None:
        """Returns within the bound, whatever happens on the device; a fault is not asked for."""
        start = time.perf_counter()
        self.graph.replay()
        torch.cuda.synchronize()
        assert time.perf_counter() - start < 10 * TIMEOUT_NS / 1e9


def test_a_graph_is_replayed_after_the_fault_of_another(program: Program, runs: Callable[..., Step]) -> None:
    slot = program.schedule.slots[an_event(program).id]

    def ask(waits: Any) -> None:
        waits["count"][waits["slot"] == slot] += 1

    x = torch.randint(0, 100, (SIZE,), device=DEVICE)
    good, bad = Replayed(runs(), {"x": x}, 3), Replayed(runs(with_table(program, "waits", ask)), {"x": x}, 3)
    for _ in range(2):
        bad()  # the first launch of it gives up after the bound, the others at once
        with pytest.raises(DeviceFault, match="needed 3, seen 2"):
            bad.step.executable.check_fault()
        x.copy_(torch.randint(0, 100, (SIZE,), device=DEVICE))
        good()
        good.step.executable.check_fault()
        assert torch.equal(good.out["out"], 2 * x + 2 * x.flip(0))


def test_a_graph_goes_on_after_a_fault_of_its_own(runs: Callable[..., Step]) -> None:
    """A replay begins with a clean control block. The record of the fault stays, and with it the exception."""
    node, graph = SAMPLES["row_map-3-gather"]
    step = runs(emit(lower(graph, 7)))
    tensors = on_device(sample_tensors(node, graph, 0))
    replayed = Replayed(step, tensors)
    replayed()
    step.executable.check_fault()
    wanted = {name: t.clone() for name, t in replayed.out.items()}
    kept = tensors["ids"][1, 2].item()
    tensors["ids"][1, 2] = 50
    for _ in range(2):
        replayed()
        with pytest.raises(DeviceFault, match="index 50, size 50"):
            step.executable.check_fault()
    tensors["ids"][1, 2] = kept
    for t in replayed.out.values():
        t.zero_()
    replayed()
    assert all(torch.equal(replayed.out[name], t) for name, t in wanted.items())
    with pytest.raises(DeviceFault, match="index 50, size 50"):
        step(tensors)
