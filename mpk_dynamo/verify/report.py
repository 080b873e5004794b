"""What a verification covered, for reports."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

Work = TypeVar("Work", bound=Callable[..., Any])


def without_collector(work: Work) -> Work:
    """Run with the cyclic garbage collector paused: a compile makes hundreds of thousands of small objects and next
    to no cycles, and the collector would walk the whole program again and again (a quarter of the time)."""

    @wraps(work)
    def paused(*args: Any, **kwargs: Any) -> Any:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return work(*args, **kwargs)
        finally:
            if was_enabled:
                gc.enable()

    return paused  # type: ignore[return-value]


@dataclass
class Report:
    """Outcome of one verify_* call that found nothing wrong.

    stage: "graph", "tasks", "schedule" or "program". rules: rule -> what was proven, in words.
    counts: what was looked at (tasks, events, access pairs, ...). seconds: wall time.
    """

    stage: str
    rules: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    _start: float = field(default_factory=time.perf_counter, repr=False)

    def proved(self, **rules: str) -> None:
        self.rules.update(rules)

    def count(self, **counts: int) -> None:
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + int(value)

    def include(self, other: "Report") -> None:
        """Take over the rules and counts of a stage that this one repeats."""
        self.rules.update(other.rules)
        self.count(**other.counts)

    def done(self) -> "Report":
        self.seconds = time.perf_counter() - self._start
        return self

    def __str__(self) -> str:
        counted = ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in self.counts.items())
        return f"{self.stage}: {' '.join(self.rules)} hold ({counted}; {self.seconds:.2f} s)"
