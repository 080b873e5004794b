"""Programs to break: the decode steps of tiny models of real families, lowered like any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...ir.graph import Graph
from ...ir.program import Program
from ...ir.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from ...targets import Target

WORKERS, PROMPT, CACHE = 6, 5, 64
"""Workers: so few that queues are long and memory is reused. Cache: two ranges of keys per head."""


@dataclass(frozen=True)
class Subject:
    """A valid program at every stage of the pipeline. name: family and batch, as in `llama:1`."""

    name: str
    graph: Graph
    schedule: Schedule
    program: Program
    target: "Target"


def subject(name: str, target_name: str = "sm_90a") -> Subject:
    """Raises OptionError for an unknown family or batch, VerificationError when the program itself is refused."""
    import torch

    from ...dump import Dump
    from ...errors import OptionError
    from ...pipeline import capture_graph, emit, lower
    from ...report import Report
    from ...targets import known
    from ..decoder import Decoder
    from ..families import FAMILIES, build

    family, _, batch = name.partition(":")
    if family not in FAMILIES or not (batch or "1").isdigit():
        raise OptionError(f"no model {name!r}", remedy=f"FAMILY or FAMILY:BATCH; families: {', '.join(FAMILIES)}")
    target, made = known(target_name), []

    def keep(gm: "torch.fx.GraphModule", example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        report = Report()
        dump = Dump("", gm, report)
        captured = capture_graph(gm, example_inputs, report, dump).graph
        schedule = lower(captured, WORKERS, target, report, dump)
        program = emit(schedule, target, report, dump)
        made.append(Subject(name, schedule.tasks.graph, schedule, program, target))
        return gm.forward

    decoder = Decoder(build(family), batch=int(batch or 1), prompt=PROMPT, max_cache=CACHE, steps=1)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(decoder.model, backend=keep, dynamic=False)(**decoder.steps[0])
    return max(made, key=lambda s: len(s.schedule.tasks.tasks))
