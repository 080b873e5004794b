"""One callable for a graph with symbols, with a program for each of the sizes that come. Dynamo compiles such a graph
once; a new size costs a program of its own when it is first met, or at once where the range of sizes is known, and
nothing is padded or masked for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .specialize import size_key

_log = logging.getLogger("mpk_dynamo")

LIMIT = 32
"""Programs of one graph. Sizes that come later run eagerly: compiling for each would take longer than it saves."""

Compile = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class BySize:
    """`callable(*args)` with the graph's own arguments and results. compile: makes a callable for the present sizes,
    numbers among the arguments being plain ones. first: what it made for `example_inputs`. key: of the arguments, the
    sizes for which programs are; default: all that are symbolic."""

    def __init__(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        first: Callable[..., Any],
        compile: Compile,
        key: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None,
    ) -> None:
        self._gm, self._compile = gm, compile
        self._key = key or size_key(gm, example_inputs)
        self._made = {self._key(example_inputs): first}

    def make(self, args: Sequence[Any]) -> None:
        """The program for these sizes now, before a call comes with them."""
        self._made.setdefault(self._key(args), self._make(args))

    def __call__(self, *args: Any) -> Any:
        key = self._key(args)
        run = self._made.get(key)
        if run is None:
            run = self._made[key] = self._make(args)
        return run(*args)

    def _make(self, args: Sequence[Any]) -> Callable[..., Any]:
        if len(self._made) < LIMIT:
            return self._compile(self._gm, args)
        if len(self._made) == LIMIT:
            _log.warning("%d programs for different sizes of one graph: further sizes run eagerly", LIMIT)
        return self._gm.forward
