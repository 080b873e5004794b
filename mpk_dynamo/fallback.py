"""What runs graphs and pieces of graphs that cannot be captured: Inductor or plain PyTorch, always reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .errors import Unsupported
from .report import Report
from .settings import Settings
from .specialize import has_symbols, without_symbols

_log = logging.getLogger("mpk_dynamo")


def fall_back(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    report: Report,
    why: Unsupported,
    *,
    further: bool = False,
) -> Callable[..., Any]:
    """A callable with the graph's own semantics. Records and logs why; raises `why` with `fallback="error"`. further:
    it is for one more size of many, which may not come again."""
    report.blame(why)
    if settings.fallback == "error":
        raise why
    choice = choice_of(settings, example_inputs)
    report.outcome = f"fallback to {choice}"
    _log.warning("%s", report.summary())
    if (why.passing or further) and choice == "inductor" and not has_symbols(gm, example_inputs):
        return Deferred(gm.forward, lambda *args: compile_outside(gm, args, "inductor", report))
    return compile_outside(gm, example_inputs, choice, report)


def choice_of(settings: Settings, example_inputs: Sequence[Any]) -> str:
    """ "inductor" or "eager". "auto" is Inductor for CUDA tensors and eager for CPU ones, where compiling costs more
    than it saves in the tests and demonstrations that the reference executor is for."""
    if settings.fallback != "auto":
        return settings.fallback
    on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs)
    return "inductor" if on_gpu else "eager"


def compile_outside(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], choice: str, report: Report
) -> Callable[..., Any]:
    """`gm` compiled by Inductor, or as it is. Symbolic sizes stay such while Dynamo compiles; fake tensors among the
    inputs are of Dynamo's mode then."""
    if choice == "eager":
        return gm.forward
    with report.stage("inductor"):
        if has_symbols(gm, example_inputs) and TracingContext.try_get() is not None:
            return _inductor(gm, example_inputs)
        mode = detect_fake_mode([x for x in example_inputs if isinstance(x, FakeTensor)]) or FakeTensorMode()
        with without_symbols():
            # a mode of Dynamo's makes symbols of sizes unless told not to, and guards on them that it cannot place
            real = partial(mode.from_tensor, static_shapes=True)
            return _inductor(gm, [x if isinstance(x, FakeTensor) else real(x) for x in example_inputs])


def _inductor(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError

    try:
        return compile_fx(gm, list(example_inputs))
    except InductorError as error:  # no C++ compiler, say: the graph still has plain PyTorch's meaning
        _log.warning("Inductor failed, its part runs eagerly: %s", str(error).strip().split("\n")[0])
        return gm.forward


class Deferred:
    """Runs a graph eagerly once, and compiles it when it is called again. A graph for the length of one prompt, or of a
    cache that grows, is followed by a graph for every length, and only that one is worth compiling."""

    def __init__(self, eager: Callable[..., Any], compile: Callable[..., Callable[..., Any]]) -> None:
        self._run, self._compile = eager, compile
        self._calls = 0

    def __call__(self, *args: Any) -> Any:
        self._calls += 1
        if self._calls == 2:
            self._run = self._compile(*args)
        return self._run(*args)
