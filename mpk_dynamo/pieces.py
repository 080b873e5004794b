"""Compiling a split graph: programs and fallback pieces behind one callable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext

from .errors import Unsupported
from .fallback import choice_of, compile_outside
from .ir.types import BufferKind
from .pipeline import Place, compile_captured
from .report import Report
from .settings import Settings
from .split import Program, Split, add_up, stand_in

_log = logging.getLogger("mpk_dynamo")

Outside = dict[str, Callable[..., Any]]
"""Pieces in the fallback by their code: the programs of several sizes share them."""


@dataclass(frozen=True)
class Step:
    """One piece at run time. takes, gives: slots of its arguments and results. last: slots that nothing reads behind
    it. strides: by position, of results that a program makes contiguous and the graph does not."""

    run: Callable[..., Sequence[Any]]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    last: tuple[int, ...]
    strides: tuple[tuple[int, tuple[int, ...]], ...]


class Pieces:
    """Runs the pieces of a graph in their order; takes and returns what the graph does."""

    def __init__(self, steps: Sequence[Step], end: Step, slots: int, report: Report) -> None:
        self._steps, self._end, self._more, self._report = steps, end, [None] * slots, report

    def __call__(self, *args: Any) -> Any:
        slots = [*args, *self._more]
        for step in self._steps:
            results = list(step.run(*[slots[k] for k in step.takes]))
            for k, strides in step.strides:
                results[k] = _restrided(results[k], strides)
            for k, value in zip(step.gives, results, strict=True):
                slots[k] = value
            for k in step.last:
                slots[k] = None
        self._report.calls += 1
        return self._end.run(*[slots[k] for k in self._end.takes])


def compile_pieces(
    made: Split,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    place: Place,
    settings: Settings,
    report: Report,
    outside: Outside | None = None,
) -> Callable[..., Any]:
    """A callable with the arguments and results of `gm`. outside: those pieces outside that were compiled for all sizes
    while Dynamo made the graph. One that is not among them later runs eagerly: nothing knows its symbols any more.
    Raises Unsupported when no piece has a device form."""
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    given = dict(zip(nodes, example_inputs, strict=True))
    nodes += [n for p in made.pieces for n in p.part.outputs]
    slot = {n: k for k, n in enumerate(nodes)}
    last = _last_uses(made, slot)
    choice = choice_of(settings, example_inputs)
    steps, programs = [], []
    refusal: Unsupported | None = None
    for number, piece in enumerate(made.pieces):
        run: Callable[..., Any] | None = None
        if piece.captured is not None:
            try:
                run = compile_captured(piece.captured, place, settings, piece.report, piece.dump)
                programs.append(piece.report)
            except Unsupported as why:
                refusal = refusal or why
                text = f"{why.message} at {why.origin}" if why.origin else why.message
                report.left_out[text] = report.left_out.get(text, 0) + piece.report.fx_nodes
        if run is None:
            report.outside += piece.report.fx_nodes
            run = _outside(piece, _examples(piece, given, made), choice, report, outside)
        takes = tuple(slot[n] for n in piece.part.inputs)
        gives = tuple(slot[n] for n in piece.part.outputs)
        steps.append(Step(run, takes, gives, last[number], _strides(piece)))
    if not programs:
        assert refusal is not None
        raise refusal
    add_up(report, programs)
    report.left_out = {**made.left_out(), **report.left_out}
    report.small = made.small
    report.remedies = made.remedies()
    report.outcome = f"{programs[0].outcome} and {choice}"
    end = Step(made.end.module.forward, tuple(slot[n] for n in made.end.inputs), (), (), ())
    return Pieces(steps, end, len(nodes) - len(example_inputs), report)


def _outside(
    piece: Program, examples: list[Any], choice: str, report: Report, known: Outside | None
) -> Callable[..., Any]:
    module = piece.part.module
    if known is None:
        return compile_outside(module, examples, choice, report)
    if module.code not in known:
        knows_symbols = TracingContext.try_get() is not None
        known[module.code] = compile_outside(module, examples, choice if knows_symbols else "eager", report)
    return known[module.code]


def _examples(piece: Program, given: dict[fx.Node, Any], made: Split) -> list[Any]:
    """What a piece outside is compiled for: the graph's inputs, and stand-ins for what other pieces make. With symbols
    these are of Dynamo's mode, which knows them."""
    context = TracingContext.try_get()
    if made.symbols and context is not None and context.fake_mode is not None:
        mode = context.fake_mode
        return [given[n] if n in given else stand_in(n.meta["example_value"], mode) for n in piece.part.inputs]
    return [given[n] if n in given else made.values[n] for n in piece.part.inputs]


def _last_uses(made: Split, slot: dict[fx.Node, int]) -> list[tuple[int, ...]]:
    """For each piece, the slots that were filled by pieces and that nothing behind it reads."""
    filled = {n for p in made.pieces for n in p.part.outputs}
    seen = set(made.end.inputs)
    out: list[tuple[int, ...]] = []
    for piece in reversed(made.pieces):
        here = {n for n in (*piece.part.inputs, *piece.part.outputs) if n in filled} - seen
        out.append(tuple(slot[n] for n in here))
        seen |= here
    return out[::-1]


def _strides(piece: Program) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Results of a program whose strides in the graph are others than those of a new contiguous tensor."""
    if piece.captured is None:
        return ()
    graph = piece.captured.graph
    out = []
    for k, (output, strides) in enumerate(zip(graph.outputs, piece.strides, strict=True)):
        buffer = graph.buffers[output.buffer] if output.buffer is not None else None
        if buffer is None or buffer.kind is not BufferKind.OUTPUT:
            continue
        if any(n > 1 and a != b for n, a, b in zip(buffer.shape, buffer.strides, strides, strict=True)):
            out.append((k, strides))
    return tuple(out)


def _restrided(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
