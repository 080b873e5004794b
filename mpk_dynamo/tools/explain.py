"""What the backend would do with a model call, and why: everything but the launch, on any machine."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import abi
from ..dump import Dump
from ..errors import Unsupported
from ..ir.expr import Load
from ..ir.graph import Attention
from ..pipeline import build, capture_graph, emit, lower
from ..report import Report
from ..settings import Settings
from ..split import split
from .predicted import load_profile, predicted_rows

if TYPE_CHECKING:
    from ..capture import Captured
    from ..ir.program import Program
    from ..ir.tasks import TaskGraph
    from ..targets import Target


@dataclass
class GraphExplanation:
    """One graph of the call, or one piece of a graph that was split. missing: operators that capture has no lowering
    for -> how often they occur. bodies: task body -> what it takes when it stands alone, and where in the model it is
    first used. pieces: of a graph that was split, those that become programs. masks: what each mask costs. timing: step
    and edges, predicted and measured, as (name, text)."""

    report: Report
    bodies: dict[str, str] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    pieces: "list[GraphExplanation]" = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    timing: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Explanation:
    """The graphs that Dynamo made of one call, in order, and the target they were lowered for. `str()` is a report."""

    graphs: tuple[GraphExplanation, ...]
    target: "Target"

    def __str__(self) -> str:
        if not self.graphs:
            return "Dynamo made no graph of this call: it ran eagerly (see TORCH_LOGS=graph_breaks)"
        lines = []
        if len(self.graphs) > 1:
            lines.append(f"{len(self.graphs)} graphs: the model breaks (TORCH_LOGS=graph_breaks says where)")
        for number, graph in enumerate(self.graphs, 1):
            lines += [f"graph {number} of {len(self.graphs)}", *_describe(graph, self.target)]
            for k, piece in enumerate(graph.pieces, 1):
                lines += [f"graph {number}, program {k} of {len(graph.pieces)}", *_describe(piece, self.target)]
        return "\n".join(lines)


def explain(
    model: Callable[..., Any],
    *args: Any,
    target: str = "",
    workers: int = 0,
    dump_dir: str = "",
    profile: str = "",
    live: int | None = None,
    **kwargs: Any,
) -> Explanation:
    """Capture, lower, verify and build `model(*args, **kwargs)` for `target`; the call itself runs eagerly, once,
    without gradients (a cache that is passed advances).

    `target`: a GPU ("h200") or an architecture ("sm_90a"); default the present GPU, else the reference executor,
    for which no kernel is built. `profile`: figures that the command `profile --json` wrote, to stand beside what is
    predicted. `live`: keys in the caches, for the prediction; default: as many as fit. Raises what compiling would,
    except Unsupported, which is part of the result.
    """
    from ..targets import detect, known, reference_target

    if target:
        chosen = known(target)
    else:
        chosen = detect() if torch.cuda.is_available() else reference_target(workers or 8)
    settings = Settings.from_options({"dump_dir": dump_dir})
    measured = load_profile(profile) if profile else None
    graphs: list[GraphExplanation] = []

    def inspect(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        found = GraphExplanation(Report(fx_nodes=sum(n.op.startswith("call_") for n in gm.graph.nodes)))
        graphs.append(found)
        dump = Dump(settings.dump_dir, gm, found.report)
        try:
            captured = capture_graph(gm, example_inputs, found.report, dump)
        except Unsupported as why:
            _explain_split(gm, example_inputs, found, dump, why, explain_program)
        else:
            explain_program(captured, found, dump)
        return gm.forward

    def explain_program(captured: "Captured", found: GraphExplanation, dump: Dump) -> None:
        schedule = lower(captured.graph, workers or chosen.sm_count, chosen, found.report, dump)
        found.masks = _masks(schedule.tasks)
        if chosen.is_gpu:
            found.timing = predicted_rows(schedule, chosen, measured, live)
            program = emit(schedule, chosen, found.report, dump)
            with found.report.stage("nvrtc"):
                build(program, chosen, settings, found.report)
            found.bodies = _resources(program, chosen, settings)

    with torch.no_grad():
        torch.compile(model, backend=inspect, dynamic=False)(*args, **kwargs)
    return Explanation(tuple(graphs), chosen)


def _explain_split(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    found: GraphExplanation,
    dump: Dump,
    why: Unsupported,
    explain_program: "Callable[[Captured, GraphExplanation, Dump], None]",
) -> None:
    """Pieces of a graph that is refused for `why`, or why there are none."""
    report = found.report
    try:
        if why.passing:
            raise why
        made = split(gm, example_inputs, report, dump, symbols=False)
    except Unsupported as reason:
        report.blame(reason)
        found.missing = _missing(gm, example_inputs)
        return
    for piece in made.captured:
        assert piece.captured is not None
        found.pieces.append(GraphExplanation(piece.report))
        explain_program(piece.captured, found.pieces[-1], piece.dump)
    report.left_out, report.small, report.remedies = made.left_out(), made.small, made.remedies()
    report.outcome = f"{len(made.captured)} of {len(made.pieces)} pieces are programs"


def _missing(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, int]:
    """ATen operators of the graph without a lowering; empty when the graph cannot even be retraced."""
    from ..capture.registry import LOWERINGS
    from ..capture.retrace import retrace

    try:
        traced = retrace(gm, example_inputs)
    except Unsupported:
        return {}
    calls = (n.target for n in traced.graph.nodes if n.op == "call_function")
    names = (t._schema.name.split("::")[-1] for t in calls if isinstance(t, torch._ops.OpOverload))
    return dict(Counter(name for name in names if name not in LOWERINGS))


def _masks(tg: "TaskGraph") -> list[str]:
    """For each mask, what finding the live keys reads, for how many Attentions, and what is read of their caches."""
    nodes = tg.graph.nodes
    users: dict[str, list[Attention]] = {}
    unknown = 0
    for node in nodes:
        if isinstance(node, Attention):
            if isinstance(node.first, Load):
                users.setdefault(node.first.buffer, []).append(node)
            elif node.mask is not None:
                unknown += 1
    out = []
    for name, attentions in users.items():
        finding = [t for t in tg.tasks if nodes[t.node].name == name]
        size, kind = sum(t.bytes for t in finding), attentions[0].mask.dtype.value  # type: ignore[union-attr]
        out.append(
            f"{kind}, shared by {len(attentions)} attentions of {attentions[0].s.size} keys: {len(finding)} tasks find "
            f"the live keys once per call ({size} bytes); keys outside their range are not read, holes inside it are"
        )
    if unknown:
        out.append(f"{unknown} attentions apply one to every key, without a range of live ones")
    return out


def _resources(program: "Program", target: "Target", settings: Settings) -> dict[str, str]:
    """Registers, spills and instructions of each task body by itself: in the kernel, bodies inlined side by side share
    registers. The instructions are those that the kernel without any body has not."""
    from ..codegen import isolated
    from ..runtime import build as build_program
    from ..runtime.disassembly import describe, instructions, nvdisasm

    tg = program.schedule.tasks
    opcodes = np.frombuffer(program.tables["tasks"], abi.TASK.dtype)
    tasks = sorted(opcodes, key=lambda t: int(t["id"]), reverse=True)
    first = {int(t["op"]): tg.graph.nodes[tg.tasks[int(t["id"])].node] for t in tasks}
    alone = isolated(program)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC does not hold the interpreter's lock
        cache = settings.cache_dir or None
        jobs = {k: pool.submit(build_program, p, target, cache_dir=cache) for k, p in alone.items()}
    found = {}
    none = jobs.pop("").result()
    base = instructions(none.cubin) if nvdisasm() else None
    for i, (kind, job) in enumerate(jobs.items()):
        r = job.result().report
        spills = f"{r.spill_store_bytes}/{r.spill_load_bytes} bytes spilled"
        found[kind] = f"{r.registers} registers, {spills}, first at {first[i].origin or first[i].name}"
        if base is not None:
            own = instructions(job.result().cubin)
            own.subtract(base)
            found[f"{kind} code"] = describe(own)
    if base is not None:
        found["no body"] = f"{none.report.registers} registers; {describe(base)}"
    return found


def _describe(graph: GraphExplanation, target: "Target") -> list[str]:
    r = graph.report
    rows = [("Dynamo's graph", f"{r.fx_nodes} calls")]
    if r.reason:
        rows += [("not captured", r.reason), ("place", r.origin or "unknown")]
        rows += [("what to do", line) for line in r.remedies]
        if graph.missing:
            rows.append(("no lowering for", _counts(graph.missing)))
    elif graph.pieces:
        rows.append(("split", r.outcome))
        rows += [("outside", f"{n} nodes: {why}") for why, n in r.left_out.items()]
        rows += [("what to do", line) for line in r.remedies]
        rows += [("not worth it", line) for line in r.small]
    else:
        rows += [
            ("captured", f"all, as {r.captured_nodes} nodes"),
            ("after fusion", f"{r.graph_nodes} nodes: {_counts(r.node_kinds)}"),
            ("tasks", f"{r.tasks}: {_counts(r.task_kinds)}"),
            ("events", f"{r.events} counters, {r.edges} edges"),
            ("flagged buffers", f"{r.flagged}, polled by their readers"),
            ("workers", f"{r.workers}"),
            ("scratch arena", f"{r.arena_bytes / 1e3:.1f} kB"),
            ("work per call", f"{r.bytes / 1e6:.1f} MB, {r.flops / 1e9:.2f} GFLOP"),
        ]
        rows += [("mask", text) for text in graph.masks]
        if target.is_gpu:
            floor = r.bytes / target.bandwidth * 1e3
            rows.append(("roofline", f"{floor:.3f} ms at the datasheet's {target.bandwidth / 1e12:.2f} TB/s"))
            rows += graph.timing
            rows.append(("kernel", f"{target.name}: {r.resources}"))
            rows += [(f"  {kind}", text) for kind, text in graph.bodies.items()]
        else:
            rows.append(("kernel", "none: no GPU here; name a target to build one, e.g. sm_90a"))
        rows.append(("compile time", ", ".join(f"{name} {s:.2f} s" for name, s in r.seconds.items())))
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))
