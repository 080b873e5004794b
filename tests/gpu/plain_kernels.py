"""Kernels of the tests' own, compiled with this package's headers, and launched as the runtime launches its kernel."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from harness import DEVICE, target

from mpk_dynamo.runtime import nvrtc
from mpk_dynamo.runtime.sources import include_dir


@cache
def cubin(source: str, kind: Any = None) -> bytes:
    """Of a translation unit that may include mpk/*.cuh, for a target (default: the present GPU)."""
    kind = kind or target()
    options, headers = nvrtc.compile_options(kind), nvrtc.default_headers()
    return nvrtc.compile_source(source, kind, options=options, headers=headers, folder=include_dir())[0]


@cache
def _loaded(source: str, name: str) -> Any:
    from mpk_dynamo.runtime.device import device

    return device(DEVICE.index or 0).load(cubin(source), name)


def launch(source: str, name: str, grid: int, threads: int, *arguments: int, shared_bytes: int = 0) -> None:
    """One cooperative launch on torch's current stream: all CTAs are resident at once. Arguments are 64-bit integers or
    addresses."""
    from mpk_dynamo.runtime.device import device

    kernel, here = _loaded(source, name), device(DEVICE.index or 0)
    assert kernel.co_resident(threads, shared_bytes) >= grid
    values = [ctypes.c_uint64(a % (1 << 64)) for a in arguments]
    pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
    kernel.launch(grid, threads, shared_bytes, here.stream_handle(here.stream()), ctypes.addressof(pointers))


HOLD = """
extern "C" __global__ void hold(unsigned long long ns) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < ns);
}
"""


def hold_sms(count: int, seconds: float) -> None:
    """Takes that many SMs for a while, by their shared memory, on torch's current stream."""
    shared = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    launch(HOLD, "hold", count, 32, int(seconds * 1e9), shared_bytes=shared)
