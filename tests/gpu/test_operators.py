"""The device equals the reference: every sample of every operator, alone in a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_equals
from device_forms import REFUSED, SAMPLES
from harness import DEVICE, ON_GPU, Step, build_all, emit, gpu, lower, on_device, target

from mpk_dynamo import codegen
from mpk_dynamo.errors import Unsupported
from mpk_dynamo.ir.graph import writes
from mpk_dynamo.ir.types import BufferKind
from mpk_dynamo.ops import operator_of
from mpk_dynamo.ops.sampling import sample_tensors
from mpk_dynamo.reference.memory import allocate
from mpk_dynamo.targets import known

pytestmark = gpu
FEW = 7
SEEDS = (11, 12, 13)
REPEATS = 20

in_every_size = pytest.mark.parametrize("workers", ["all", "few"])
every_sample = pytest.mark.parametrize("name", [n for n in SAMPLES if n not in REFUSED])


def count(workers: str) -> int:
    return FEW if workers == "few" else target().sm_count


@pytest.fixture(scope="module")
def step(request: pytest.FixtureRequest, cache_dir: Path) -> Any:
    """(sample, workers) -> Step. All programs that this run needs are compiled first, side by side."""
    mine = [i for i in request.session.items if getattr(i, "module", None) is request.module]
    chosen = [i.callspec.params for i in mine if hasattr(i, "callspec")]
    wanted = {(p["name"], p["workers"]): None for p in chosen if "workers" in p}
    schedules = {key: lower(SAMPLES[key[0]][1], count(key[1])) for key in wanted}
    programs: dict[Any, Any] = {}
    refused: dict[Any, Exception] = {}
    for key, made in schedules.items() if ON_GPU else ():
        try:
            programs[key] = emit(made)
        except Unsupported as why:
            refused[key] = why
    artifacts = {**build_all(programs, cache_dir), **refused}
    steps: dict[Any, Step] = {}

    def get(name: str, workers: str) -> Step:
        key = (name, workers)
        if key not in steps:
            steps[key] = Step(schedules[key], artifacts.get(key), programs.get(key))
        return steps[key]

    return get


@in_every_size
@every_sample
def test_equals_the_oracle(name: str, workers: str, step: Any) -> None:
    node, graph = SAMPLES[name]
    run = step(name, workers)
    for seed in SEEDS:
        given = sample_tensors(node, graph, seed)
        ours, theirs = on_device(given), on_device(given)
        outputs = run(ours)
        memory = allocate(graph.buffers, theirs, poison=True)
        operator_of(node).oracle(node, graph.buffers, memory)
        for written in writes(node):
            buffer = graph.buffers[written]
            if buffer.kind is BufferKind.STATE:
                assert torch.equal(ours[buffer.storage], theirs[buffer.storage]), f"{written} differs, seed {seed}"
            else:
                assert_equals(outputs[buffer.storage], memory[written], f"{written}, seed {seed}")
        for storage, tensor in ours.items():
            if graph.buffers[storage].kind is not BufferKind.STATE:
                assert torch.equal(tensor, given[storage].to(DEVICE)), f"{storage} was written"


@in_every_size
@every_sample
def test_repeats_are_bit_identical(name: str, workers: str, step: Any) -> None:
    node, graph = SAMPLES[name]
    run, given = step(name, workers), sample_tensors(node, graph, 21)
    first: dict[str, torch.Tensor] = {}
    for _ in range(REPEATS if ON_GPU else 2):
        tensors = on_device(given)
        found = {**tensors, **run(tensors)}
        first = first or found
        for storage, tensor in found.items():
            assert torch.equal(tensor, first[storage]), storage


@pytest.mark.parametrize("name", list(REFUSED))
def test_no_device_form(name: str) -> None:
    """Exactly these are refused, each with its reason, and with the error that leads to a fallback."""
    made = lower(SAMPLES[name][1], FEW)
    with pytest.raises(Unsupported, match=REFUSED[name]) as why:
        codegen.generate(made, target() if ON_GPU else known("h200"))
    pytest.skip(f"no device form: {why.value.message}")
