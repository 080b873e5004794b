"""Every stage as text in a folder, with a note on how to come to it again."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .report import Report

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Dump:
    """One numbered folder `compile-NNN` under `folder`; does nothing when `folder` is empty."""

    def __init__(self, folder: str, gm: "torch.fx.GraphModule | None", report: Report) -> None:
        self.path: Path | None = None
        if not folder:
            return
        root = Path(folder).expanduser()
        root.mkdir(parents=True, exist_ok=True)
        number = len(list(root.glob("compile-*")))
        while True:
            self.path = root / f"compile-{number:03}"
            try:
                self.path.mkdir()
                break
            except FileExistsError:  # another process took the number
                number += 1
        report.dump = str(self.path)
        (self.path / "README.txt").write_text(_note(), encoding="utf-8")
        if gm is not None:
            self.text("0-dynamo.py", lambda g: g.print_readable(print_output=False), gm)

    def piece(self, number: int, gm: "torch.fx.GraphModule", report: Report) -> "Dump":
        """A folder of its own for a piece of the graph."""
        return Dump(str(self.path / f"piece-{number}") if self.path else "", gm, report)

    def text(self, name: str, render: Callable[[T], str], value: T) -> None:
        """Write `render(value)`; rendering happens only when dumping is on."""
        if self.path is not None:
            (self.path / name).write_text(render(value), encoding="utf-8")

    def report(self, report: Report) -> None:
        self.text("report.json", lambda r: json.dumps(dataclasses.asdict(r), indent=1) + "\n", report)


def _note() -> str:
    import torch
    import transformers

    from . import __version__

    return f"""One compilation of mpk_dynamo {__version__}, stage by stage.

torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()},
{platform.machine()}, CUDA {torch.version.cuda}

0-dynamo.py     the graph as Dynamo captured it
1-captured.txt  our graph before fusion
2-graph.txt     after fusion
3-tasks.txt     tasks with their accesses, and derived events
4-schedule.txt  queues, buffer offsets, event slots
5-program.cu    the translation unit for NVRTC; it needs kernels_cuda/include
5-program.txt   the same with the tables' sizes and the order of the bindings
mpk_program.*   what went to NVRTC and came from it, nvrtc.log, resources.json
report.json     counts and seconds
repro.py        compiles the graph again, by itself: python repro.py [cpu|cuda]

To get here again: that script, or the same model call with MPK_DUMP_DIR=<folder>. Sending this folder, the model's
config and the call (batch, cache length) reports a defect completely; weights are not in it.
"""
