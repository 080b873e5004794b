"""The fastest streaming read this GPU gives in this run: the floor of every decode step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

BYTES = 3 << 30


@dataclass(frozen=True)
class Ceiling:
    """bandwidth: bytes per second. method: which of the candidates was fastest."""

    bandwidth: float
    method: str
    all: dict[str, float]


def measure(device: torch.device, size: int = BYTES, repeats: int = 7) -> Ceiling:
    """Read `size` bytes of random data with each candidate; the median of `repeats` runs, the best candidate."""
    size = min(size, torch.cuda.mem_get_info(device)[0] // 2)
    data = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    candidates: dict[str, Callable[[], object]] = {"torch.sum over int32": lambda: data.sum(dtype=torch.int32)}
    halves = data.view(torch.bfloat16)
    candidates["torch.amax over bf16"] = lambda: halves.amax()
    for rows in (16384, 65536):
        kernel = _triton_reader(data, rows)
        if kernel:
            candidates[f"Triton streaming read, {rows} elements per program"] = kernel
    found = {name: data.numel() * 4 / _median_seconds(run, repeats) for name, run in candidates.items()}
    best = max(found, key=found.__getitem__)
    return Ceiling(found[best], best, found)


def _median_seconds(run: Callable[[], object], repeats: int) -> float:
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def _triton_reader(data: torch.Tensor, elements: int) -> Callable[[], object] | None:
    try:
        from .stream_kernel import launch_reader
    except ImportError:
        return None
    return lambda: launch_reader(data, elements)
