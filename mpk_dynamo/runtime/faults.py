"""A fault record, as the device wrote it, in the words of the user's model."""

from __future__ import annotations

from collections.abc import Mapping

from .. import abi
from ..errors import DeviceFault
from ..ir.program import Program
from ..ir.tasks import TaskGraph, task_name

_SIZE_KINDS = (3, 4)  # kinds whose `needed` is a size and `seen` an index
_UNPUBLISHED, _STEP = 5, 6
_REMEDIES = {
    0: "raise timeout_s if other work occupies the GPU; otherwise please report this with the dump directory",
    1: "please report this with the dump directory",
    2: "please report this with the dump directory",
    3: "allocate a larger cache (max_cache_len)",
    4: "check token ids and positions against the sizes of the model",
    5: "raise timeout_s if other work occupies the GPU; otherwise please report this with the dump directory",
    6: "raise timeout_s if other work occupies the GPU; otherwise please report this with the dump directory",
}


def explain(record: Mapping[str, int], program: Program) -> DeviceFault:
    """The exception for a written record (fields of abi.FAULT)."""
    schedule, tg = program.schedule, program.schedule.tasks
    kind, task_id, slot = int(record["kind"]), int(record["task"]), int(record["slot"])
    needed, seen = int(record["needed"]), int(record["seen"])
    what = abi.FAULT_KINDS[kind] if kind < len(abi.FAULT_KINDS) else f"fault kind {kind}"
    origin, where = "", f"task {task_id}"
    if task_id < len(tg.tasks):
        task = tg.tasks[task_id]
        where += f" ({task_name(tg, task)})"
        origin = tg.graph.nodes[task.node].origin
    if kind in _SIZE_KINDS:
        detail = f"index {_signed(seen)}, size {needed}"
    elif kind == 0:
        detail = f"{_event_text(tg, schedule.slots, task_id, slot)}, needed {needed}, seen {seen}"
        detail += f" ({(needed - seen) & 0xFFFFFFFF} signals missing)"
    elif kind == _UNPUBLISHED:
        detail = _flagged_text(tg, task_id)
    elif kind == _STEP:
        detail = f"{seen} steps since the start, needed {needed}"
    else:
        detail = f"ring slot {slot}, needed {needed}, seen {seen}"
    message = f"worker {int(record['worker'])}, {where}: {what}: {detail}, step {int(record['epoch'])}"
    return DeviceFault(message, origin=origin, remedy=_REMEDIES.get(kind, _REMEDIES[1]))


def _event_text(tg: TaskGraph, slots: tuple[int, ...], task_id: int, slot: int) -> str:
    """The event behind a slot, and who should have signalled it."""
    events = [e for e in tg.events if slots[e.id] == slot]
    event = next((e for e in events if task_id in e.waiters), events[0] if events else None)
    if event is None:
        return f"event slot {slot} (of no known event)"
    names = [task_name(tg, tg.tasks[t]) for t in event.producers[:3]]
    more = f" and {len(event.producers) - 3} more" if len(event.producers) > 3 else ""
    return f"event {event.id} in slot {slot}, which {', '.join(names)}{more} signal"


def _flagged_text(tg: TaskGraph, task_id: int) -> str:
    """What a task polls, and who should have written it."""
    if task_id >= len(tg.tasks):
        return "of no known task"
    polled = list(
        dict.fromkeys(a.buffer for a in tg.tasks[task_id].reads if tg.buffers[a.buffer].storage in tg.flagged)
    )
    writers = [t for t in tg.tasks if any(a.buffer in polled for a in t.writes)]
    names = ", ".join(task_name(tg, t) for t in writers[:3])
    more = f" and {len(writers) - 3} more" if len(writers) > 3 else ""
    return f"an element of {' or '.join(polled) or 'no buffer'}, written by {names or 'nobody'}{more}"


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
