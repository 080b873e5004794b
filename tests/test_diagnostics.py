"""What a compilation says: its line in the log, on a terminal, and the script that repeats it."""

from __future__ import annotations

import io
import logging
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import mpk_dynamo
from mpk_dynamo import progress as progress_module
from mpk_dynamo.progress import progress
from mpk_dynamo.report import Report


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 16)
        self.register_buffer("scale", torch.rand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale + torch.arange(16, device=x.device)


def compiled(**options: object) -> None:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    with torch.no_grad():
        torch.compile(Block(), backend="mpk", options=options)(torch.ones(2, 32))


def test_one_line_at_info_and_the_rest_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    for level, wanted in ((logging.INFO, 1), (logging.DEBUG, 2)):
        caplog.clear()
        with caplog.at_level(level, "mpk_dynamo"):
            compiled()
        said = [r for r in caplog.records if r.name == "mpk_dynamo"]
        assert len(said) == wanted and said[0].levelno == logging.INFO
        assert said[0].getMessage() == mpk_dynamo.reports()[0].summary() and "\n" not in said[0].getMessage()
    assert "tasks:" in said[1].getMessage() and "capture" in said[1].getMessage()


@pytest.mark.slow
def test_torch_logs_switches_it_on() -> None:
    code = "import torch; torch.compile(lambda x: x + 1, backend='mpk')(torch.ones(4))"
    for setting, wanted in (("mpk_dynamo", 1), ("+mpk_dynamo", 2), ("", 0)):
        environ = {**os.environ, **({"TORCH_LOGS": setting} if setting else {})}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("reference: 1 graph nodes in" in done.stderr) == (wanted > 0), done.stderr
        assert ("seconds:" in done.stderr) == (wanted > 1), done.stderr


def test_the_script_of_a_dump_compiles_the_graph_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(dump_dir=str(tmp_path))
    (path,) = tmp_path.glob("compile-*/repro.py")
    text = path.read_text(encoding="utf-8")
    assert "inner.weight" in text and "parameter=True" in text
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    before = sys.argv
    sys.argv = [str(path)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    (report,) = mpk_dynamo.reports()
    said = capsys.readouterr().out
    assert report.outcome == "reference" and report.summary() in said
    assert "result 0: [2, 16] torch.float32, greatest difference" in said
    assert float(said.split()[-1]) < 1e-5


class Terminal(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.mark.parametrize(("tty", "wanted"), [(True, True), (True, False), (False, True)])
def test_progress_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, tty: bool, wanted: bool) -> None:
    monkeypatch.setattr(progress_module, "PATIENCE_S", 0.01)
    monkeypatch.setattr(progress_module, "PERIOD_S", 0.01)
    monkeypatch.setattr(sys, "stderr", Terminal(tty))
    report = Report()
    with progress(report, wanted), report.stage("nvrtc"):
        time.sleep(0.1)
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("mpk_dynamo: nvrtc, 0 s" in said) == (tty and wanted)
    assert said.endswith("\r") if said else not (tty and wanted)
    assert report.current == ""


def test_a_short_compilation_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(True))
    with progress(Report(), True):
        pass
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_refusal_names_operator_module_and_line() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x)

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x)

    for call in (torch.compile(Outer(), backend="mpk"), torch.compile(Outer().forward, backend="mpk")):
        torch._dynamo.reset()
        mpk_dynamo.clear_reports()
        call(torch.eye(3))
        (report,) = mpk_dynamo.reports()
        assert "linalg_inv" in report.reason and report.origin.startswith("block (test_diagnostics.py:")
        assert ", node linalg_inv)" in report.origin and "add_an_op" in report.remedies[0]
        assert report.origin in report.summary() and report.remedies[0] in report.summary()


def test_a_recompile_of_dynamo_is_counted_and_explained() -> None:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()

    def model(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * 2 if scale > 1 else x * 3

    step = torch.compile(model, backend="mpk", dynamic=False)
    for scale in (0.5, 2.5, 0.5):
        assert torch.equal(step(torch.ones(3), scale), model(torch.ones(3), scale))
    first, second = mpk_dynamo.reports()
    assert (first.recompile, first.guard, second.recompile) == (0, "", 1) and "0.5" in second.guard
    assert "recompile" not in first.summary() and second.guard in second.summary()
