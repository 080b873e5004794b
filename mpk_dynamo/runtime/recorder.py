"""Profile records of launches: device memory that a kernel writes its clocks to, and their way to the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .. import abi
from .launch import Executable


class Recorder:
    """Records of single steps of an Executable."""

    def __init__(self, executable: Executable) -> None:
        schedule = executable.program.schedule
        self.executable = executable
        self._memory = executable.device.zeros((schedule.workers + len(schedule.tasks.tasks)) * _RECORD.itemsize)

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
        return self._memory.cpu().numpy().view(_RECORD)


_RECORD = abi.PROFILE.dtype
