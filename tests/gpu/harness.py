"""What the tests of this folder share: the device they run on, and a graph made runnable on it.

MPK_TEST_DEVICE=cpu runs most of them through the reference executor instead of a kernel, which proves the tests
themselves on a machine without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from mpk_dynamo import codegen, pipeline
from mpk_dynamo.dump import Dump
from mpk_dynamo.ir.graph import Graph
from mpk_dynamo.ir.program import Program
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.ir.types import BufferKind
from mpk_dynamo.passes import graph as passes
from mpk_dynamo.reference import Executor
from mpk_dynamo.reference.memory import fresh_outputs
from mpk_dynamo.report import Report
from mpk_dynamo.runtime import Executable, build
from mpk_dynamo.targets import Target, detect, reference_target
from mpk_dynamo.verify import verify_program

DEVICE = torch.device(os.environ.get("MPK_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device"),
]
kernel_only = pytest.mark.skipif(not ON_GPU, reason="about the kernel; MPK_TEST_DEVICE asks for the reference executor")

Tensors = Mapping[str, torch.Tensor]


def target() -> Target:
    return detect(DEVICE.index or 0) if ON_GPU else reference_target(8)


def lower(graph: Graph, workers: int) -> Schedule:
    """The pipeline's tasks, events and queues of a graph, which stays as it is: no graph pass runs."""
    with mock.patch.object(passes, "PASSES", ()):
        report = Report()
        return pipeline.lower(graph, workers, target(), report, Dump("", None, report))


def emit(made: Schedule) -> Program:
    program = codegen.generate(made, target())
    verify_program(program, target())
    return program


def build_all(programs: Mapping[object, Program], cache_dir: Path, lineinfo: bool = False) -> dict[object, object]:
    """Artifacts of programs, or the exception that building one raised. Equal sources are compiled once; NVRTC
    compiles in threads, as it does not hold the interpreter's lock."""
    first: dict[str, Program] = {}
    for program in programs.values():
        first.setdefault(program.source, program)

    def one(program: Program) -> object:
        try:
            return build(program, target(), cache_dir=cache_dir, lineinfo=lineinfo)
        except Exception as error:  # belongs to the test of that program, not to all
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        made = dict(zip(first, pool.map(one, first.values())))
    return {key: made[program.source] for key, program in programs.items()}


class Step:
    """A schedule that runs on the tests' device. Outputs are poisoned before each call, which returns when the step
    is done. Raises DeviceFault when it gave up."""

    def __init__(self, made: Schedule, artifact: object = None, program: Program | None = None, **options: int) -> None:
        self.schedule = made
        self.buffers = made.tasks.buffers
        if not ON_GPU:
            self.executor = Executor(made, poison=True)
            return
        if isinstance(artifact, Exception):
            raise artifact
        self.program = program or emit(made)
        options = {"timeout_ns": 2_000_000_000, **options}
        self.executable = Executable(artifact, self.program, target(), DEVICE, **options)

    def __call__(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Outputs by storage. `tensors`: what the caller hands in, by storage; STATE is updated in place."""
        if not ON_GPU:
            return self.executor(tensors)
        outputs = {n: b for n, b in self.buffers.items() if b.kind is BufferKind.OUTPUT}
        fresh = {self.buffers[n].storage: t for n, t in fresh_outputs(outputs, DEVICE, poison=True).items()}
        everything = {**tensors, **fresh}
        self.executable.launch([everything[name].data_ptr() for name in self.program.bindings])
        torch.cuda.synchronize()
        self.executable.check_fault()
        return fresh


def on_device(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Copies on the tests' device with the same strides."""
    return {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)
        for name, t in tensors.items()
    }
