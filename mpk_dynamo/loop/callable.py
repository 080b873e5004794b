"""The callable of a loop: arguments of a decode step's graph, the state of a generation, and how many steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import MpkError
from .state import LoopState, Sampling

Run = Callable[[tuple[Any, ...], int, torch.Tensor], None]
"""(arguments, steps, done): run up to `steps` steps, none after one that set `done`, be it of an earlier call."""


_PATIENT_S, _POLL_S = 1e-3, 5e-5
"""For so long a launch is asked all the time whether it is over, then after so many seconds each."""


class Launched:
    """What a generation has come to by a launch, for a host that goes on ahead of the device: made right after the
    launch, and `wait` waits for that launch alone, whatever was launched later.

    begun: time.perf_counter() when it was launched. first, columns: which of state.tokens the host wants to read:
    `tokens` is [B, columns] then, on the CPU, and right as far as the launch came. check: see Loop. ended: like begun,
    when `wait` was through.
    """

    def __init__(
        self, state: LoopState, begun: float, first: int = 0, columns: int = 0, check: Callable[[], None] = lambda: None
    ) -> None:
        on_device = state.counters.is_cuda
        self.begun, self.ended, self._check = begun, begun, check

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
            return copy.copy_(tensor, non_blocking=on_device)

        self._counters = copied(state.counters)
        self.tokens = copied(state.tokens[:, first : first + columns]) if columns else None
        self._event: torch.cuda.Event | None = None
        if on_device:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[int, bool]:
        """(tokens chosen, whether all sequences are finished)."""
        begin = time.perf_counter()
        while self._event is not None and not self._event.query():  # synchronize() would not let Ctrl-C in
            time.sleep(0 if time.perf_counter() - begin < _PATIENT_S else _POLL_S)
        self.ended = time.perf_counter()
        self._check()
        step, done, *_ = self._counters.tolist()
        return step, bool(done)


class Loop:
    """`loop(args, state, steps)` runs up to `steps` steps, fewer when all sequences finish, and returns how many were
    run, when the device is done with them. `args`: of the graph that was captured; what the loop feeds is updated in
    place. `start` does the same without waiting.

    `storages`: those of the state that follow `args` in what `run` gets. `check`: raises what the device reported of
    launches that are over. Raises MpkError for a state that the program was not made for, or that has no room.
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
        before, done = state.known or state.read()
        if done or steps <= 0:
            return 0
        self.start(args, state, steps)
        after, _ = state.read()
        self._check()
        return after - before

    def start(self, args: Sequence[Any], state: LoopState, steps: int, *, tokens: bool = False) -> Launched:
        """Launch up to `steps` steps behind what is under way; none run once all sequences are finished. tokens:
        whether the host wants to read theirs from the result."""
        if state.finished.shape[0] != self._batch or state.sampling.stages != self._stages:
            found = f"{state.finished.shape[0]} sequences with stages {sorted(state.sampling.stages)}"
            raise MpkError(
                f"a state of {found}, the loop was compiled for {self._batch} with {sorted(self._stages)}",
                remedy="compile a loop for these",
            )
        begun, first, held = time.perf_counter(), state.most, state.storages
        state.launching(steps)
        self._run((*args, *(held[name] for name in self._storages)), steps, state.done)
        return Launched(state, begun, first, steps if tokens else 0, self._check)


def host_loop(step: Callable[..., Any]) -> Run:
    """Steps one by one from the host."""

    def run(args: tuple[Any, ...], steps: int, done: torch.Tensor) -> None:
        for _ in range(steps):
            if done:
                return
            step(*args)

    return run
