"""Element types and buffers."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class DType(enum.Enum):
    """Element type. The value is the name used by printers and generated code."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    F64 = "f64"
    I64 = "i64"
    I32 = "i32"
    U8 = "u8"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self._value_]

    @property
    def is_float(self) -> bool:
        return self in (DType.BF16, DType.F16, DType.F32, DType.F64)

    @property
    def is_narrow_float(self) -> bool:
        """bf16 and f16: exist only in memory and as roundings, arithmetic on them is done in f32."""
        return self in (DType.BF16, DType.F16)


_ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "i64": 8, "i32": 4, "u8": 1, "bool": 1}


class BufferKind(enum.Enum):
    PARAM = "param"  # caller's tensor, never written by the program, rarely rebound (weights)
    INPUT = "input"  # caller's tensor, never written, rebound on each call (token ids, masks)
    STATE = "state"  # caller's tensor, written in place (KV cache, length counters)
    OUTPUT = "output"  # fresh tensor returned to the caller
    SCRATCH = "scratch"  # internal, lives in the arena


@dataclass(frozen=True)
class Buffer:
    """A tensor the program reads or writes.

    shape, strides are in elements; SCRATCH and OUTPUT are contiguous row-major. Several versions of one STATE
    tensor are separate Buffers with one `storage`: `keys` (before this step), `keys@1` (after the append).
    Conflicts are judged on `storage`; data flow on `name`.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    kind: BufferKind
    strides: tuple[int, ...]
    storage: str
    origin: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def span_bytes(self) -> int:
        """From its first element to behind its last one, whatever the strides are."""
        if not self.numel:
            return 0
        return (1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides))) * self.dtype.itemsize


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def buffer(
    name: str,
    dtype: DType,
    shape: tuple[int, ...],
    kind: BufferKind,
    *,
    strides: tuple[int, ...] | None = None,
    storage: str | None = None,
    origin: str = "",
) -> Buffer:
    """A Buffer with the usual defaults: contiguous, its own storage."""
    shape = tuple(int(s) for s in shape)
    return Buffer(name, dtype, shape, kind, strides or contiguous_strides(shape), storage or name, origin)
