"""The table of pointwise operators at the edges of every type: the device code compiles, and on the host it gives what
torch does. tests/gpu/test_edges.py does the same on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_kernel import COMPILER
from test_device_code import TARGET, WORKERS, emulated
from test_edge_values import FURTHER, OVERFLOWS, REPEATS, assert_all_alike, edges, further, pairs, plain
from test_pointwise import ALL, BINARY, UNARY

from mpk_dynamo import pipeline
from mpk_dynamo.dump import Dump
from mpk_dynamo.report import Report

SIGN_OPEN = frozenset(("relu", "max.other", "min.other"))
"""Of a zero: torch's CPU code keeps the first of two zeros, that for CUDA the greater or smaller one, as do we."""


def model_of(operands: int, dtype: torch.dtype) -> tuple[Any, dict[str, tuple[torch.Tensor, ...]]]:
    """All operators of a type in one function, and their inputs."""
    table = {name: f for name, (f, dtypes) in (UNARY, BINARY)[operands - 1].items() if dtype in dtypes}
    unary = (edges(dtype).repeat_interleave(REPEATS),)
    inputs = {name: unary if operands == 1 else pairs(name, dtype) for name in table}
    return (lambda given: {name: table[name](*xs) for name, xs in given.items()}), inputs


CASES = {f"{('unary', 'binary')[n - 1]}-{str(d)[6:]}": (n, d) for n in (1, 2) for d in ALL}
USUAL = "binary-int64"
"""Compiled in the default run."""


@pytest.mark.parametrize("case", [c if c == USUAL else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_compiles_for_a_gpu(case: str) -> None:
    """Every operator of the table for every type of its own goes through NVRTC, which needs no GPU."""
    from mpk_dynamo.runtime.build import build

    model, inputs = model_of(*CASES[case])
    built = []

    def backend(gm: torch.fx.GraphModule, given: Any) -> Any:
        report, dump = Report(), Dump("", None, Report())
        captured = pipeline.capture_graph(gm, given, report, dump)
        program = pipeline.emit(pipeline.lower(captured.graph, WORKERS, TARGET, report, dump), TARGET, report, dump)
        built.append(build(program, TARGET, cache=False))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(inputs)
    assert [a.cubin[:4] for a in built] == [b"\x7fELF"]


@pytest.mark.skipif(COMPILER is None, reason="g++ compiles the kernel for the host; there is none")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_the_host(case: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, inputs = model_of(*CASES[case])
    ours = torch.compile(model, backend=emulated(tmp_path), fullgraph=True)(inputs)
    theirs = model(inputs) | {name: plain(UNARY[name][0], *inputs[name]) for name in OVERFLOWS & inputs.keys()}
    assert_all_alike(ours, theirs, SIGN_OPEN)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="g++ compiles the kernel for the host; there is none")
def test_further_types_on_the_host(tmp_path: Path) -> None:
    torch._dynamo.reset()
    inputs = {name: x for name, (_, x) in FURTHER.items()}
    ours = torch.compile(further, backend=emulated(tmp_path), fullgraph=True)(inputs)
    assert_all_alike(ours, further(inputs))
