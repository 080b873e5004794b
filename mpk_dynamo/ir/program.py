"""Program: what a launch needs. Code as text, everything else as tables; no address in either."""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import Schedule


@dataclass(frozen=True)
class Program:
    """source: the translation unit for NVRTC. kinds[opcode]: name of the task body it selects.
    tables: packed little-endian arrays by name (see abi.py). bindings: storages in the order of the launch's
    pointer array: caller's tensors and outputs. threads: per worker (CTA). shared_bytes: dynamic shared memory."""

    schedule: Schedule
    source: str
    kinds: tuple[str, ...]
    tables: dict[str, bytes]
    bindings: tuple[str, ...]
    threads: int
    shared_bytes: int
    target: str
