"""`backend="mpk"`: what torch.compile calls with each graph that Dynamo captured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.exc import exceptions_allowed_to_be_fallback

from .errors import MpkError, Unsupported
from .fallback import fall_back
from .pipeline import compile_graph
from .report import Report, record
from .settings import Settings
from .specialize import guard_symbols

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
    meaning here. A graph outside the supported set is handed to the fallback, with a warning and a report.

    Raises OptionError, Unsupported with `fallback="error"`, and any error of this project's own making.
    """
    settings = Settings.from_options(options)
    report = record(Report(fx_nodes=sum(n.op not in ("placeholder", "output", "get_attr") for n in gm.graph.nodes)))
    try:
        _refuse_training(example_inputs)
        compiled = compile_graph(gm, example_inputs, settings, report)
    except Unsupported as why:
        return fall_back(gm, example_inputs, settings, report, why)
    except exceptions_allowed_to_be_fallback as error:
        # left alone, Dynamo would take it for a wish to break the graph here, and run the pieces
        why = Unsupported(f"the graph cannot be traced: {type(error).__name__}: {error}")
        return fall_back(gm, example_inputs, settings, report, why)
    except MpkError as error:
        report.reason, report.origin = error.message, error.origin
        raise
    guard_symbols(gm, example_inputs)
    _log.info("%s", report.summary())
    return compiled


def _refuse_training(example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise Unsupported(
            "gradients are enabled and inputs require them; the kernel computes no gradients",
            remedy="call the model under torch.no_grad() or torch.inference_mode()",
        )
