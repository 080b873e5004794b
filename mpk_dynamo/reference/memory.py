"""Memory of the reference executor: every buffer as a torch tensor, shaped and strided as declared."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import MpkError
from ..ir.types import Buffer, BufferKind
from ..ops.evaluate import TORCH_DTYPE

INT_POISON = {torch.int64: 1 << 40, torch.int32: 1 << 30, torch.uint8: 0xA5}
"""Values no index or length has, so that using one fails."""


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill in place with NaN, an absurd integer, or True."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else INT_POISON.get(tensor.dtype, 1))


def bind(buffer: Buffer, tensor: torch.Tensor) -> torch.Tensor:
    """The caller's tensor as `buffer` declares it. Raises MpkError when dtype, shape or strides differ."""
    if tensor.dtype is not TORCH_DTYPE[buffer.dtype]:
        raise _mismatch(buffer, f"has dtype {tensor.dtype}, compiled for {buffer.dtype.value}")
    if tuple(tensor.shape) != buffer.shape:
        raise _mismatch(buffer, f"has shape {tuple(tensor.shape)}, compiled for {buffer.shape}")
    strides = tensor.stride()
    if strides == buffer.strides:
        return tensor
    if any(size > 1 and a != b for size, a, b in zip(buffer.shape, strides, buffer.strides, strict=True)):
        raise _mismatch(buffer, f"has strides {strides}, compiled for {buffer.strides}")
    return tensor.as_strided(buffer.shape, buffer.strides)


def _mismatch(buffer: Buffer, what: str) -> MpkError:
    return MpkError(f"tensor of {buffer.storage} {what}", origin=buffer.origin, remedy="recompile for the new layout")


def bind_callers(buffers: Mapping[str, Buffer], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of all PARAM, INPUT and STATE buffers; `tensors` is by storage. Versions of a STATE share memory.

    Raises MpkError for a missing tensor or one of another layout."""
    out = {}
    for name, b in buffers.items():
        if b.kind in (BufferKind.PARAM, BufferKind.INPUT, BufferKind.STATE):
            if b.storage not in tensors:
                raise MpkError(f"no tensor for {b.storage}", origin=b.origin, remedy="pass one for every storage")
            out[name] = bind(b, tensors[b.storage])
    return out


def fresh_outputs(buffers: Mapping[str, Buffer], device: torch.device, poison: bool = False) -> dict[str, torch.Tensor]:
    """New tensors for OUTPUT buffers; buffers of one storage share one."""
    storages: dict[str, torch.Tensor] = {}
    out = {}
    for name, b in buffers.items():
        if b.kind is BufferKind.OUTPUT:
            if b.storage not in storages:
                storages[b.storage] = torch.empty(b.shape, dtype=TORCH_DTYPE[b.dtype], device=device)
                if poison:
                    poison_(storages[b.storage])
            out[name] = storages[b.storage]
    return out


def scratch_in_arena(
    buffers: Mapping[str, Buffer], arena: torch.Tensor, offsets: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """SCRATCH buffers as views of one uint8 arena, at the byte offsets of their storages."""
    out = {}
    for name, b in buffers.items():
        if b.kind is BufferKind.SCRATCH:
            start = offsets[b.storage]
            out[name] = arena[start : start + b.nbytes].view(TORCH_DTYPE[b.dtype]).reshape(b.shape)
    return out


def allocate(
    buffers: Mapping[str, Buffer], tensors: Mapping[str, torch.Tensor], *, poison: bool = False
) -> dict[str, torch.Tensor]:
    """Memory for every buffer: the caller's tensors by storage, fresh OUTPUT and separate SCRATCH tensors.

    `poison` fills what nobody has written yet, so that reading it shows. Raises MpkError like `bind_callers`.
    """
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    scratch: dict[str, torch.Tensor] = {}
    memory = {**bind_callers(buffers, tensors), **fresh_outputs(buffers, device, poison)}
    for name, b in buffers.items():
        if b.kind is BufferKind.SCRATCH:
            if b.storage not in scratch:
                made = torch.zeros(b.shape, dtype=TORCH_DTYPE[b.dtype], device=device)
                scratch[b.storage] = poison_(made) if poison else made
            memory[name] = scratch[b.storage]
    return memory
