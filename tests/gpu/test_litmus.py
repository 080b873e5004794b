"""Litmus tests of the memory model's edges between SMs, as the kernel makes them and weakened."""

from __future__ import annotations

from pathlib import Path

import handover
import plain_kernels
import pytest
import torch
from harness import DEVICE, gpu, kernel_only, target

pytestmark = [*gpu, kernel_only]
TEXT = (Path(__file__).resolve().parents[2] / "kernels_cuda/tests/litmus.cuh").read_text().replace("#pragma once", "")
ELEMENTS, THREADS, EVENT_ROUNDS, FLAG_ROUNDS = 1024, 256, 1000, 100


def source(name: str, parameters: str, call: str) -> str:
    return f'{TEXT}\nextern "C" __global__ void {name}({parameters}) {{ {call}; }}\n'


SOURCES = {
    **{
        f"event_{weak}": source(f"event_{weak}", "mpk::u32* data, mpk::u32* counters, mpk::u32* bad, mpk::u64 rounds",
                                f"mpk::message_by_event<mpk::{weak}>(data, counters, bad, rounds)")
        for weak in ("kNone", "kRelaxed", "kNoBarrier")
    },
    **{
        f"flag_{others}": source(f"flag_{others}", "float* flags, mpk::u32* plain, mpk::u32* bad, mpk::u64 rounds",
                                 f"mpk::message_by_flag<{others}>(flags, plain, bad, rounds)")
        for others in ("false", "true")
    },
}  # fmt: skip


def bad(name: str) -> int:
    """What readers saw that they should not have."""
    grid = target().sm_count // 2 * 2
    pairs = grid // 2
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    if name.startswith("event"):
        rounds = EVENT_ROUNDS
        first = torch.zeros(pairs * ELEMENTS, dtype=torch.int32, device=DEVICE)
        second = torch.zeros(pairs * 64, dtype=torch.int32, device=DEVICE)
    else:
        rounds = FLAG_ROUNDS
        first = torch.full((pairs * rounds * ELEMENTS,), -1, dtype=torch.int32, device=DEVICE)  # sentinels
        second = torch.zeros_like(first)
    torch.cuda.synchronize()
    arguments = [t.data_ptr() for t in (first, second, count)]
    plain_kernels.launch(SOURCES[name], name, grid, THREADS, *arguments, rounds)
    torch.cuda.synchronize()
    return count.item()


@pytest.mark.parametrize("name", ["event_kNone", "flag_false"])
def test_an_edge_of_the_kernel_holds(name: str) -> None:
    assert [bad(name) for _ in range(5)] == [0] * 5


@pytest.mark.parametrize("name", ["event_kRelaxed", "event_kNoBarrier", "flag_true"])
def test_a_weakened_edge_shows(name: str) -> None:
    """Hardware need not show what it may do: then there is nothing to see."""
    seen = [bad(name) for _ in range(5)]
    print(f"{name}: {seen} wrong values")
    if not any(seen):
        pytest.skip(f"{target().name} does not show what {name} allows")


@pytest.mark.parametrize("name", [name for name in handover.WAYS if "unordered" not in name])
def test_shared_memory_is_handed_over(name: str) -> None:
    assert handover.wrong_values(name) == 0
