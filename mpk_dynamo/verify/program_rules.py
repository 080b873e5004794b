"""Rules P1 to P3, T7 and S4: the tables of a Program say what the Schedule says, and fit the target."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import numpy as np

from .. import abi
from ..errors import VerificationError
from ..ir.graph import Linear
from ..ir.program import Program
from ..ir.schedule import Schedule
from ..ir.types import Buffer, BufferKind
from .accesses import names
from .tables import ARENA_OFFSET, BINDING_SHIFT, slices

MAX_THREADS = 1024
"""Threads of a block, on every target."""


def check_limits(p: Program, target: object | None) -> None:
    """S4: shared memory and threads fit; kernel parameters too."""
    if not 0 < p.threads <= MAX_THREADS or p.threads % 32:
        raise VerificationError("S4", f"{p.threads} threads per worker: not a multiple of 32 up to {MAX_THREADS}")
    limit = getattr(target, "shared_bytes_per_block", None)
    if p.shared_bytes < 0 or (limit is not None and p.shared_bytes > limit):
        name = getattr(target, "name", "")
        raise VerificationError("S4", f"{p.shared_bytes} bytes of shared memory; {name} offers {limit}")
    if target is not None and p.target not in (getattr(target, "name", None), getattr(target, "arch", None)):
        raise VerificationError("S4", f"the program is for {p.target}, not {getattr(target, 'name', '')}")
    if len(p.bindings) > abi.MAX_BINDINGS:
        raise VerificationError("S4", f"{len(p.bindings)} bindings; a launch carries {abi.MAX_BINDINGS}")


def check_queues(s: Schedule, tables: Mapping[str, np.ndarray]) -> np.ndarray:
    """P1 for queues: worker by worker the ids of the Schedule. Place of each task id in the task table."""
    queues, tasks = tables["queues"], tables["tasks"]
    if len(queues) != s.workers:
        raise VerificationError("P1", f"{len(queues)} queues for {s.workers} workers")
    start, length = slices(queues, "task", "task_count", tasks, "queue")
    place = np.full(len(s.tasks.tasks), -1, dtype=np.int64)
    for w, queue in enumerate(s.queues):
        ids = tasks["id"][start[w] : start[w] + length[w]]
        want = np.array(queue, dtype=np.int64)
        if not np.array_equal(ids, want):
            k = next((k for k, (x, y) in enumerate(zip(ids, queue, strict=False)) if x != y), min(len(ids), len(queue)))
            found, expected = (f"t{x[k]}" if k < len(x) else "its end" for x in (ids, want))
            raise VerificationError(
                "P1", f"queue of worker {w}, place {k}: {found} in the table, {expected} in the schedule"
            )
        place[want] = start[w] + np.arange(length[w])
    return place


def check_arguments(p: Program, tables: Mapping[str, np.ndarray], place: np.ndarray) -> None:
    """P1 for arguments: the tile, what the body is told besides, and zeros. A linear has its segments alone, in the
    last two places, which the rules of the loader look at."""
    s = p.schedule
    for t, arg in zip(s.tasks.tasks, tables["tasks"]["arg"][place].tolist(), strict=True):
        if t.op == "linear":
            want, arg = [0] * 6, arg[:6]
        else:
            want = [*t.tile, *(0,) * (len(arg) - len(t.tile))]
            for at, value in p.calls[t.node, t.op].arguments.items():
                want[at] = value
        if arg != want:
            raise VerificationError("P1", f"{names(s.tasks, [t.id])} has arguments {arg}, not {want}")


def check_opcodes(p: Program, tables: Mapping[str, np.ndarray], place: np.ndarray) -> None:
    """P2: each task's opcode selects a body of its operator, the one made for its node."""
    ops = tables["tasks"]["op"][place]
    beyond = ops >= len(p.kinds)
    if beyond.any():
        t = int(np.argmax(beyond))
        raise VerificationError("P2", f"{names(p.schedule.tasks, [t])} has opcode {ops[t]} of {len(p.kinds)}")
    families = [k.split(":")[0] for k in p.kinds]
    for t, op in zip(p.schedule.tasks.tasks, ops.tolist(), strict=True):
        if families[op] != t.op:
            text = f"{names(p.schedule.tasks, [t.id])}, a {t.op}, has opcode {op}, which is {p.kinds[op]}"
            raise VerificationError("P2", text)
        call = p.calls.get((t.node, t.op))
        if call is None or op != call.opcode:
            made = "none" if call is None else p.kinds[call.opcode]
            text = f"{names(p.schedule.tasks, [t.id])} has opcode {op}, which is {p.kinds[op]}; its node's is {made}"
            raise VerificationError("P2", text)


def check_waits(p: Program, tables: Mapping[str, np.ndarray], place: np.ndarray) -> None:
    """P1 for waits and signals, and T7: a wait demands as many signals as the event has producers."""
    s = p.schedule
    rows = tables["tasks"][place]
    wait_start, wait_count = slices(rows, "waits", "wait_count", tables["waits"], "waits of task")
    signal_start, signal_count = slices(rows, "signals", "signal_count", tables["signals"], "signals of task")
    if (wait_count > abi.MAX_WAITS).any():
        t = int(np.argmax(wait_count))
        raise VerificationError(
            "P1", f"{names(s.tasks, [t])} waits for {wait_count[t]} events of at most {abi.MAX_WAITS}"
        )
    slot, count, out = (
        x.tolist() for x in (tables["waits"]["slot"], tables["waits"]["count"], tables["signals"]["slot"])
    )
    full = {s.slots[e.id]: len(e.producers) for e in s.tasks.events}
    if _as_declared(s, tables, (wait_start, wait_count), (signal_start, signal_count)):
        return
    for t, (waits, signals) in enumerate(zip(s.tasks.waits(), s.tasks.signals(), strict=True)):
        here = slice(wait_start[t], wait_start[t] + wait_count[t])
        for found, needed in zip(slot[here], count[here], strict=True):
            if full.get(found) != needed:
                text = f"{names(s.tasks, [t])} waits for {needed} signals in slot {found}"
                text += f"; its event has {full.get(found, 'no')} producers"
                raise VerificationError("T7", text)
        given = out[signal_start[t] : signal_start[t] + signal_count[t]]
        for what, has, wants in (("waits for", slot[here], waits), ("signals", given, signals)):
            if sorted(has) != sorted(s.slots[e] for e in wants):
                expected = sorted(s.slots[e] for e in wants)
                raise VerificationError("P1", f"{names(s.tasks, [t])} {what} slots {sorted(has)}, not {expected}")


Slices = tuple[np.ndarray, np.ndarray]
"""Start and length of each task's entries in a table."""


def _as_declared(s: Schedule, tables: Mapping[str, np.ndarray], waits: Slices, signals: Slices) -> bool:
    """Whether the tables hold each event's waiters, with its count, and producers, and no more. Where they do not, the
    caller finds out for which task."""
    lists = [e.waiters for e in s.tasks.events] + [e.producers for e in s.tasks.events]
    slots = [s.slots[e.id] for e in s.tasks.events]
    counts = [len(e.producers) for e in s.tasks.events]
    task = np.fromiter(chain.from_iterable(lists), dtype=np.int64)
    lengths = [len(x) for x in lists]
    slot, count = (np.repeat(np.array([*x, *x], dtype=np.int64), lengths) for x in (slots, counts))
    split_at = sum(lengths[: len(slots)])
    for at, (start, length), table in ((0, waits, tables["waits"]), (1, signals, tables["signals"])):
        owner = np.repeat(np.arange(len(start)), length)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length) + np.repeat(start, length)
        mine = slice(split_at, None) if at else slice(0, split_at)
        have = [owner, table["slot"][place].astype(np.int64)]
        want = [task[mine], slot[mine]]
        if not at:
            have.append(table["count"][place].astype(np.int64))
            want.append(count[mine])
        if not np.array_equal(*(np.stack(x)[:, np.lexsort(x[::-1])] for x in (have, want))):
            return False
    return True


def check_operands(p: Program, tables: Mapping[str, np.ndarray], place: np.ndarray) -> None:
    """P3: operands are starts of the buffers that the body expects, in its order; these are buffers that tasks of the
    node use, and none that the task uses is missing. Weights may come through the loader alone."""
    s = p.schedule
    buffers = s.tasks.buffers
    rows = tables["tasks"][place]
    start, count = slices(rows, "operands", "operand_count", tables["operands"], "operands of task")
    if (count > abi.MAX_OPERANDS).any():
        t = int(np.argmax(count))
        text = f"{names(s.tasks, [t])} has {count[t]} operands of at most {abi.MAX_OPERANDS}"
        raise VerificationError("P1", text)
    owner = _owners(p)
    binding = {name: i for i, name in enumerate(p.bindings)}
    storage = {name: b.storage for name, b in buffers.items()}
    starts, counts = start.tolist(), count.tolist()
    by_node: list[set[str]] = [set() for _ in s.tasks.graph.nodes]
    needed: dict[tuple[int, str], set[str]] = {}
    first: dict[tuple[int, str, int, int], int] = {}
    for t in s.tasks.tasks:
        used = {storage[a.buffer] for a in (*t.reads, *t.writes)}
        by_node[t.node] |= used
        needed.setdefault((t.node, t.op), set()).update(used)
        first.setdefault((t.node, t.op, starts[t.id], counts[t.id]), t.id)
    for (node, op, at, n), t in first.items():
        refs = [int(x) for x in tables["operands"]["ref"][at : at + n]]
        for k, ref in enumerate(refs):
            if ref != abi.NO_REF and not owner.get(ref, set()) & by_node[node]:
                text = f"operand {k} of {names(s.tasks, [t])} refers to {_where(p, ref, owner)}; the node uses "
                raise VerificationError("P3", text + f"{sorted(by_node[node])}")
        given = set().union(*(owner[ref] for ref in refs if ref != abi.NO_REF))
        expected = [_reference(p, binding, buffers[name]) for name in p.calls[node, op].operands]
        if refs != expected:
            k = next((k for k, (x, y) in enumerate(zip(refs, expected, strict=False)) if x != y), min(n, len(expected)))
            found = _where(p, refs[k], owner) if k < n else "nothing"
            wanted = p.calls[node, op].operands[k] if k < len(expected) else "nothing"
            text = f"operand {k} of {names(s.tasks, [t])} refers to {found}; its body expects {wanted}"
            raise VerificationError("P3", text)
        graph_node = s.tasks.graph.nodes[node]
        ring = isinstance(graph_node, Linear) and not graph_node.transposed
        streamed = {w for part in graph_node.parts for w in part.weights} if ring else set()
        missing = needed[node, op] - given - {buffers[w].storage for w in streamed}
        if missing:
            text = f"no operand of {names(s.tasks, [t])} refers to {sorted(missing)}, which it uses"
            raise VerificationError("P3", text)


def _reference(p: Program, binding: Mapping[str, int], b: Buffer) -> int:
    if b.kind is BufferKind.SCRATCH:
        flag = abi.FLAGGED_REF if b.storage in p.schedule.tasks.flagged else 0
        return abi.ARENA_REF | flag | p.schedule.arena[b.storage]
    return binding.get(b.storage, -1) << BINDING_SHIFT


def _owners(p: Program) -> dict[int, set[str]]:
    """Storages by the reference of their first byte. Several scratch buffers may start at one place; flagged ones
    are marked as such, for the device to choose the set and the way to read."""
    owner: dict[int, set[str]] = {}
    for name, offset in p.schedule.arena.items():
        flag = abi.FLAGGED_REF if name in p.schedule.tasks.flagged else 0
        owner.setdefault(abi.ARENA_REF | flag | offset, set()).add(name)
    for i, b in enumerate(bound_buffers(p, p.schedule.tasks.buffers)):
        owner[i << BINDING_SHIFT] = {b.storage}
    return owner


def _where(p: Program, ref: int, owner: Mapping[int, set[str]]) -> str:
    if ref in owner:
        return " or ".join(sorted(owner[ref]))
    if ref & abi.ARENA_REF:
        kind = "flagged" if ref & abi.FLAGGED_REF else "plain"
        return f"{kind} byte {ref & ARENA_OFFSET} of an arena of {p.schedule.arena_bytes}, where no such buffer starts"
    binding, offset = ref >> BINDING_SHIFT, ref & ((1 << BINDING_SHIFT) - 1)
    return f"byte {offset} of binding {binding} of {len(p.bindings)}, where no buffer starts"


def bound_buffers(p: Program, buffers: Mapping[str, Buffer]) -> list[Buffer]:
    bound = []
    for i, name in enumerate(p.bindings):
        b = buffers.get(name)
        if b is None or b.name != b.storage or b.kind is BufferKind.SCRATCH:
            raise VerificationError("P3", f"binding {i}, {name!r}, is no tensor of the caller and no output")
        if name in p.bindings[:i]:
            raise VerificationError("P3", f"binding {i}, {name!r}, appears twice")
        bound.append(b)
    return bound


def span(b: Buffer) -> int:
    """Bytes from the first to past the last element."""
    if not b.numel:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(b.shape, b.strides, strict=True))
    return (last + 1) * b.dtype.itemsize
