"""Program: what a launch needs. Code as text, everything else as tables; no address in either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .schedule import Schedule


@dataclass(frozen=True)
class Call:
    """How the tasks of one node and kind use a body. opcode: its place in Program.kinds. operands: buffers in the order
    in which the body's text numbers them. arguments: values of Task.arg by place, besides the tile. copy_bytes, tiled:
    of the loader's copies that the body expects; 0 where it reads no ring."""

    opcode: int
    operands: tuple[str, ...]
    arguments: Mapping[int, int] = field(default_factory=dict)
    copy_bytes: int = 0
    tiled: int = 0


@dataclass(frozen=True)
class Program:
    """source: the translation unit for NVRTC. kinds[opcode]: name of the task body it selects.
    tables: packed little-endian arrays by name (see abi.py). bindings: storages in the order of the launch's
    pointer array: caller's tensors and outputs. threads: per worker (CTA). shared_bytes: dynamic shared memory.
    calls: what each (node, task kind) expects of the tables. flight: ring slots that a worker's loader should have
    under way. profiled: it can record the clocks of its tasks."""

    schedule: Schedule
    source: str
    kinds: tuple[str, ...]
    tables: dict[str, bytes]
    bindings: tuple[str, ...]
    threads: int
    shared_bytes: int
    target: str
    calls: Mapping[tuple[int, str], Call] = field(default_factory=dict)
    flight: int = 4
    profiled: bool = False
