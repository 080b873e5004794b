"""`backend="mpk"`: what torch.compile calls with each graph that Dynamo captured."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.exc import exceptions_allowed_to_be_fallback
from torch._dynamo.utils import get_metrics_context
from torch._guards import CompileContext

from .by_size import LIMIT, BySize
from .dump import Dump
from .errors import MpkError, Unsupported
from .fallback import Deferred, fall_back
from .pieces import Outside, compile_pieces
from .pipeline import Place, capture_graph, compile_captured, store_of
from .progress import progress
from .report import Report, record
from .repro import script
from .settings import Settings
from .specialize import appends, at_present, changes_per_call, has_symbols, kept_key, kept_symbols, marked_sizes
from .split import split

_log = logging.getLogger("mpk_dynamo")


def mpk(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph into one kernel launch (CUDA) or a task program run by the reference executor (CPU).

    `example_inputs` are the real tensors (and SymInts) of this call, in the order of the graph's placeholders.
    `options` are those of settings.py. `mode` is accepted because `CompileConfig` always sends one; it has no
    meaning here. What of a graph is outside the supported set is handed to the fallback, with a warning and a report.

    Raises OptionError, Unsupported with `fallback="error"`, and any error of this project's own making.
    """
    settings = Settings.from_options(options)
    report = record(Report(fx_nodes=_size(gm)))
    report.recompile, report.guard = _recompile()
    try:
        _refuse_training(example_inputs)
        with progress(report, settings.progress):
            return compile_any(gm, example_inputs, settings, report)
    except Unsupported as why:
        return fall_back(gm, example_inputs, settings, report, why)
    except exceptions_allowed_to_be_fallback as error:
        # left alone, Dynamo would take it for a wish to break the graph here, and run the pieces
        why = Unsupported(f"the graph cannot be traced: {type(error).__name__}: {error}")
        return fall_back(gm, example_inputs, settings, report, why)
    except MpkError as error:
        report.blame(error)
        raise


def compile_any(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, report: Report
) -> Callable[..., Any]:
    """Programs for as much of a graph as can be, whatever its sizes are. Raises as `mpk` does, and Unsupported when
    nothing of it becomes a program."""
    if not has_symbols(gm, example_inputs):
        if settings.fallback == "error" or not appends(gm):
            return compile_fixed(gm, example_inputs, settings, report)
        report.outcome = "eager for one call, as it returns a cache that has grown: the next graph is for every length"
        _log.info("%s", report.outcome)
        return Deferred(gm.forward, lambda *args: _compile_further(gm, args, settings, report))
    if settings.fallback != "error" and changes_per_call(gm, example_inputs):
        return _compile_growing(gm, example_inputs, settings, report)
    first = compile_fixed(gm, example_inputs, settings, report)

    def further(gm: torch.fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        return _compile_further(gm, args, settings, record(Report(fx_nodes=report.fx_nodes)))

    made = BySize(gm, example_inputs, first, further)
    others = marked_sizes(gm, example_inputs, LIMIT)
    for number, inputs in enumerate(others, 2):
        _log.info("program %d of %d, for each size that was marked", number, len(others) + 1)
        made.make(inputs)
    return made


def _compile_growing(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, report: Report
) -> Callable[..., Any]:
    """A graph with sizes that change with each call: programs for each of those that do not, and one set of pieces
    outside, which take all sizes as they come."""
    outside: Outside = {}

    def make(args: Sequence[Any], report: Report) -> Callable[..., Any]:
        return _compile_split(gm, args, settings, report, Dump(settings.dump_dir, gm, report), outside)

    def further(gm: torch.fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        report = record(Report(fx_nodes=_size(gm)))
        try:
            with torch.no_grad():
                return make(args, report)
        except Unsupported as why:
            return fall_back(gm, args, dataclasses.replace(settings, fallback="eager"), report, why)

    first = make(example_inputs, report)
    kept = kept_symbols(gm)
    return BySize(gm, example_inputs, first, further, kept_key(gm, kept)) if kept else first


def _compile_further(
    gm: torch.fx.GraphModule, args: Sequence[Any], settings: Settings, report: Report
) -> Callable[..., Any]:
    """`compile_fixed` or the fallback, when Dynamo has long been done with the graph."""
    try:
        with torch.no_grad():
            return compile_fixed(gm, args, settings, report)
    except Unsupported as why:
        reason = why
    return at_present(gm, args, lambda fixed, inputs: fall_back(fixed, inputs, settings, report, reason, further=True))


def compile_fixed(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, report: Report
) -> Callable[..., Any]:
    """The same for the present sizes and numbers alone; nothing guards them."""
    return at_present(gm, example_inputs, lambda fixed, inputs: _compile(fixed, inputs, settings, report))


def _compile(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, report: Report
) -> Callable[..., Any]:
    place, dump = Place.of(example_inputs, settings), Dump(settings.dump_dir, gm, report)
    dump.text("repro.py", lambda g: script(g, example_inputs, settings), gm)
    try:
        captured = capture_graph(gm, example_inputs, report, dump, store_of(place, settings))
    except Unsupported as why:
        if why.passing or settings.fallback == "error":
            raise
        return _compile_split(gm, example_inputs, settings, report, dump)
    compiled = compile_captured(captured, place, settings, report, dump)
    _log.info("%s", report.summary())
    _log.debug("%s", report.detail())
    return compiled


def _compile_split(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    report: Report,
    dump: Dump,
    outside: Outside | None = None,
) -> Callable[..., Any]:
    """outside: given where sizes change with each call; see compile_pieces."""
    place = Place.of(example_inputs, settings)
    made = split(gm, example_inputs, report, dump, symbols=outside is not None)
    compiled = compile_pieces(made, gm, example_inputs, place, settings, report, outside)
    dump.report(report)
    _log.warning("%s", report.summary())
    return compiled


def _recompile() -> tuple[int, str]:
    """The how many-eth time Dynamo compiles the present code again, and the guard that failed; 0 for the first."""
    number = getattr(CompileContext.current_compile_id(), "frame_compile_id", None) or 0
    if not number:
        return 0, ""
    # Dynamo computes the reason for its own log in any case, and hands it out nowhere else
    reason = getattr(get_metrics_context(), "_metrics", {}).get("recompile_reason") or "known (TORCH_LOGS=recompiles)"
    text = reason.split("\n")[0].partition(": ")[2] or reason
    return number, text.split("  #")[0].strip()


def _size(gm: torch.fx.GraphModule) -> int:
    return sum(n.op not in ("placeholder", "output", "get_attr") for n in gm.graph.nodes)


def _refuse_training(example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise Unsupported(
            "gradients are enabled and inputs require them; the kernel computes no gradients",
            remedy="call the model under torch.no_grad() or torch.inference_mode()",
        )
