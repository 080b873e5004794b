"""Times on the device: back-to-back decode steps by CUDA events, launches by the profiler, host time by the clock."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OptionError
from .decoder import Decoder

Forward = Callable[..., Any]


def check_alternatives(names: Collection[str], known: Collection[str]) -> None:
    """Raises OptionError for the first name that is no known alternative to time."""
    unknown = [n for n in names if n not in known]
    if unknown:
        raise OptionError(f"unknown alternative {unknown[0]!r}", remedy=f"choose from {', '.join(known)}")


@dataclass(frozen=True)
class StepTimes:
    """step_ms: median over repeats of the mean of back-to-back steps, as a caller sees it. spread_ms: fastest and
    slowest repeat. queued_ms: the same when the host is ahead of the device all the time (None: it could not be).
    host_us: median time until a call returns. kernels, copies: device activities of one step."""

    step_ms: float
    spread_ms: tuple[float, float]
    queued_ms: float | None
    host_us: float
    kernels: int
    copies: int


def measure(decoder: Decoder, forward: Forward, repeats: int) -> StepTimes:
    """Time `forward` over the decoder's steps. The cache is rewound before each repeat, so it never fills."""
    with torch.no_grad():
        for _ in range(2):  # beyond the first calls, which record CUDA graphs
            run(decoder, forward)
        spans = [run(decoder, forward) for _ in range(repeats)]
        queued = [run(decoder, forward, ahead=True) for _ in range(3)]
        host = _host_us(decoder, forward)
        kernels, copies = _activities(decoder, forward)
    hidden = [ms for ms, ready in queued if ready]
    steps = [ms for ms, _ in spans]
    return StepTimes(
        statistics.median(steps),
        (min(steps), max(steps)),
        statistics.median(hidden) if hidden else None,
        host,
        kernels,
        copies,
    )


def run(decoder: Decoder, forward: Forward, ahead: bool = False) -> tuple[float, bool]:
    """Mean ms per step of one pass. `ahead`: the device sleeps until the host has enqueued all steps; the second
    value says whether it really slept that long."""
    decoder.rewind()
    torch.cuda.synchronize()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if ahead:
        torch.cuda._sleep(400_000_000)  # cycles: about 0.2 s
    start.record()
    for step in decoder.steps:
        forward(**step)
    hidden = not start.query()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / len(decoder.steps), hidden


def _host_us(decoder: Decoder, forward: Forward) -> float:
    decoder.rewind()
    times = []
    for step in decoder.steps:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        forward(**step)
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def _activities(decoder: Decoder, forward: Forward) -> tuple[int, int]:
    from torch.profiler import ProfilerActivity, profile

    decoder.rewind()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        forward(**decoder.steps[0])
        torch.cuda.synchronize()
    names = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum(n.startswith(("Memcpy", "Memset")) for n in names)
    return len(names) - copies, copies


@contextmanager
def device_memory() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many bytes the device has less free than at the start, garbage apart."""
    before = _free()
    yield lambda: before - _free()


def _free() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
