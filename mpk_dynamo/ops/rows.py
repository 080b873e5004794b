"""What the operators share that look at whole rows of scores: what they take, and how a row is cut into parts."""

from __future__ import annotations

from ..errors import Unsupported
from ..ir.graph import ExtensionNode
from ..ir.types import Buffer, DType

VALUES = {DType.BF16: "bf16", DType.F16: "f16", DType.F32: "float"}
"""Types of the input, and what they are called in device code."""

LAST = (1 << 31) - 1
"""The largest number of a column."""


def check_rows(node: ExtensionNode, x: Buffer, out: Buffer) -> None:
    """Raises ValueError when x is no matrix, or out not one i64 per row of it."""
    if len(x.shape) != 2 or not 0 < x.shape[1] <= LAST or out.shape != x.shape[:1] or out.dtype is not DType.I64:
        raise ValueError(f"{node.name}: from {list(x.shape)} to {out.dtype.value} {list(out.shape)}")


def parts_of_row(rows: int, length: int, least: int, workers: int) -> list[tuple[int, int]]:
    """The ranges into which each of `rows` rows of `length` is cut: one for each worker in all rows, if they have
    `least` elements then, at least one."""
    parts = max(1, min(workers // max(rows, 1), length // least))
    cuts = [length * i // parts for i in range(parts + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


def here(row: int, start: int, stop: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The box of a range of columns of one row."""
    return (row, row + 1), (start, stop)


def row_traits(node: ExtensionNode, x: Buffer, out: Buffer) -> str:
    """C++ members that say how a row of x lies in memory. Raises Unsupported for types without a device form."""
    if x.dtype not in VALUES or out.strides != (1,):
        raise Unsupported(f"{node.name} of {x.dtype.value} {list(x.shape)}", origin=node.origin)
    row, column = x.strides
    return (
        f"using Value = {VALUES[x.dtype]}; static constexpr int COLUMNS = {x.shape[1]};"
        f" static constexpr long long ROW_STRIDE = {row}, COLUMN_STRIDE = {column};"
    )
