"""Argmax, the next token of greedy decoding: a node type and its operator, added from outside the package.

Task kind `argmax`, tile = (row,): one row of the input. The body of the task on the device is argmax.cuh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpk_dynamo.errors import Unsupported
from mpk_dynamo.ir.graph import ExtensionNode, Graph, Node
from mpk_dynamo.ir.region import Access
from mpk_dynamo.ir.types import Buffer, DType
from mpk_dynamo.ops import register
from mpk_dynamo.ops.sampling import Sample
from mpk_dynamo.ops.spec import DeviceForm, Memory, TileSpec, Tiling

VALUES = {DType.BF16: "bf16", DType.F16: "f16", DType.F32: "float"}
"""Types of the input, and what they are called in device code."""


@dataclass(frozen=True)
class Argmax(ExtensionNode):
    """out[t] = the column of the largest element of x[t, :]; of equal ones the first. A NaN is larger than any number.

    x: [T, N], N > 0, bf16, f16 or f32. out: [T], i64.
    """

    name: str
    x: str
    out: str
    origin: str = ""

    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def writes(self) -> tuple[str, ...]:
        return (self.out,)


class ArgmaxOperator:
    """See mpk_dynamo/ops/spec.py for the contract."""

    name = "argmax"

    def tile(self, node: Argmax, graph: Graph, workers: int) -> Tiling:
        """A task for each row. Raises ValueError when the buffers do not fit the node."""
        x, out = graph.buffers[node.x], graph.buffers[node.out]
        if len(x.shape) != 2 or not x.shape[1] or out.shape != x.shape[:1] or out.dtype is not DType.I64:
            raise ValueError(f"{node.name}: argmax of {list(x.shape)} to {out.dtype.value} {list(out.shape)}")
        rows, columns = x.shape
        tasks = []
        for row in range(rows):
            read, written = Access(node.x, ((row, row + 1), (0, columns))), Access(node.out, ((row, row + 1),))
            moved = columns * x.dtype.itemsize + out.dtype.itemsize
            tasks.append(TileSpec("argmax", (row,), (read,), (written,), moved, columns))
        return Tiling(tuple(tasks))

    def context(self, node: Argmax, graph: Graph, workers: int) -> None:
        """Nothing."""

    def prepare(
        self, node: Argmax, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...]
    ) -> Callable[[Memory], None]:
        """The task of one row as a function of memory. Not torch.argmax, which promises no order among equals."""
        (row,) = tile

        def task(memory: Memory) -> None:
            x = memory[node.x][row]
            best = x.max()
            memory[node.out][row] = ((x == best) | (x.isnan() & best.isnan())).nonzero()[0, 0]

        return task

    def run(self, node: Argmax, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...], memory: Memory) -> None:
        """Execute one task."""
        self.prepare(node, buffers, op, tile)(memory)

    def oracle(self, node: Argmax, buffers: Mapping[str, Buffer], memory: Memory) -> None:
        """Sorts: NaN last, equal elements in their order, reversed so that the first of the largest is in front."""
        order = memory[node.x].float().flip(1).sort(dim=1, stable=True).indices[:, -1]
        memory[node.out].copy_(memory[node.x].shape[1] - 1 - order)

    def device_forms(self, node: Argmax, buffers: Mapping[str, Buffer]) -> dict[str, DeviceForm]:
        """Two reductions over all consumers use 128 bytes of scratch (group.cuh)."""
        x = buffers[node.x]
        if x.dtype not in VALUES or x.shape[1] >= 1 << 31 or buffers[node.out].strides != (1,):
            raise Unsupported(f"argmax of {x.dtype.value} {list(x.shape)}", origin=node.origin)
        row, column = x.strides
        traits = f"using Value = {VALUES[x.dtype]}; static constexpr int COLUMNS = {x.shape[1]};"
        traits += f" static constexpr long long ROW_STRIDE = {row}, COLUMN_STRIDE = {column};"
        source = Path(__file__).with_suffix(".cuh").read_text()
        return {"argmax": DeviceForm("argmax", source, traits, (node.x, node.out), scratch=128)}

    def samples(self) -> list[tuple[Node, Graph]]:
        """Types, one row and several, fewer columns than threads, a transposed input."""
        sizes = ((DType.BF16, 1, 5000), (DType.F16, 3, 257), (DType.F32, 16, 7), (DType.BF16, 2, 1))
        return [_sample(*size) for size in sizes] + [_sample(DType.F32, 4, 300, transposed=True)]


def _sample(dtype: DType, rows: int, columns: int, *, transposed: bool = False) -> tuple[Node, Graph]:
    s = Sample()
    x = s.input("x", dtype, rows, columns, strides=(1, rows) if transposed else None)
    return s.graph(Argmax("argmax", x, s.output("out", DType.I64, rows)))


register(Argmax, ArgmaxOperator())
