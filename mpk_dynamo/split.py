"""A graph that cannot be captured as a whole, in pieces: captured ones become programs, the others go to the fallback.

Which nodes cannot be captured is found out all at once (capture/survey.py); a piece that turns out to be refused for
want of its surroundings adds to them, and the graph is cut again. A piece is worth a launch when it saves more than
one: bytes are streamed either way, so what counts is the number of kernels that a compiler like Inductor would launch
for it, one less where the piece keeps two others apart that would otherwise be one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .dump import Dump
from .errors import Unsupported
from .pipeline import capture_graph
from .report import Report
from .specialize import NUMBERS, fix_numbers, kept_symbols, without_symbols

if TYPE_CHECKING:
    from .capture import Captured
    from .capture.partition import Part, Piece
    from .capture.survey import Survey

ROUNDS = 8
"""How often a graph is cut anew before what is still refused is given up."""

SYMBOLIC = "a size that changes from call to call"
PER_CALL = "use a static cache and hand in position_ids, as generate() does"


@dataclass
class Program:
    """One piece as a module of its own. captured: None for what runs outside; report, dump: of a captured one.
    strides: of its outputs, as the graph has them."""

    part: "Part"
    captured: "Captured | None"
    report: Report
    dump: Dump
    strides: list[tuple[int, ...]]


@dataclass
class Split:
    """Pieces in the order in which they run. end: makes the graph's results of theirs. refused: why nodes are in no
    captured piece. small: the same for pieces that are not worth it, one line each. values: what nodes give, at the
    sizes that were looked at. symbols: whether pieces outside take sizes as they come."""

    pieces: list[Program]
    end: "Part"
    refused: dict[fx.Node, Unsupported]
    small: list[str]
    values: dict[fx.Node, Any]
    symbols: bool

    @property
    def captured(self) -> list[Program]:
        return [p for p in self.pieces if p.captured is not None]

    def left_out(self) -> dict[str, int]:
        """Reasons, each with its first place, and how many nodes they concern."""
        first: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for why in self.refused.values():
            counts[first.setdefault(why.message, f"{why.message} at {why.origin}" if why.origin else why.message)] += 1
        return dict(counts)

    def remedies(self) -> list[str]:
        return list(dict.fromkeys(why.remedy for why in self.refused.values()))


def split(gm: fx.GraphModule, example_inputs: Sequence[Any], report: Report, dump: Dump, *, symbols: bool) -> Split:
    """Cut `gm` so that most of it can be captured. `symbols`: whether sizes with symbols stay such, and what depends on
    those that change with each call is left out; otherwise they are taken at their present values, and `gm` has none
    among its inputs. Raises Unsupported for what concerns the whole graph, and when no piece is worth being captured.
    """
    from .capture.partition import Partition

    with report.stage("split"):
        found = look_at(gm, example_inputs) if symbols else survey_of(gm, example_inputs)
    if passing := next((why for why in found.refused.values() if why.passing), None):
        raise passing
    small: set[fx.Node] = set()
    lines: list[str] = []
    for _ in range(ROUNDS):
        with report.stage("split"):
            cuts = Partition(gm, found)
            pieces = cuts.pieces({*found.refused, *small})
            while poor := {k: text for k in range(len(pieces)) if (text := _not_worth(pieces, k, found))}:
                k = min(poor, key=lambda k: len(pieces[k].nodes))
                small.update(pieces[k].nodes)
                lines.append(poor[k])
                pieces = cuts.pieces({*found.refused, *small})
            if not any(p.captured for p in pieces):
                raise _worst(found, lines)
            parts, end = cuts.parts(pieces)
        made, refused = _capture_parts(gm, pieces, parts, example_inputs, found, report, dump)
        if not refused:
            return Split(made, end, found.refused, lines, found.values, symbols)
        found.refused.update(refused)
    raise Unsupported(f"the graph was cut {ROUNDS} times, and pieces are still refused", remedy="please report this")


def _worst(found: "Survey", lines: list[str]) -> Unsupported:
    """The first refusal of the graph, with what the rest is not worth."""
    why = next(iter(found.refused.values()))
    if not lines:
        return why
    text = f"{why.message}; the rest is not worth a launch: {lines[0]}"
    return Unsupported(text, origin=why.origin, remedy=why.remedy)


def survey_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> "Survey":
    """The survey of a graph without symbols."""
    from .capture.survey import survey

    with without_symbols():
        return survey(gm, example_inputs)


def look_at(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> "Survey":
    """The survey of a graph at its present sizes, in which nodes that take or give ones that change with each call are
    refused."""
    from .capture.partition import symbolic_sizes

    fixed, inputs, _, origin = fix_numbers(gm, example_inputs)
    found = survey_of(fixed, inputs).moved(origin)
    placeholders = (n for n in gm.graph.nodes if n.op == "placeholder")
    found.values.update({n: v for n, v in zip(placeholders, example_inputs, strict=True) if isinstance(v, NUMBERS)})
    kept = kept_symbols(gm)
    for node in gm.graph.nodes:
        sizes = [s for n in (node, *node.all_input_nodes) for s in symbolic_sizes(n)]
        moves = any(not s.node.expr.free_symbols <= kept for s in sizes)
        if node.op.startswith("call_") and moves and not isinstance(node.meta.get("example_value"), NUMBERS):
            found.refused[node] = _symbolic(node)
    return found


def _symbolic(node: fx.Node) -> Unsupported:
    from .capture.retrace import place_of

    name = getattr(node.target, "__name__", str(node.target))
    return Unsupported(f"{name}: {SYMBOLIC}", origin=place_of(node), remedy=PER_CALL)


def _not_worth(pieces: "Sequence[Piece]", k: int, found: "Survey") -> str:
    """Why a captured piece is not worth a launch, or ""."""
    from .capture.retrace import module_path, place_of

    piece = pieces[k]
    if not piece.captured or len(pieces) == 1:
        return ""
    kernels = len({key for n in piece.nodes for key in found.work.get(n, ())})
    joins = 1 if 0 < k < len(pieces) - 1 else 0
    if kernels - joins > 1:
        return ""
    size = sum(found.bytes.get(n, 0) for n in piece.nodes)
    first = piece.nodes[0]
    modules = list(dict.fromkeys(m for n in piece.nodes if (m := module_path(n))))
    where = place_of(first) if len(modules) < 2 else f"{modules[0]} to {modules[-1]}"
    apart = ", and keeps two pieces outside apart" if joins else ""
    nodes = f"{len(piece.nodes)} node{'s' * (len(piece.nodes) > 1)}"
    return f"{nodes} at {where}: one launch in place of {kernels}, {size / 1e6:.1f} MB{apart}"


def _capture_parts(
    gm: fx.GraphModule,
    pieces: "list[Piece]",
    parts: "list[Part]",
    example_inputs: Sequence[Any],
    found: "Survey",
    report: Report,
    dump: Dump,
) -> tuple[list[Program], dict[fx.Node, Unsupported]]:
    """All pieces, captured where they are to be, and the nodes at which that fails."""
    given = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
    mode = FakeTensorMode()
    out: list[Program] = []
    refused: dict[fx.Node, Unsupported] = {}
    by_name = {n.name: n for n in gm.graph.nodes}
    for number, (piece, part) in enumerate(zip(pieces, parts), 1):
        own = Report(fx_nodes=len(piece.nodes))
        captured = None
        own_dump = dump.piece(number, part.module, own)
        if piece.captured:
            inputs = [given[n] if n in given else stand_in(found.values[n], mode) for n in part.inputs]
            try:
                with without_symbols():
                    captured = capture_graph(part.module, inputs, own, own_dump)
            except Unsupported as why:
                refused.update(_refused_in(part.module, inputs, piece, by_name, why))
        out.append(Program(part, captured, own, own_dump, [found.values[n].stride() for n in part.outputs]))
    return out, refused


def _refused_in(
    module: fx.GraphModule, inputs: list[Any], piece: "Piece", by_name: dict[str, fx.Node], why: Unsupported
) -> dict[fx.Node, Unsupported]:
    from .capture.survey import survey

    try:
        with without_symbols():
            found = survey(module, inputs).refused
    except Unsupported:
        found = {}
    # a copy has the name of its node
    named = {by_name[n.name]: reason for n, reason in found.items() if n.name in by_name}
    return named or {n: why for n in piece.nodes}


def stand_in(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor of `mode` with the sizes of `value`, which may be symbolic."""
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def add_up(report: Report, parts: Sequence[Report]) -> None:
    """The numbers of a split graph: the sums over its programs."""
    report.programs = list(parts)
    for f in fields(Report):
        values = [getattr(p, f.name) for p in parts]
        if f.name in ("fx_nodes", "calls", "workers", "programs", "outside", "left_out", "small", "recompile"):
            continue
        if isinstance(getattr(report, f.name), int):
            setattr(report, f.name, sum(values))
        elif isinstance(getattr(report, f.name), dict):
            setattr(report, f.name, dict(sum(map(Counter, values), Counter(getattr(report, f.name)))))
    report.workers = max(p.workers for p in parts)
    report.device, report.target = parts[0].device, parts[0].target
    report.resources = "; ".join(dict.fromkeys(p.resources for p in parts if p.resources))
