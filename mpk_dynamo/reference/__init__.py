"""The reference executor: what a task program means, runnable on any machine."""

from __future__ import annotations

from .executor import Executor, interleave, run_tasks, task_order
from .memory import allocate

__all__ = ["Executor", "allocate", "interleave", "run_tasks", "task_order"]
