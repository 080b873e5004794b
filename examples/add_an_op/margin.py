"""Margin, how sure a model is of its next token: a node type and its operator, added from outside the package.

Task kind `margin`, tile = (row,): one row of the input. The body of the task on the device is margin.cuh.
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
class Margin(ExtensionNode):
    """out[t] = the largest element of x[t, :] less the second largest, in fp32: 0 where these are equal, NaN where an
    element is.

    x: [T, N], N > 1, bf16, f16 or f32. out: [T], f32.
    """

    name: str
    x: str
    out: str
    origin: str = ""

    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def writes(self) -> tuple[str, ...]:
        return (self.out,)


class MarginOperator:
    """See mpk_dynamo/ops/spec.py for the contract."""

    name = "margin"

    def tile(self, node: Margin, graph: Graph, workers: int) -> Tiling:
        """A task for each row. Raises ValueError when the buffers do not fit the node."""
        x, out = graph.buffers[node.x], graph.buffers[node.out]
        if len(x.shape) != 2 or x.shape[1] < 2 or out.shape != x.shape[:1] or out.dtype is not DType.F32:
            raise ValueError(f"{node.name}: margin of {list(x.shape)} to {out.dtype.value} {list(out.shape)}")
        rows, columns = x.shape
        tasks = []
        for row in range(rows):
            read, written = Access(node.x, ((row, row + 1), (0, columns))), Access(node.out, ((row, row + 1),))
            moved = columns * x.dtype.itemsize + out.dtype.itemsize
            tasks.append(TileSpec("margin", (row,), (read,), (written,), moved, columns))
        return Tiling(tuple(tasks))

    def context(self, node: Margin, graph: Graph, workers: int) -> None:
        """Nothing."""

    def prepare(
        self, node: Margin, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...]
    ) -> Callable[[Memory], None]:
        """The task of one row as a function of memory."""
        (row,) = tile

        def task(memory: Memory) -> None:
            best, second = memory[node.x][row].float().topk(2).values
            memory[node.out][row] = best - second

        return task

    def run(self, node: Margin, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...], memory: Memory) -> None:
        """Execute one task."""
        self.prepare(node, buffers, op, tile)(memory)

    def oracle(self, node: Margin, buffers: Mapping[str, Buffer], memory: Memory) -> None:
        """Sorts, NaN last."""
        values = memory[node.x].float().sort(dim=1).values
        memory[node.out].copy_(values[:, -1] - values[:, -2])

    def device_forms(self, node: Margin, buffers: Mapping[str, Buffer]) -> dict[str, DeviceForm]:
        """Reductions over all consumers use 128 bytes of scratch (group.cuh)."""
        x = buffers[node.x]
        if x.dtype not in VALUES or x.shape[1] >= 1 << 31 or buffers[node.out].strides != (1,):
            raise Unsupported(f"margin of {x.dtype.value} {list(x.shape)}", origin=node.origin)
        row, column = x.strides
        traits = f"using Value = {VALUES[x.dtype]}; static constexpr int COLUMNS = {x.shape[1]};"
        traits += f" static constexpr long long ROW_STRIDE = {row}, COLUMN_STRIDE = {column};"
        source = Path(__file__).with_suffix(".cuh").read_text()
        return {"margin": DeviceForm("margin", source, traits, (node.x, node.out), scratch=128)}

    def samples(self) -> list[tuple[Node, Graph]]:
        """Types, one row and several, fewer columns than threads, a transposed input."""
        sizes = ((DType.BF16, 1, 5000), (DType.F16, 3, 257), (DType.F32, 16, 7), (DType.BF16, 2, 2))
        return [_sample(*size) for size in sizes] + [_sample(DType.F32, 4, 300, transposed=True)]


def _sample(dtype: DType, rows: int, columns: int, *, transposed: bool = False) -> tuple[Node, Graph]:
    s = Sample()
    x = s.input("x", dtype, rows, columns, strides=(1, rows) if transposed else None)
    return s.graph(Margin("margin", x, s.output("out", DType.F32, rows)))


register(Margin, MarginOperator())
