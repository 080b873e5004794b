"""Choice: the next token, drawn at random. draw.py says what is drawn.

Task kinds: `choice_part`, tile = (row, first, last), finds the largest score of each of a range of groups of 64
columns; without top-k `choice_mass`, of the same tile, adds up their weights, which min-p has filtered where nothing
comes before it; `choice`, tile = (row,), draws. The groups tell the draw where the large scores are: with top-k, or a
nucleus of a few hundred tokens, it looks at few columns, and at those of one group where nothing but min-p is on.
Otherwise it reads the row several times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import Unsupported
from ..ir.graph import ExtensionNode, Graph, Node
from ..ir.region import Access
from ..ir.types import Buffer, BufferKind, DType, buffer
from .draw import GROUP, above_min_p, draw, weights
from .rows import check_rows, here, parts_of_row, row_traits
from .sampling import Sample
from .spec import DeviceForm, Memory, TileSpec, Tiling

MIN_GROUPS = 16
"""Groups of a part, at least."""

MAX_COLUMNS = 1 << 18
"""Columns of a row on the device, at most: the sum of their weights fits 63 bits."""

SCRATCH = 13312
"""Bytes of shared memory; choice.cuh asserts that it suffices."""


@dataclass(frozen=True)
class Choice(ExtensionNode):
    """out[b] = draw(x[b, :], the stages that are set, numbers, key[0], step, sequences[b]).

    x: [B, V] scores, bf16, f16 or f32. numbers: f64 [5]. key: i64 [1]. step: i64 []. sequences: i64 [B]. out: i64 [B].
    """

    name: str
    x: str
    numbers: str
    key: str
    step: str
    sequences: str
    out: str
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    origin: str = ""

    @property
    def stages(self) -> frozenset[str]:
        return frozenset(s for s in ("top_k", "top_p", "min_p") if getattr(self, s))

    def reads(self) -> tuple[str, ...]:
        return self.x, self.numbers, self.key, self.step, self.sequences

    def writes(self) -> tuple[str, ...]:
        return (self.out,)


class ChoiceOperator:
    """See ops/spec.py for the contract."""

    name = "choice"

    def tile(self, node: Choice, graph: Graph, workers: int) -> Tiling:
        """As many parts as there are workers, in all rows. Raises ValueError when buffers do not fit the node."""
        x, out = graph.buffers[node.x], graph.buffers[node.out]
        check_rows(node, x, out)
        rows, columns = x.shape
        groups = -(-columns // GROUP)
        largest = buffer(f"{node.name}.largest", DType.F32, (rows, groups), BufferKind.SCRATCH, origin=node.origin)
        tasks = []
        for row in range(rows):
            for a, b in parts_of_row(rows, groups, MIN_GROUPS, workers):
                start, stop = a * GROUP, min(columns, b * GROUP)
                read, written = Access(node.x, here(row, start, stop)), Access(largest.name, here(row, a, b))
                moved = (stop - start) * x.dtype.itemsize + 4 * (b - a)
                tasks.append(TileSpec("choice_part", (row, a, b), (read,), (written,), moved, stop - start))
        mass = buffer(f"{node.name}.mass", DType.I64, (rows, groups), BufferKind.SCRATCH, origin=node.origin)
        made = (largest,) if node.top_k else (largest, mass)
        for row in range(rows if mass in made else 0):
            for a, b in parts_of_row(rows, groups, MIN_GROUPS, workers):
                start, stop = a * GROUP, min(columns, b * GROUP)
                reads = (
                    Access(node.x, here(row, start, stop)),
                    Access(largest.name, here(row, 0, groups)),
                    Access(node.numbers, ((0, 5),)),
                )
                moved = (stop - start) * x.dtype.itemsize + 4 * groups + 8 * (b - a)
                written = Access(mass.name, here(row, a, b))
                tasks.append(TileSpec("choice_mass", (row, a, b), reads, (written,), moved, 16 * (stop - start)))
        for row in range(rows):
            one = ((row, row + 1),)
            reads = (
                Access(node.x, here(row, 0, columns)),
                Access(largest.name, here(row, 0, groups)),
                Access(node.numbers, ((0, 5),)),
                Access(node.key, ((0, 1),)),
                Access(node.step, ()),
                Access(node.sequences, one),
                *(Access(b.name, here(row, 0, groups)) for b in made[1:]),
            )
            moved = columns * x.dtype.itemsize + 4 * groups
            tasks.append(TileSpec("choice", (row,), reads, (Access(node.out, one),), moved, 16 * columns))
        return Tiling(tuple(tasks), made)

    def context(self, node: Choice, graph: Graph, workers: int) -> None:
        """Nothing."""

    def prepare(
        self, node: Choice, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...]
    ) -> Callable[[Memory], None]:
        """One task as a function of memory."""
        if op == "choice":
            (row,) = tile
            return lambda memory: self._draw(node, memory, row)
        row, first, last = tile

        def mass(memory: Memory) -> None:
            w = weights(memory[node.x][row, first * GROUP : last * GROUP], memory[f"{node.name}.largest"][row].max())
            w = above_min_p(w, memory[node.numbers]) if node.min_p and not node.top_p else w
            padded = torch.nn.functional.pad(w, (0, (last - first) * GROUP - w.numel()))
            memory[f"{node.name}.mass"][row, first:last] = padded.view(-1, GROUP).sum(1)

        if op == "choice_mass":
            return mass

        def task(memory: Memory) -> None:
            x = memory[node.x][row, first * GROUP : last * GROUP].float()
            x = torch.where(x.isnan(), float("-inf"), x)
            padded = torch.nn.functional.pad(x, (0, (last - first) * GROUP - x.numel()), value=float("-inf"))
            memory[f"{node.name}.largest"][row, first:last] = padded.view(-1, GROUP).amax(1)

        return task

    @staticmethod
    def _draw(node: Choice, memory: Memory, row: int) -> None:
        key, step, sequence = int(memory[node.key][0]), int(memory[node.step]), int(memory[node.sequences][row])
        memory[node.out][row] = draw(memory[node.x][row], node.stages, memory[node.numbers], key, step, sequence)

    def run(self, node: Choice, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...], memory: Memory) -> None:
        """Execute one task."""
        self.prepare(node, buffers, op, tile)(memory)

    def oracle(self, node: Choice, buffers: Mapping[str, Buffer], memory: Memory) -> None:
        """Row by row."""
        for row in range(buffers[node.x].shape[0]):
            self._draw(node, memory, row)

    def device_forms(self, node: Choice, buffers: Mapping[str, Buffer]) -> dict[str, DeviceForm]:
        """Raises Unsupported for more columns than weights can be summed of, and where the step computes what names
        the random number: the body reads that before its events have come."""
        x = buffers[node.x]
        if x.shape[1] > MAX_COLUMNS:
            raise Unsupported(f"sampling from {x.shape[1]} columns; {MAX_COLUMNS} are possible", origin=node.origin)
        for name in (node.key, node.step, node.sequences):
            if buffers[name].kind in (BufferKind.SCRATCH, BufferKind.OUTPUT) or name != buffers[name].storage:
                raise Unsupported(f"sampling by {name}, which the step itself computes", origin=node.origin)
        flags = ", ".join(
            f"{s.upper()} = {'true' if getattr(node, s) else 'false'}" for s in ("top_k", "top_p", "min_p")
        )
        traits = f"{row_traits(node, x, buffers[node.out])} static constexpr bool {flags};"
        source, largest = '#include "mpk/tasks/choice.cuh"\n', f"{node.name}.largest"
        operands = node.x, largest, node.numbers, node.key, node.step, node.sequences, node.out
        forms = {"choice_part": DeviceForm("choice_part", source, traits, (node.x, largest))}
        if not node.top_k:
            mass = f"{node.name}.mass"
            added = node.x, largest, node.numbers, mass
            forms["choice_mass"] = DeviceForm("choice_mass", source, traits, added, scratch=SCRATCH)
            operands += (mass,)
        return {**forms, "choice": DeviceForm("choice", source, traits, operands, scratch=SCRATCH)}

    def samples(self) -> list[tuple[Node, Graph]]:
        """Types, one row and several, each filter alone and all, fewer columns than a group, a transposed input."""
        return [
            _sample(DType.F32, 1, 5000, "top_k", "top_p", "min_p"),
            _sample(DType.BF16, 3, 2570, "top_p"),
            _sample(DType.F16, 16, 300),
            _sample(DType.F32, 2, 7, "min_p"),
            _sample(DType.F32, 2, 3000, "top_k", transposed=True),
        ]


def _sample(dtype: DType, rows: int, columns: int, *stages: str, transposed: bool = False) -> tuple[Node, Graph]:
    s = Sample()
    x = s.input("x", dtype, rows, columns, strides=(1, rows) if transposed else None)
    numbers, key, step = s.input("numbers", DType.F64, 5), s.input("key", DType.I64, 1), s.input("step", DType.I64)
    sequences, out = s.input("sequences", DType.I64, rows), s.output("out", DType.I64, rows)
    return s.graph(Choice("choice", x, numbers, key, step, sequences, out, **dict.fromkeys(stages, True)))
