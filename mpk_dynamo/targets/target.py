"""Target: what a kernel may rely on, for one GPU or for every GPU of an architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """name: "h200", or the architecture ("sm_90a") when no single GPU is meant. arch: NVRTC's -arch.

    Sizes are in bytes, registers are 32-bit. shared_bytes_per_block is the opt-in maximum. bandwidth: device memory,
    bytes per second by the datasheet; an upper bound for estimates, never a measurement. features: see FEATURES.
    """

    name: str
    arch: str
    compute_capability: tuple[int, int]
    sm_count: int
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    registers_per_sm: int
    max_registers_per_thread: int
    l2_bytes: int
    bandwidth: float
    features: frozenset[str]

    @property
    def is_gpu(self) -> bool:
        """Whether a cubin can be built for it."""
        return bool(self.arch)


FEATURES = {
    "async_copy": "cp.async: copies of 4, 8 or 16 bytes from global to shared memory, past the registers",
    "bf16_mma": "mma.sync with bf16 operands",
    "fp8_mma": "mma.sync with fp8 operands",
    "bulk_copy": "cp.async.bulk: contiguous copies by one thread, in multiples of 16 bytes",
    "mbarrier_tx": "mbarriers that count bytes (expect_tx, complete_tx)",
    "clusters": "thread block clusters and distributed shared memory",
    "wgmma": "wgmma.mma_async: warpgroup matrix multiply from shared memory",
    "tcgen05": "tcgen05.mma: matrix multiply with tensor memory",
    "setmaxnreg": "moving registers between warpgroups",
}
"""Features a device variant can require, and what each stands for."""


def features_of(arch: str) -> frozenset[str]:
    """Features of an architecture such as "sm_90a". The suffix matters: "sm_90" has no wgmma, "sm_90a" has."""
    number, specific = parse_arch(arch)
    found = set()
    if number >= 80:
        found |= {"async_copy", "bf16_mma"}
    if number >= 89:
        found |= {"fp8_mma"}
    if number >= 90:
        found |= {"bulk_copy", "mbarrier_tx", "clusters"}
    if specific and number >= 90:
        found |= {"setmaxnreg"}
    if specific and number == 90:
        found |= {"wgmma"}
    if specific and 100 <= number < 120:
        found |= {"tcgen05"}
    return frozenset(found)


def parse_arch(arch: str) -> tuple[int, bool]:
    """("sm_90a") -> (90, True): the number, and whether it is architecture-specific. Raises ValueError."""
    digits = arch.removeprefix("sm_").removesuffix("a")
    if not arch.startswith("sm_") or not digits.isdigit():
        raise ValueError(f"{arch!r} is not an architecture such as 'sm_90a'")
    return int(digits), arch.endswith("a")


def arch_of(compute_capability: tuple[int, int]) -> str:
    """The -arch that gives a device all its features: 9.0, 10.x and 11.x need the architecture-specific one."""
    major, minor = compute_capability
    return f"sm_{major}{minor}" + ("a" if major in (9, 10, 11) else "")
