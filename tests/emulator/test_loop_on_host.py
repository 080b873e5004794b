"""Several steps in one launch of the kernel, on the host: the same tokens as the reference executor's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from host_kernel import COMPILER, EmulatedDevice, artifact_for, compile_for_host
from loops import Decoding, model_of

import mpk_dynamo.runtime as runtime
from mpk_dynamo import pipeline
from mpk_dynamo.loop import Sampling
from mpk_dynamo.runtime.launch import Executable
from mpk_dynamo.targets import known

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ compiles the kernel for the host; there is none")
GREEDY = Sampling()
SAMPLED = Sampling(do_sample=True, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.2)
slow = pytest.mark.slow


@pytest.fixture
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder, target = tmp_path_factory.mktemp("host"), known("h200")

    def load(artifact: Path, program, target, device, **options):
        return Executable(artifact_for(program), program, target, 0, **options, device=EmulatedDevice(artifact))

    with (
        mock.patch.object(pipeline.Place, "of", lambda *_: pipeline.Place(torch.device("cpu"), target)),
        mock.patch.object(pipeline, "build", lambda program, *_: compile_for_host(program, folder)),
        mock.patch.object(runtime, "Executable", load, create=True),
        mock.patch.object(torch.cuda, "get_device_name", lambda *_: "the host"),
    ):
        yield


@pytest.mark.parametrize(
    ("sampling", "family", "batch"),
    [
        pytest.param(GREEDY, "llama", 1, id="greedy", marks=slow),
        pytest.param(SAMPLED, "qwen3", 3, id="sampled", marks=slow),
        pytest.param(GREEDY, "qwen3", 16, id="sixteen", marks=slow),
    ],
)
def test_every_number_of_steps_gives_the_tokens_of_the_reference(sampling, family, batch, on_host, tmp_path):
    pads = tuple(row % 5 for row in range(batch))
    options = {"workers": 3, "timeout_s": 60.0, "cache_dir": str(tmp_path)}
    with mock.patch.object(pipeline.Place, "of", lambda *_: reference_place()):
        reference = Decoding(model_of(family), sampling, batch, pads).generate([9])
    decoding = Decoding(model_of(family), sampling, batch, pads, **options)
    for launches in ([9], [2, 3, 4]):
        found = decoding.generate(launches)
        assert found.ran == launches
        assert torch.equal(found.tokens, reference.tokens)


def reference_place() -> pipeline.Place:
    from mpk_dynamo.targets import reference_target

    return pipeline.Place(torch.device("cpu"), reference_target(3))


@slow
def test_the_launch_ends_when_all_sequences_are_finished(on_host, tmp_path):
    decoding = Decoding(model_of("llama"), SAMPLED, 3, workers=3, timeout_s=60.0, cache_dir=str(tmp_path))
    free = decoding.generate([14]).tokens
    eos = [int(free[0, 5]), int(free[1, 7]), int(free[2, 6])]
    found = decoding.generate([4, 10, 5], eos=eos)
    last = max(next(i for i, t in enumerate(row.tolist()) if t in eos) for row in free)
    assert sum(found.ran) == last and found.ran[-1] == 0 and found.state.read() == (last + 1, True)
    again = decoding.generate([14])  # the loader gave up in the middle of its weights: the next launch starts afresh
    assert torch.equal(again.tokens, free)


@slow
def test_the_host_may_ask_for_the_end(on_host, tmp_path):
    decoding = Decoding(model_of("llama"), GREEDY, 2, workers=3, timeout_s=60.0, cache_dir=str(tmp_path))
    free = decoding.generate([9])
    made = decoding.generate([2], room=12)
    made.state.counters[3] = 1  # what `stop` writes while a launch is under way
    made.ran += [decoding._loop(made.args, made.state, 6) for _ in range(2)]
    assert made.ran == [2, 1, 0], "the step under way is the last"
    assert torch.equal(made.tokens, free.tokens[:, :4])
    assert torch.equal(decoding.generate([9]).tokens, free.tokens)
