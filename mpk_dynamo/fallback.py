"""What runs a graph that cannot be captured: Inductor or plain PyTorch, always reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import Unsupported
from .report import Report
from .settings import Settings

_log = logging.getLogger("mpk_dynamo")


def fall_back(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, report: Report, why: Unsupported
) -> Callable[..., Any]:
    """A callable with the graph's own semantics. Records and logs why; raises `why` with `fallback="error"`.

    "auto" is Inductor for CUDA tensors and eager for CPU ones, where compiling costs more than it saves in the
    tests and demonstrations that the reference executor is for.
    """
    report.reason, report.origin = why.message, why.origin
    if settings.fallback == "error":
        raise why
    choice = settings.fallback
    if choice == "auto":
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs)
        choice = "inductor" if on_gpu else "eager"
    report.outcome = f"fallback to {choice}"
    _log.warning("%s%s", report.summary(), f" -> {why.remedy}" if why.remedy else "")
    if choice == "eager":
        return gm.forward
    with report.stage("inductor"):
        return _inductor(gm, example_inputs, report)


def _inductor(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], report: Report) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError

    try:
        return compile_fx(gm, list(example_inputs))
    except InductorError as error:  # no C++ compiler, say: the graph still has plain PyTorch's meaning
        report.outcome = "fallback to eager"
        _log.warning("Inductor failed, the graph runs eagerly: %s", str(error).strip().split("\n")[0])
        return gm.forward
