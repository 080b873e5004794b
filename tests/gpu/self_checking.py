"""A program that keeps score of its own launches: one value read too early, too late or from the wrong launch changes
the sum that it leaves behind, however many launches follow.

x counts 0, 1, 2, 0, ... (three values, because flagged memory has two sets); `flags` = 2x goes from task to task as
flagged data, `plain` = 3x through events; `total` adds up both, read from the other end, so that most of what a task
reads another one wrote.
"""

from __future__ import annotations

from typing import Any

import torch
from harness import DEVICE, Step, lower

from mpk_dynamo.ir.expr import Expr, cast, const, index, load, op, var, where
from mpk_dynamo.ir.graph import Graph, Output, RowMap
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.ir.types import BufferKind, DType, buffer

SIZE = 1024
STATES, PERIOD = ("x", "total"), 3


def graph(size: int = SIZE) -> Graph:
    i = var("i0", size)
    back = op("sub", index(size - 1), i)
    x = load("x", (i,), DType.I64)
    after = op("add", x, index(1))

    def times(n: int) -> Expr:
        return op("mul", x, index(n))

    buffers = [buffer(n, DType.I64, (size,), BufferKind.STATE) for n in STATES]
    buffers += [buffer(f"{n}@1", DType.I64, (size,), BufferKind.STATE, storage=n) for n in STATES]
    buffers.append(buffer("flags", DType.F32, (size,), BufferKind.SCRATCH))
    buffers.append(buffer("plain", DType.I64, (size,), BufferKind.SCRATCH))
    both = op("add", cast(load("flags", (back,), DType.F32), DType.I64), load("plain", (back,), DType.I64))
    again = where(op("lt", after, const(PERIOD, DType.I64)), after, index(0))
    nodes = (
        RowMap("flag", (i,), cast(times(2), DType.F32), "flags", (i,), "counter.flag"),
        RowMap("triple", (i,), times(3), "plain", (i,), "counter.triple"),
        RowMap("advance", (i,), again, "x@1", (i,), "counter.advance"),
        RowMap("sum", (i,), op("add", load("total", (i,), DType.I64), both), "total@1", (i,), "counter.sum"),
    )
    return Graph(nodes, {b.name: b for b in buffers}, tuple(Output(f"{n}@1") for n in STATES), ("by hand",))


def schedule(workers: int) -> Schedule:
    made = lower(graph(), workers)
    assert made.tasks.flagged == {"flags"} and made.tasks.events, "both kinds of edges are wanted"
    return made


def tensors() -> dict[str, torch.Tensor]:
    start = torch.arange(SIZE, device=DEVICE)
    return {"x": start % PERIOD, "total": torch.zeros_like(start)}


def expected(launches: int) -> dict[str, torch.Tensor]:
    start = torch.arange(SIZE) % PERIOD
    total = torch.zeros(SIZE, dtype=torch.int64)
    for phase in range(PERIOD):
        times = (launches - phase + PERIOD - 1) // PERIOD
        total += times * 5 * ((start + phase) % PERIOD).flip(0)
    return {"x": (start + launches) % PERIOD, "total": total}


def assert_counted(given: dict[str, torch.Tensor], launches: int) -> None:
    for name, want in expected(launches).items():
        wrong = (given[name].cpu() != want).sum().item()
        assert not wrong, f"{wrong} of {SIZE} elements of {name} are wrong after {launches} launches"


def preset(step: Step, epoch: int) -> None:
    """As if that many launches had passed: every counter of the current stream's control block, before the first."""
    from mpk_dynamo import abi

    executable: Any = step.executable
    binding = executable._binding(executable.device.stream())
    _, control = binding._keep
    words = torch.zeros(control.numel() // 4, dtype=torch.int64)
    words[abi.CONTROL_EPOCH], words[abi.CONTROL_DONE] = epoch, epoch * step.schedule.workers
    for event, slot in zip(step.schedule.tasks.events, step.schedule.slots, strict=True):
        words[abi.CONTROL_EVENTS + slot * abi.EVENT_STRIDE] = epoch * len(event.producers)
    wrapped = (words % (1 << 32)).to(torch.uint32)
    control.copy_(wrapped.view(torch.uint8))
    torch.cuda.synchronize()
