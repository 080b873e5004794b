"""Known GPUs. Figures: vendor's datasheets and programming guide; L2 as the driver reports it."""

from __future__ import annotations

import difflib

from ..errors import LaunchError
from .target import Target, arch_of, features_of, parse_arch

_KIB, _MIB = 1 << 10, 1 << 20


def _gpu(name: str, arch: str, sm_count: int, shared_kib_per_sm: int, l2_mib: float, bandwidth: float) -> Target:
    number, _ = parse_arch(arch)
    return Target(
        name=name,
        arch=arch,
        compute_capability=divmod(number, 10),
        sm_count=sm_count,
        shared_bytes_per_block=(shared_kib_per_sm - 1) * _KIB,  # the driver keeps 1 KiB of each block's share
        shared_bytes_per_sm=shared_kib_per_sm * _KIB,
        registers_per_sm=65536,
        max_registers_per_thread=255,
        l2_bytes=int(l2_mib * _MIB),
        bandwidth=bandwidth,
        features=features_of(arch),
    )


KNOWN: dict[str, Target] = {
    t.name: t
    for t in (
        _gpu("a100", "sm_80", 108, 164, 40, 2.039e12),
        _gpu("rtx4090", "sm_89", 128, 100, 72, 1.008e12),
        _gpu("l40s", "sm_89", 142, 100, 96, 0.864e12),
        _gpu("h100", "sm_90a", 132, 228, 50, 3.35e12),
        _gpu("h200", "sm_90a", 132, 228, 60, 4.8e12),
        _gpu("b200", "sm_100a", 148, 228, 126.5, 8.0e12),
        _gpu("rtx5090", "sm_120", 170, 100, 96, 1.792e12),
    )
}
"""By name. The SXM variant where there are several."""

_REPRESENTATIVE = {
    "sm_80": "a100", "sm_86": "l40s", "sm_87": "l40s", "sm_89": "l40s", "sm_90": "h100", "sm_90a": "h100",
    "sm_100a": "b200", "sm_103a": "b200", "sm_120": "rtx5090", "sm_120a": "rtx5090", "sm_121": "rtx5090",
}  # fmt: skip


def known(name: str) -> Target:
    """The target of that name: a GPU ("h200") or an architecture ("sm_90a"), for which a representative GPU's
    sizes are taken. Raises LaunchError for an unknown name."""
    from dataclasses import replace

    key = name.lower().replace(" ", "").replace("-", "")
    if key in KNOWN:
        return KNOWN[key]
    if key in _REPRESENTATIVE:
        number, _ = parse_arch(key)
        base = KNOWN[_REPRESENTATIVE[key]]
        return replace(base, name=key, arch=key, compute_capability=divmod(number, 10), features=features_of(key))
    names = [*KNOWN, *_REPRESENTATIVE]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise LaunchError(f"unknown target {name!r}", remedy=f"{hint}known targets: {', '.join(names)}")


def match(device_name: str, compute_capability: tuple[int, int]) -> Target | None:
    """The table's entry for a device name as the driver reports it ("NVIDIA H200"), or None."""
    text = device_name.lower().replace(" ", "")
    fits = [t for t in KNOWN.values() if t.name in text and t.arch == arch_of(compute_capability)]
    return max(fits, key=lambda t: len(t.name), default=None)


def reference_target(workers: int = 8) -> Target:
    """The CPU executor as a target: `workers` simulated SMs, no device features, limits of a large GPU."""
    return Target(
        name="cpu-reference",
        arch="",
        compute_capability=(0, 0),
        sm_count=workers,
        shared_bytes_per_block=227 * _KIB,
        shared_bytes_per_sm=228 * _KIB,
        registers_per_sm=65536,
        max_registers_per_thread=255,
        l2_bytes=0,
        bandwidth=1.0e10,
        features=frozenset(),
    )
