"""Memory of a process over time: what torch has allocated, what the device has in use, what the host holds."""

from __future__ import annotations

import torch

MB = 1e6
DEVICE_SLACK_MB = 32.0
"""Growth of the device's own count that is no leak: contexts and pools grow in steps, on first use."""


class Memory:
    """allocated_mb: torch's tensors on the device. device_mb: in use on the whole device, after torch has given back
    what it only keeps; of all processes. host_mb: resident set of this process. Each from look to look."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.allocated_mb: list[float] = []
        self.device_mb: list[float] = []
        self.host_mb: list[float] = []

    def look(self) -> None:
        self.host_mb.append(_resident_mb())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self._device)
            self.allocated_mb.append(torch.cuda.memory_allocated(self._device) / MB)
            self.device_mb.append((total - free) / MB)

    def grown(self, *, shared: bool) -> list[str]:
        """What has grown since the first look, in words. shared: other processes use the device, whose count then
        says nothing. The host's is not judged: Python keeps what it has freed."""
        found = []
        if self.allocated_mb and self.allocated_mb[-1] > self.allocated_mb[0]:
            found.append(f"tensors on the device grew by {self.allocated_mb[-1] - self.allocated_mb[0]:.6f} MB")
        if self.device_mb and not shared and self.device_mb[-1] > self.device_mb[0] + DEVICE_SLACK_MB:
            grown = self.device_mb[-1] - self.device_mb[0]
            found.append(f"memory in use on the device grew by {grown:.1f} MB (--shared if others use it)")
        return found

    def line(self) -> str:
        seen = [f"{n} {v[-1]:.1f} MB" for n, v in self._series().items() if v]
        return ", ".join(seen) or "memory not seen yet"

    def figures(self) -> dict[str, list[float]]:
        return {name: [round(v, 3) for v in values] for name, values in self._series().items()}

    def _series(self) -> dict[str, list[float]]:
        return {"tensors": self.allocated_mb, "device": self.device_mb, "host": self.host_mb}


def _resident_mb() -> float:
    """0 where the system has no /proc."""
    try:
        with open("/proc/self/status") as file:
            line = next(x for x in file if x.startswith("VmRSS:"))
    except OSError:
        return 0.0
    return int(line.split()[1]) * 1024 / MB
