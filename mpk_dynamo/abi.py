"""Structs shared by host and device, declared once: `header()` is the C++ text, `dtype(...)` the numpy packer.

Every field is a little-endian 32- or 64-bit integer at its natural alignment, and no struct has padding, so that the
sizes the generated header asserts fix every offset: a drifted declaration does not compile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VERSION = 7

EVENT_STRIDE = 32
"""u32 words between event counters: one 128-byte line each, so that pollers of one event do not disturb another."""

CONTROL_EPOCH, CONTROL_DONE, CONTROL_ABORT, CONTROL_EVENTS = 0, 32, 64, 96
"""Word offsets in the control block: steps completed, workers done with one (monotonic), abort flag, first counter."""

MAX_OPERANDS = 32
"""Buffers one task body may refer to."""

MAX_WAITS = 16
"""Events one task may wait for."""

MAX_SEGMENTS = 16
"""Pieces of weight rows one linear task may span."""

MAX_BINDINGS = 3900
"""Pointers a launch can carry: kernel parameters are limited to 32,764 bytes."""


@dataclass(frozen=True)
class Struct:
    """name, and (field, type, count) with type one of u32, i32, u64."""

    name: str
    fields: tuple[tuple[str, str, int], ...]

    @property
    def dtype(self) -> np.dtype:
        code = {"u32": "<u4", "i32": "<i4", "u64": "<u8"}
        fields = [(f, code[t]) if n == 1 else (f, code[t], (n,)) for f, t, n in self.fields]
        aligned = np.dtype(fields, align=True)
        if aligned.itemsize != np.dtype(fields).itemsize:
            raise TypeError(f"{self.name} has padding")
        return aligned


TASK = Struct(
    "Task",
    (
        ("op", "u32", 1),  # index of the body in Program.kinds
        ("id", "u32", 1),  # task id, for faults and the timeline
        ("operands", "u32", 1),  # first entry in the operand table
        ("operand_count", "u32", 1),
        ("waits", "u32", 1),  # first entry in the wait table
        ("wait_count", "u32", 1),
        ("signals", "u32", 1),  # first entry in the signal table
        ("signal_count", "u32", 1),
        ("arg", "i32", 8),  # meaning by operator
    ),
)
WAIT = Struct("Wait", (("slot", "u32", 1), ("count", "u32", 1)))
SEGMENT = Struct("Segment", (("part", "u32", 1), ("row", "u32", 1), ("rows", "u32", 1), ("pad", "u32", 1)))
RUN = Struct(
    "Run",  # a sequence of bulk copies of the loader, see ring.cuh
    (
        ("base0", "u64", 1),  # reference, like an entry of the operand table
        ("base1", "u64", 1),  # second joint weight, or NO_REF
        ("rows", "u32", 1),
        ("row_bytes", "u32", 1),  # of the weight in memory
        ("copy", "u32", 1),  # bytes of one copy; divides row_bytes or is a multiple of it, unless tiled
        # 0: slots of `copy` contiguous bytes. Else rows of a slot, 1 to 8: `copy` bytes of each, then the next `copy`
        # bytes of all rows. Tiles of 8 rows are brought one joint weight after the other.
        ("tiled", "u32", 1),
    ),
)
QUEUE = Struct("Queue", (("task", "u32", 1), ("task_count", "u32", 1), ("run", "u32", 1), ("run_count", "u32", 1)))
SIGNAL = Struct("Signal", (("slot", "u32", 1),))
OPERAND = Struct("Operand", (("ref", "u64", 1),))

ARENA_REF = 1 << 63
"""Bit of a reference that says: byte offset into the arena. Otherwise bits 40..62 are a binding, 0..39 an offset."""

FLAGGED_REF = 1 << 62
"""Beside ARENA_REF: the buffer is flagged, odd epochs use the second set."""

NO_REF = (1 << 64) - 1

TABLES: tuple[tuple[str, Struct], ...] = (
    ("queues", QUEUE),
    ("tasks", TASK),
    ("waits", WAIT),
    ("signals", SIGNAL),
    ("operands", OPERAND),
    ("segments", SEGMENT),
    ("runs", RUN),
)
"""Program.tables holds exactly these, and Launch.tables their device addresses in this order."""

LAUNCH_FIXED = Struct(
    "LaunchFixed",
    (
        ("tables", "u64", len(TABLES)),
        ("arena", "u64", 1),  # device address of the scratch arena
        ("flagged", "u64", 1),  # device address of the first of the two sets of flagged buffers
        ("flagged_bytes", "u64", 1),  # of one set, a multiple of 16
        ("control", "u64", 1),  # device address of the control block, zeroed once, never reset
        ("fault", "u64", 1),  # device-visible address of the fault record in pinned host memory
        ("profile", "u64", 1),  # device address of the profile records, 0 when off
        ("timeout_ns", "u64", 1),  # bound of every wait
        ("flight", "u32", 1),  # ring slots a loader may have in flight
        ("flight_waiting", "u32", 1),  # the same while its worker waits for an event
        # device address of two i64, or 0: a step that leaves the first other than 0 is the last; then the launch sets
        # the second, and a launch that finds that set runs no step
        ("done", "u64", 1),
        ("steps", "u64", 1),  # at most so many steps, at least 1
    ),
)
"""The kernel's one parameter is `struct Launch { LaunchFixed; u64 pointers[BINDINGS]; }`: this, then 8 bytes for
each of Program.bindings (device addresses)."""

PROFILE = Struct("Profile", (("clock", "u64", 6),))
"""One record per worker, then one per task id. Worker: clock64 and globaltimer (ns) at its start, the same at its end.
Task: clock64 of its worker when it began to wait, when its events had come, when its inputs were there, when it had
read its last ring slot, when it had computed, when it had signalled (`Mark` in megakernel.cuh). A clock that a body
does not take stays as it was: zero the records before a launch."""

FAULT = Struct(
    "Fault",
    (
        ("state", "u32", 1),  # 0: none, 1: claimed, 2: written
        ("kind", "u32", 1),  # see FAULT_KINDS
        ("worker", "u32", 1),
        ("task", "u32", 1),  # task id
        ("slot", "u32", 1),  # event slot, or ring slot
        ("needed", "u32", 1),
        ("seen", "u32", 1),
        ("epoch", "u32", 1),
    ),
)

FAULT_KINDS = (
    "an event did not arrive",
    "a ring slot was never filled",
    "a ring slot was never released",
    "a cache position is outside the cache (the cache is full?)",
    "an index is outside its tensor",
    "a value was not published",
    "a step was not finished by all workers",
)
"""Text of Fault.kind. For kinds 3 and 4, `needed` is the size and `seen` the index."""

STRUCTS = (TASK, WAIT, SIGNAL, OPERAND, SEGMENT, RUN, QUEUE, LAUNCH_FIXED, PROFILE, FAULT)
KERNEL_NAME = "mpk_main"


def control_bytes(slots: int) -> int:
    """Size of the control block for that many event slots. Zero it once."""
    return 4 * (CONTROL_EVENTS + EVENT_STRIDE * max(slots, 1))


def header() -> str:
    """C++ declarations of everything above, as the text of mpk/abi.h."""
    lines = ["// Generated from mpk_dynamo/abi.py. Do not edit.", "#pragma once", "namespace mpk {"]
    lines += ["using u32 = unsigned int; using i32 = int; using u64 = unsigned long long;"]
    names = "VERSION EVENT_STRIDE CONTROL_EPOCH CONTROL_DONE CONTROL_ABORT CONTROL_EVENTS"
    for name in f"{names} MAX_OPERANDS MAX_WAITS MAX_SEGMENTS".split():
        lines.append(f"constexpr u32 {name} = {globals()[name]};")
    for name in ("ARENA_REF", "FLAGGED_REF", "NO_REF"):
        lines.append(f"constexpr u64 {name} = {globals()[name]}ull;")
    lines += [f"constexpr u32 TABLE_{name.upper()} = {i};" for i, (name, _) in enumerate(TABLES)]
    # words of a task, for the warp that reads one a word a lane
    lines += [f"constexpr u32 TASK_WORD_{f.upper()} = {TASK.dtype.fields[f][1] // 4};" for f in TASK.dtype.names or ()]
    for s in STRUCTS:
        body = " ".join(f"{t} {f}{f'[{n}]' if n > 1 else ''};" for f, t, n in s.fields)
        lines.append(f"struct {s.name} {{ {body} }};")
        lines.append(f'static_assert(sizeof({s.name}) == {s.dtype.itemsize}, "{s.name}: size");')
    return "\n".join([*lines, "}  // namespace mpk", ""])
