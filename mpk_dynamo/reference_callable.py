"""The callable that torch.compile gets for CPU tensors: the reference executor behind the graph's own signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .ir.region import check_apart
from .ir.types import BufferKind
from .reference import Executor
from .report import Report

if TYPE_CHECKING:
    from .capture import Captured
    from .ir.schedule import Schedule


class ReferenceCallable:
    """Takes the graph's example inputs in their order and returns what the graph returns, as a tuple.

    The caller's tensors are read and, where the graph mutates them, written in place; where the graph hands one
    back, the same object is returned.
    """

    def __init__(self, captured: "Captured", schedule: "Schedule", report: Report) -> None:
        self._executor = Executor(schedule)
        self._arguments = tuple(captured.arguments.items())
        self._constants = captured.constants
        self._report = report
        graph = schedule.tasks.graph
        callers = [(position, graph.buffers[storage]) for storage, position in self._arguments]
        self._writes = any(b.kind is BufferKind.STATE for _, b in callers)
        self._callers = [(position, b.span_bytes, b.kind is BufferKind.STATE, b.name) for position, b in callers]
        self._outputs = tuple(
            (o.constant, graph.buffers[o.buffer].storage if o.buffer is not None else None) for o in graph.outputs
        )

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        tensors = {storage: args[position] for storage, position in self._arguments}
        if self._writes:
            starts = [(args[position].data_ptr(), *rest) for position, *rest in self._callers]
            check_apart((start, start + size, writes, name) for start, size, writes, name in starts)
        tensors.update(self._constants)
        results = {**tensors, **self._executor(tensors)}
        self._report.calls += 1
        return tuple(constant if storage is None else results[storage] for constant, storage in self._outputs)
