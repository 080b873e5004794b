"""What one call of the backend did, kept for `reports()`, `explain` and the demo."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import MpkError


@dataclass
class Report:
    """One graph that Dynamo handed to the backend.

    outcome: "kernel", "reference", or "fallback to ..."; "" while compiling or after an error.
    bytes, flops: of one call, as the tasks declare them. launches: kernel launches of one call.
    seconds: wall time per stage, in the order in which they ran.
    programs: of a graph that was split, one report for each piece that became a program, whose numbers are summed up
    here. outside: of such a graph, nodes that run outside of them. left_out: why -> how many for that reason; others
    are in pieces that are too small to be worth a launch: small, a line for each.
    """

    outcome: str = ""
    device: str = ""
    fx_nodes: int = 0  # call nodes of Dynamo's graph
    captured_nodes: int = 0  # nodes of the unfused Graph
    graph_nodes: int = 0  # after fusion
    node_kinds: dict[str, int] = field(default_factory=dict)
    tasks: int = 0
    task_kinds: dict[str, int] = field(default_factory=dict)
    events: int = 0
    flagged: int = 0  # buffers whose readers poll the data instead of waiting for an event
    edges: int = 0  # producer-to-event and event-to-waiter links
    workers: int = 0
    arena_bytes: int = 0
    bytes: int = 0
    flops: int = 0
    launches: int = 0
    calls: int = 0  # so far; counted on the reference executor alone, where it costs nothing
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""  # why a fallback happened
    origin: str = ""  # where in the model
    remedies: list[str] = field(default_factory=list)  # what to do about it, or about what is left out
    recompile: int = 0  # the how many-eth time that Dynamo compiles this code anew
    guard: str = ""  # what was other than in the calls that it was compiled for before
    programs: list["Report"] = field(default_factory=list)
    outside: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    small: list[str] = field(default_factory=list)
    target: str = ""
    resources: str = ""  # registers, spills and shared memory, as the runtime reports them
    dump: str = ""
    current: str = ""  # the stage at work

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds[name]`."""
        start, around = time.perf_counter(), self.current
        self.current = name
        try:
            yield
        finally:
            self.current = around
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def blame(self, error: MpkError) -> None:
        """Why there is no program, where, and what to do."""
        self.reason, self.origin, self.remedies = error.message, error.origin, [error.remedy] if error.remedy else []

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def summary(self) -> str:
        """One line."""
        todo = f" -> {'; '.join(self.remedies)}" if self.remedies else ""
        again = f"; recompile {self.recompile} of this code by Dynamo, whose guard failed: {self.guard}"
        again = again if self.recompile else ""
        if self.reason:
            where = f" at {self.origin}" if self.origin else ""
            return f"{self.outcome or 'not compiled'}: {self.reason}{where}{todo}{again}"
        split = f"in {len(self.programs)} pieces, " if self.programs else ""
        outside = f"; {self.outside} nodes outside: " if self.left_out else ""
        outside += ", ".join(f"{why} ({n})" for why, n in self.left_out.items())
        return (
            f"{self.outcome or 'lowered'}: {split}{self.fx_nodes} graph nodes in, {self.graph_nodes} after fusion, "
            f"{self.tasks} tasks, {self.events} events, {self.flagged} flagged buffers, {self.workers} workers, "
            f"{self.bytes / 1e6:.1f} MB per call, compiled in {self.total_seconds:.1f} s{outside}{todo}{again}"
        )

    def detail(self) -> str:
        """What the summary leaves out, in a few lines."""
        nodes = ", ".join(f"{n} {kind}" for kind, n in self.node_kinds.items())
        tasks = ", ".join(f"{n} {kind}" for kind, n in self.task_kinds.items())
        seconds = ", ".join(f"{stage} {s:.2f}" for stage, s in self.seconds.items())
        lines = [f"nodes: {nodes}", f"tasks: {tasks}", f"arena: {self.arena_bytes} bytes", f"seconds: {seconds}"]
        lines += [f"kernel: {self.target}, {self.resources}"] if self.resources else []
        lines += [f"dump: {self.dump}"] if self.dump else []
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


_REPORTS: deque[Report] = deque(maxlen=256)


def record(report: Report) -> Report:
    _REPORTS.append(report)
    return report


def reports() -> list[Report]:
    """Reports of this process, oldest first (the last 256)."""
    return list(_REPORTS)


def clear_reports() -> None:
    _REPORTS.clear()
