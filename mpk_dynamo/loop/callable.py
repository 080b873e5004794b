"""The callable of a loop: arguments of a decode step's graph, the state of a generation, and how many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import MpkError
from .state import LoopState, Sampling

Run = Callable[[tuple[Any, ...], int, torch.Tensor], None]
"""(arguments, steps, done): run up to `steps` steps, none after one that set `done`."""


class Loop:
    """`loop(args, state, steps)` runs up to `steps` steps, fewer when all sequences finish, and returns how many were
    run, when the device is done with them. `args`: of the graph that was captured; what the loop feeds is updated in
    place.

    `storages`: those of the state that follow `args` in what `run` gets. `check`: called after each launch; raises
    what the device reported. Raises MpkError for a state that the program was not made for, or that has no room.
    """

    def __init__(
        self,
        run: Run,
        storages: Sequence[str],
        batch: int,
        sampling: Sampling,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._storages, self._check = run, tuple(storages), check
        self._batch, self._stages = batch, sampling.stages

    def __call__(self, args: Sequence[Any], state: LoopState, steps: int) -> int:
        if state.finished.shape[0] != self._batch or state.sampling.stages != self._stages:
            found = f"{state.finished.shape[0]} sequences with stages {sorted(state.sampling.stages)}"
            raise MpkError(
                f"a state of {found}, the loop was compiled for {self._batch} with {sorted(self._stages)}",
                remedy="compile a loop for these",
            )
        before, done = state.known or state.read()
        if done or steps <= 0:
            return 0
        if before + steps > state.max_steps:
            raise MpkError(
                f"{steps} steps after {before}, but the state has room for {state.max_steps}",
                remedy="make the state with more max_steps",
            )
        held = state.storages
        state.known = None
        self._run((*args, *(held[name] for name in self._storages)), steps, state.done)
        after, _ = state.read()
        self._check()
        return after - before


def host_loop(step: Callable[..., Any]) -> Run:
    """Steps one by one from the host."""

    def run(args: tuple[Any, ...], steps: int, done: torch.Tensor) -> None:
        for _ in range(steps):
            step(*args)
            if done:
                return

    return run
