"""Decoding of a Program's tables with the packers' declarations of abi.py."""

from __future__ import annotations

import numpy as np

from .. import abi
from ..errors import VerificationError
from ..ir.program import Program

BINDING_SHIFT = 40
"""A reference that is not into the arena: the binding above this bit, a byte offset below."""

ARENA_OFFSET = min(abi.ARENA_REF, abi.FLAGGED_REF) - 1
"""Bits of a reference into the arena that are the offset."""


def decode(p: Program) -> dict[str, np.ndarray]:
    """Each table as a structured array. P1 when one is missing, unknown, or no whole number of entries."""
    expected = {name: struct for name, struct in abi.TABLES}
    if set(p.tables) != set(expected):
        extra, missing = sorted(set(p.tables) - set(expected)), sorted(set(expected) - set(p.tables))
        raise VerificationError("P1", f"tables: unknown {extra}, missing {missing}")
    out = {}
    for name, struct in expected.items():
        size = struct.dtype.itemsize
        if len(p.tables[name]) % size:
            raise VerificationError("P1", f"table {name} of {len(p.tables[name])} bytes, entries of {size}")
        out[name] = np.frombuffer(p.tables[name], dtype=struct.dtype)
    return out


def slices(table: np.ndarray, first: str, count: str, of: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each row's entries in `of`, as int64. P1 when one reaches past its end."""
    start, length = table[first].astype(np.int64), table[count].astype(np.int64)
    beyond = start + length > len(of)
    if beyond.any():
        k = int(np.argmax(beyond))
        text = f"{what} {k} has entries {start[k]}:{start[k] + length[k]} of a table of {len(of)}"
        raise VerificationError("P1", text)
    return start, length


def split(refs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(in arena, binding, byte offset) of each reference; binding is -1 in the arena."""
    arena = (refs & np.uint64(abi.ARENA_REF)) != 0
    binding = ((refs & np.uint64(abi.ARENA_REF - 1)) >> np.uint64(BINDING_SHIFT)).astype(np.int64)
    mask = np.where(arena, np.uint64(ARENA_OFFSET), np.uint64((1 << BINDING_SHIFT) - 1))
    offset = (refs & mask).astype(np.int64)
    return arena, np.where(arena, -1, binding), offset
