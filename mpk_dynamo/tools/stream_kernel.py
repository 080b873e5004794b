"""A Triton kernel that only reads. Its own module: Triton wants the source of a kernel in a file."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _read(source, sink, elements: tl.constexpr, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * elements
    total = tl.zeros((block,), dtype=tl.int32)
    for offset in range(0, elements, block):
        total += tl.load(source + start + offset + tl.arange(0, block), eviction_policy="evict_first")
    # a store that practically never happens keeps the loads alive
    result = tl.sum(total)
    tl.store(sink, result, mask=result == 0x12345678)


def launch_reader(data: torch.Tensor, elements: int, block: int = 4096) -> None:
    """Read all of `data` (int32, contiguous) but a remainder below `elements`."""
    sink = torch.empty(1, dtype=torch.int32, device=data.device)
    _read[(data.numel() // elements,)](data, sink, elements, block, num_warps=8)
