"""The present GPU as a Target. The only function here that needs torch, imported when called."""

from __future__ import annotations

from typing import Any

from ..errors import LaunchError
from .table import match
from .target import Target, arch_of, features_of


def detect(device_index: int = 0) -> Target:
    """The Target of a CUDA device, with its own sizes. `name` is the table's, or the driver's in lower case.

    Raises LaunchError when there is no such device or it is older than compute capability 8.0.
    """
    import torch

    if not torch.cuda.is_available():
        raise LaunchError("no CUDA device is available", remedy="run on a machine with an NVIDIA GPU, or use the CPU")
    count = torch.cuda.device_count()
    if not 0 <= device_index < count:
        raise LaunchError(f"no CUDA device {device_index}", remedy=f"there are {count}: choose 0..{count - 1}")
    return from_properties(torch.cuda.get_device_properties(device_index))


def from_properties(props: Any) -> Target:
    """A Target from what `torch.cuda.get_device_properties` returns. Raises LaunchError below capability 8.0."""
    capability = (int(props.major), int(props.minor))
    if capability < (8, 0):
        raise LaunchError(
            f"{props.name} has compute capability {capability[0]}.{capability[1]}",
            remedy="a GPU of compute capability 8.0 (Ampere) or newer is needed",
        )
    arch, entry = arch_of(capability), match(props.name, capability)
    if entry and entry.sm_count != props.multi_processor_count:
        entry = None  # another variant of that name (PCIe, laptop, a MIG slice): its bandwidth differs too
    return Target(
        name=entry.name if entry else "-".join(props.name.lower().split()),
        arch=arch,
        compute_capability=capability,
        sm_count=int(props.multi_processor_count),
        shared_bytes_per_block=int(props.shared_memory_per_block_optin),
        shared_bytes_per_sm=int(props.shared_memory_per_multiprocessor),
        registers_per_sm=int(props.regs_per_multiprocessor),
        max_registers_per_thread=255,
        l2_bytes=int(props.L2_cache_size),
        bandwidth=entry.bandwidth if entry else _bandwidth(props),
        features=features_of(arch),
    )


def _bandwidth(props: Any) -> float:
    """Bytes per second from clock (kHz) and bus width (bits), two transfers per clock; 0.0 when not reported."""
    clock, bits = getattr(props, "memory_clock_rate", 0), getattr(props, "memory_bus_width", 0)
    return float(clock) * 1e3 * 2 * float(bits) / 8
