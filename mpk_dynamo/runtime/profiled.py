"""ProfiledCallable: a DeviceCallable of which a few calls are recorded."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .. import abi
from ..errors import ProfileError
from ..passes.schedule.timeline import Timeline
from ..profiler import decode
from .callable import DeviceCallable
from .launch import Executable


class Recorder:
    """Memory for the records of an Executable's launches."""

    def __init__(self, executable: Executable) -> None:
        if not executable.program.profiled:
            raise ProfileError("the kernel was built without the code that records clocks: emit it as profiled")
        self.executable, self._dtype = executable, abi.PROFILE.dtype
        schedule = executable.program.schedule
        records = schedule.workers + len(schedule.tasks.tasks)
        self._memory = executable.device.zeros(records * self._dtype.itemsize)

    @contextmanager
    def on(self) -> Iterator[None]:
        """`with recorder.on():` records the launches of the block; of several, the last one's clocks stay."""
        self._memory.zero_()
        self.executable.profile(self._memory.data_ptr())
        try:
            yield
        finally:
            self.executable.profile(0)

    def read(self) -> np.ndarray:
        """What the last recorded launch wrote, as abi.PROFILE records: one per worker, then one per task id. Waits
        for it."""
        return self._memory.cpu().numpy().view(self._dtype)

    def timeline(self) -> Timeline:
        """The last recorded launch. Raises ProfileError when there was none."""
        return decode(self.read(), self.executable.program.schedule)


class ProfiledCallable:
    """The same results as `inner`. Records `count` calls from the `first`-th on (the first call is 1), each waited for,
    and hands the one of median makespan to `observe`. Calls while a CUDA graph is captured are not counted."""

    def __init__(
        self, inner: DeviceCallable, first: int, count: int, observe: Callable[[Timeline], None]
    ) -> None:
        self.inner, self._observe = inner, observe
        self._skip, self._left = first - 1, count
        self._timelines: list[Timeline] = []
        self._recorder: Recorder | None = None

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return self.run(args)

    def run(self, args: tuple[Any, ...], steps: int = 1, done: torch.Tensor | None = None) -> tuple[Any, ...]:
        """As DeviceCallable.run. Launches of several steps are not recorded: a record has room for one."""
        device = self.inner.executable.device
        if not self._left or steps > 1 or device.capture_id(device.stream()):
            return self.inner.run(args, steps, done)
        if self._skip:
            self._skip -= 1
            return self.inner.run(args, steps, done)
        if self._recorder is None:
            self._recorder = Recorder(self.inner.executable)
        with self._recorder.on():
            results = self.inner.run(args, steps, done)
        self._timelines.append(self._recorder.timeline())
        self._left -= 1
        if not self._left:
            median = statistics.median_low([t.makespan for t in self._timelines])
            self._observe(next(t for t in self._timelines if t.makespan == median))
            self._timelines, self._recorder = [], None
        return results

    def check_fault(self) -> None:
        """As DeviceCallable.check_fault."""
        self.inner.check_fault()
