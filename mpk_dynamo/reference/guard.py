"""Checks that a task touches only what it declares.

Each task runs three times: on two copies of memory in which everything it does not declare as read is spoiled in
different ways (NaN and absurd integers; plausible values), and on the real memory. It must change nothing outside
its declared writes, and all runs must write the same bits. A read that cannot change the result (the branch of a
`where` that is not taken) is allowed. Slow; for tests.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping

import torch

from ..errors import VerificationError
from ..ir.graph import Node, reads, writes
from ..ir.region import Access, Side
from ..ir.tasks import Task, TaskGraph
from ..ir.types import Buffer
from ..ops import operator_of
from ..ops.spec import Memory, TileSpec
from .memory import INT_POISON


def checked(tg: TaskGraph) -> Callable[[Task, Memory], None]:
    """A `run` for `run_tasks` that executes tasks under guard."""
    return lambda task, memory: check_task(tg.graph.nodes[task.node], tg.buffers, task, memory)


def check_task(node: Node, buffers: Mapping[str, Buffer], task: Task | TileSpec, memory: Memory) -> None:
    """Run one task on `memory` under guard. Raises VerificationError: R1 for an undeclared read, R2 for an
    undeclared write, T1 for an access outside its buffer."""
    label = f"{node.name}.{task.op}{list(task.tile)}"
    names = {*reads(node), *writes(node), *(n for n in buffers if n.startswith(f"{node.name}."))}  # partial results
    names |= {a.buffer for a in (*task.reads, *task.writes)}
    for a in (*task.reads, *task.writes):
        if any(not 0 <= s <= e <= size for (s, e), size in zip(a.box, buffers[a.buffer].shape, strict=True)):
            raise VerificationError("T1", f"{label}: {a} leaves the buffer", origin=node.origin)
    before = {s: _flat(memory[n], b) for s, (n, b) in _storages(names, buffers).items()}
    readable = _allowed(node, buffers, task.reads, memory, before)
    writable = _allowed(node, buffers, task.writes, memory, before)
    starts = [
        {x: spoil(flat, readable[x], zlib.crc32(x.encode())) for x, flat in before.items()}
        for spoil in (_poison, _disguise)
    ]
    ends = []
    operator = operator_of(node)
    for start in starts:
        ends.append({x: flat.clone() for x, flat in start.items()})
        copy = {n: ends[-1][buffers[n].storage].as_strided(buffers[n].shape, buffers[n].strides) for n in names}
        try:
            operator.run(node, buffers, task.op, task.tile, copy)
        except (IndexError, RuntimeError) as error:
            message = f"{label} fails without undeclared reads: {error}"
            raise VerificationError("R1", message, origin=node.origin) from error
    operator.run(node, buffers, task.op, task.tile, memory)
    for x, (name, buffer) in _storages(names, buffers).items():
        runs = [*((start[x], end[x]) for start, end in zip(starts, ends, strict=True))]
        runs.append((before[x], _flat(memory[name], buffer)))
        changed = [_differs(old, new) for old, new in runs]
        strayed = (changed[0] | changed[1] | changed[2]) & ~writable[x]
        if strayed.any():
            message = f"{label} writes {_where(buffer, strayed)} undeclared"
            raise VerificationError("R2", message, origin=node.origin)
        # what no copy shows as changed was not written: the copies start from different values
        (_, first), (_, second), (_, real) = runs
        wrong = (changed[0] | changed[1]) & (_differs(first, second) | _differs(first, real))
        if wrong.any():
            message = f"{label}: {_where(buffer, wrong)} depends on something it does not declare as read"
            raise VerificationError("R1", message, origin=node.origin)


def _storages(names: Iterable[str], buffers: Mapping[str, Buffer]) -> dict[str, tuple[str, Buffer]]:
    return {buffers[n].storage: (n, buffers[n]) for n in sorted(names)}


def _extent(buffer: Buffer) -> int:
    if not buffer.numel:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(buffer.shape, buffer.strides, strict=True))


def _flat(tensor: torch.Tensor, buffer: Buffer) -> torch.Tensor:
    return tensor.as_strided((_extent(buffer),), (1,), tensor.storage_offset()).clone()


def _offsets(buffer: Buffer, box: tuple[tuple[int, int], ...]) -> torch.Tensor:
    out = torch.zeros((), dtype=torch.int64)
    for (start, stop), stride in zip(box, buffer.strides, strict=True):
        out = out.unsqueeze(-1) + torch.arange(start, stop) * stride
    return out


def _allowed(
    node: Node,
    buffers: Mapping[str, Buffer],
    accesses: Iterable[Access],
    memory: Memory,
    flats: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Which elements of each storage the accesses cover."""
    out = {s: torch.zeros(flat.shape, dtype=torch.bool) for s, flat in flats.items()}
    for a in accesses:
        buffer = buffers[a.buffer]
        offsets = _offsets(buffer, a.box)
        if a.side is not None:
            at = operator_of(node).at_position(node, buffers, a, memory)
            offsets = offsets[at if a.side is Side.AT else ~at]
        out[buffer.storage][offsets] = True
    return out


def _poison(flat: torch.Tensor, keep: torch.Tensor, seed: int) -> torch.Tensor:
    """Spoil so that using it fails or shows."""
    if flat.dtype is torch.bool:
        return torch.where(keep, flat, _random(flat, seed) < 0.5)
    value = float("nan") if flat.is_floating_point() else INT_POISON[flat.dtype]
    return torch.where(keep, flat, torch.full_like(flat, value))


def _disguise(flat: torch.Tensor, keep: torch.Tensor, seed: int) -> torch.Tensor:
    """Spoil with values that look right, and differ from poison everywhere."""
    random = _random(flat, seed)
    if flat.dtype is torch.bool:
        return torch.where(keep, flat, random >= 0.5)
    return torch.where(keep, flat, (random if flat.is_floating_point() else random * 2).to(flat.dtype))


def _random(flat: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.rand(flat.shape, generator=torch.Generator().manual_seed(seed))


def _differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a != b) & ~((a != a) & (b != b))


def _where(buffer: Buffer, wrong: torch.Tensor) -> str:
    """The first wrong element, as an index of the buffer."""
    flat = int(wrong.nonzero()[0])
    hits = (_offsets(buffer, tuple((0, s) for s in buffer.shape)) == flat).nonzero()
    return f"{buffer.name}[{', '.join(map(str, hits[0].tolist()))}]" if len(hits) else f"{buffer.storage} + {flat}"
