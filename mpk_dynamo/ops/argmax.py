"""Argmax: the next token of greedy decoding.

Task kinds: `argmax_part`, tile = (row, start, stop, part), finds the best of a range of columns; `argmax`, tile =
(row, parts), the best of those. A candidate is one integer: the sort key of the value above the inverted column, so the
largest candidate is the first of the largest values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..ir.graph import ExtensionNode, Graph, Node
from ..ir.region import Access
from ..ir.types import Buffer, BufferKind, DType, buffer
from .draw import sort_keys
from .rows import LAST, check_rows, here, parts_of_row, row_traits
from .sampling import Sample
from .spec import DeviceForm, Memory, TileSpec, Tiling

MIN_COLUMNS = 1024
"""Columns of a part, at least."""


@dataclass(frozen=True)
class Argmax(ExtensionNode):
    """out[b] = the column of the largest element of x[b, :]; of equal ones the first. A NaN is larger than any number.

    x: [B, V], 0 < V < 2^31, bf16, f16 or f32. out: [B], i64.
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
    """See ops/spec.py for the contract."""

    name = "argmax"

    def tile(self, node: Argmax, graph: Graph, workers: int) -> Tiling:
        """As many parts as there are workers, in all rows. Raises ValueError when buffers do not fit the node."""
        x, out = graph.buffers[node.x], graph.buffers[node.out]
        check_rows(node, x, out)
        rows, columns = x.shape
        ranges = parts_of_row(rows, columns, MIN_COLUMNS, workers)
        parts = len(ranges)
        best = buffer(f"{node.name}.best", DType.I64, (rows, parts), BufferKind.SCRATCH, origin=node.origin)
        tasks = []
        for row in range(rows):
            for part, (a, b) in enumerate(ranges):
                read, written = Access(node.x, here(row, a, b)), Access(best.name, here(row, part, part + 1))
                moved = (b - a) * x.dtype.itemsize + 8
                tasks.append(TileSpec("argmax_part", (row, a, b, part), (read,), (written,), moved, b - a))
        for row in range(rows):
            read, written = Access(best.name, here(row, 0, parts)), Access(node.out, ((row, row + 1),))
            tasks.append(TileSpec("argmax", (row, parts), (read,), (written,), 8 * parts + 8, parts))
        return Tiling(tuple(tasks), (best,))

    def context(self, node: Argmax, graph: Graph, workers: int) -> None:
        """Nothing."""

    def prepare(
        self, node: Argmax, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...]
    ) -> Callable[[Memory], None]:
        """One task as a function of memory."""
        if op == "argmax":
            row, _ = tile

            def combine(memory: Memory) -> None:
                memory[node.out][row] = LAST - (memory[f"{node.name}.best"][row].max() & LAST)

            return combine
        row, start, stop, part = tile

        def task(memory: Memory) -> None:
            x = memory[node.x][row, start:stop]
            keys = torch.where(x.isnan(), (1 << 32) - 1, sort_keys(x))
            columns = torch.arange(start, stop, device=x.device)
            memory[f"{node.name}.best"][row, part] = ((keys << 31) | (LAST - columns)).max()

        return task

    def run(self, node: Argmax, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...], memory: Memory) -> None:
        """Execute one task."""
        self.prepare(node, buffers, op, tile)(memory)

    def oracle(self, node: Argmax, buffers: Mapping[str, Buffer], memory: Memory) -> None:
        """Sorts: NaN last, equal elements in their order, reversed so that the first of the largest is in front."""
        order = memory[node.x].float().flip(1).sort(dim=1, stable=True).indices[:, -1]
        memory[node.out].copy_(memory[node.x].shape[1] - 1 - order)

    def device_forms(self, node: Argmax, buffers: Mapping[str, Buffer]) -> dict[str, DeviceForm]:
        """Reductions over all consumers use 128 bytes of scratch (group.cuh)."""
        traits = (
            row_traits(node, buffers[node.x], buffers[node.out])
            + f" static constexpr int PARTS = {self._parts(node, buffers)};"
        )
        source, best = '#include "mpk/tasks/argmax.cuh"\n', f"{node.name}.best"
        return {
            "argmax_part": DeviceForm("argmax_part", source, traits, (node.x, best), scratch=128),
            "argmax": DeviceForm("argmax", source, traits, (best, node.out), scratch=128),
        }

    @staticmethod
    def _parts(node: Argmax, buffers: Mapping[str, Buffer]) -> int:
        return buffers[f"{node.name}.best"].shape[1]

    def samples(self) -> list[tuple[Node, Graph]]:
        """Types, one row and several, fewer columns than threads, many equal values, a transposed input."""
        sizes = ((DType.BF16, 1, 5000), (DType.F16, 3, 2570), (DType.F32, 16, 7), (DType.BF16, 2, 1))
        return [_sample(*size) for size in sizes] + [_sample(DType.F32, 4, 3000, transposed=True)]


def _sample(dtype: DType, rows: int, columns: int, *, transposed: bool = False) -> tuple[Node, Graph]:
    s = Sample()
    x = s.input("x", dtype, rows, columns, strides=(1, rows) if transposed else None)
    return s.graph(Argmax("argmax", x, s.output("out", DType.I64, rows)))
