"""One line on a terminal about a compilation that takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from .report import Report

PATIENCE_S = 2.0
PERIOD_S = 0.5


@contextlib.contextmanager
def progress(report: Report, wanted: bool) -> Iterator[None]:
    """While the block runs, after PATIENCE_S seconds, show on stderr which stage of `report` is at work and for how
    long it has all taken. The line is wiped at the end. Nothing is written when `wanted` is false or stderr is no
    terminal."""
    if not wanted or not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(report, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(report: Report, done: threading.Event) -> None:
    start, shown = time.perf_counter(), 0
    wait = PATIENCE_S
    while not done.wait(wait):
        wait = PERIOD_S
        line = f"mpk_dynamo: {report.current or 'compiling'}, {time.perf_counter() - start:.0f} s"
        sys.stderr.write(f"\r{line.ljust(shown)}")
        sys.stderr.flush()
        shown = len(line)
    if shown:
        sys.stderr.write(f"\r{' ' * shown}\r")
        sys.stderr.flush()
