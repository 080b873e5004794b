"""Which buffers are their own flags: readers poll the data itself instead of waiting for an event.

A dense vector that goes from all workers to all workers is the critical edge of a decode step. With an event it costs
three trips through the memory system: the store, the signal behind it, the load after the poll has seen the signal.
Polling the data costs two. So every intermediate result is flagged that can be:

- SCRATCH of one version: flagged memory is cleared between launches and never reused within one, which only memory
  of our own can be;
- bf16, f16 or f32: the sentinel, all bits one, is a NaN that no writer produces. Integers and bools have no spare
  value;
- each element written exactly once, where the task list says: an element nobody writes would be polled for ever, one
  written twice could be seen too early;
- read by a task, but not by one that writes it;
- no keys or values of an attention, which reads them in vectors without looking for the sentinel;
- not touched by an operator from outside this package, which need not know how to poll and publish;
- small: it takes its own memory, twice, for the whole launch, and every launch clears it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...ir.expr import Expr, loads
from ...ir.graph import Attention, ExtensionNode, Linear, Node
from ...ir.region import box_size
from ...ir.tasks import TaskGraph
from ...ir.types import Buffer, BufferKind, DType

MAX_BYTES = 1 << 20
"""Largest flagged buffer. The widest activation of a 70B model at batch 16 has 0.9 MB; clearing 1 MB takes a fifth of
a microsecond of the whole device's bandwidth, less than an event edge costs more than a flagged one."""

DTYPES = frozenset((DType.BF16, DType.F16, DType.F32))

WRITERS = frozenset(("linear", "attention", "attention_combine", "row_map"))
"""Task kinds that publish whole elements, with the sentinel replaced should a result have its bits."""


def choose_flagged(tg: TaskGraph) -> TaskGraph:
    """The same tasks with `flagged` set, for `derive_events` to leave these edges out. Existing events are dropped:
    they may order more than is needed now."""
    return replace(tg, flagged=flaggable(tg), events=())


def flaggable(tg: TaskGraph) -> frozenset[str]:
    """Every storage that may be flagged, whether it pays or not."""
    sharing: dict[str, list[Buffer]] = {}
    for b in tg.buffers.values():
        sharing.setdefault(b.storage, []).append(b)
    candidates = {bs[0].name: bs[0] for bs in sharing.values() if len(bs) == 1 and _fits(bs[0])}
    for node in tg.graph.nodes:
        if isinstance(node, Attention):
            for name in (node.keys, node.values):
                candidates.pop(tg.buffers[name].storage, None)
        for name, store in _stores(node):
            if name in candidates and any(loads(e) for e in store):
                del candidates[name]
    written, read = dict.fromkeys(candidates, 0), set()
    for task in tg.tasks:
        mine = {a.buffer for a in task.writes}
        foreign = isinstance(tg.graph.nodes[task.node], ExtensionNode)
        for a in task.reads:
            if foreign or a.buffer in mine:
                candidates.pop(a.buffer, None)
            read.add(a.buffer)
        for a in task.writes:
            if a.buffer in candidates:
                written[a.buffer] += box_size(a.box)
                if foreign or task.op not in WRITERS or a.side is not None:
                    del candidates[a.buffer]
    # the verifier proves that written boxes are disjoint; then equal sizes say that nothing is left out
    return frozenset(b.storage for b in candidates.values() if b.name in read and written[b.name] == b.numel)


def _fits(b: Buffer) -> bool:
    return b.kind is BufferKind.SCRATCH and b.dtype in DTYPES and 0 < b.nbytes <= MAX_BYTES


def _stores(node: Node) -> Iterator[tuple[str, tuple[Expr, ...]]]:
    if isinstance(node, Linear):
        yield from ((p.out, p.store) for p in node.parts)
    elif not isinstance(node, ExtensionNode):
        yield node.out, node.store
    if isinstance(node, Attention) and node.append:
        yield node.append.keys, node.key_index
        yield node.append.values, node.value_index
