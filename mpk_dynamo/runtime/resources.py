"""What a compiled kernel costs per thread and per block, as ptxas reports it. Needs no GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .. import abi

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")


@dataclass(frozen=True)
class ResourceReport:
    """registers: per thread. spill_*: bytes per thread, summed over the kernel and the functions it calls.
    stack_bytes: per thread, the deepest call chain. static_shared_bytes: per block, without the dynamic part.
    constant_bytes: all banks that ptxas lists. spilling: names of the functions that spill."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    constant_bytes: int
    spilling: tuple[str, ...] = ()

    def __str__(self) -> str:
        spills = f"{self.spill_store_bytes}/{self.spill_load_bytes} bytes spilled (store/load)"
        where = f" in {', '.join(self.spilling)}" if self.spilling else ""
        return (
            f"{self.registers} registers, {spills}{where}, {self.stack_bytes} bytes of stack, "
            f"{self.static_shared_bytes} bytes of static shared memory"
        )


def parse_log(log: str, kernel: str = abi.KERNEL_NAME) -> ResourceReport:
    """The report of `kernel` from the text that `-Xptxas -v` prints. Raises ValueError when it is not there."""
    entry = name = ""
    used: tuple[int, str] | None = None
    frames: dict[str, tuple[int, int, int]] = {}
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry = match[1]
        elif match := _PROPERTIES.search(line):
            name = match[1]
        elif match := _FRAME.search(line):
            if entry in ("", kernel):  # functions are listed before or after the entry that calls them
                frames[name] = (int(match[1]), int(match[2]), int(match[3]))
        elif (match := _USED.search(line)) and entry == kernel:
            used = (int(match[1]), match[2])
    if used is None or kernel not in frames:
        raise ValueError(f"no resource usage of {kernel} in the ptxas log")
    registers, rest = used
    cumulative = _number(rest, r"(\d+) bytes cumulative stack size")
    return ResourceReport(
        registers=registers,
        spill_store_bytes=sum(f[1] for f in frames.values()),
        spill_load_bytes=sum(f[2] for f in frames.values()),
        stack_bytes=max(cumulative, frames[kernel][0]),
        static_shared_bytes=_number(rest, r"(\d+) bytes smem"),
        constant_bytes=sum(map(int, re.findall(r"(\d+) bytes cmem", rest))),
        spilling=tuple(sorted(n for n, f in frames.items() if f[1] or f[2])),
    )


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
