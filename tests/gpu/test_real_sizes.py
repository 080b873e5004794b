"""Layers of published models at their real widths, with random weights: accuracy, repeats, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, gpu, kernel_only
from small_models import state

import mpk_dynamo
from mpk_dynamo.tools import models
from mpk_dynamo.tools.accuracy import accuracy, reference_logits
from mpk_dynamo.tools.decoder import Decoder

pytestmark = [*gpu, pytest.mark.usefixtures("fresh_backend")]
STRICT = {"fallback": "error"}
REPEATS = 20 if ON_GPU else 2
SHAPE = {"prompt": 300, "max_cache": 512, "steps": 6} if ON_GPU else {"prompt": 5, "max_cache": 16, "steps": 2}
"""A cache that is neither nearly empty nor full, so that keys are split and some splits have none."""
CASES = {
    f"{name}-batch{batch}": (name, layers, batch)
    for name, layers, batches in (
        ("qwen3-8b", 1, (1, 4, 16)), ("llama-3.2-1b", 1, (1, 16)), ("smollm2-135m", 2, (1, 4, 16)),
    )
    for batch in batches
}  # fmt: skip


@dataclass
class Case:
    model: Any
    decoder: Decoder
    compiled: Any


@pytest.fixture(scope="module", params=list(CASES) if ON_GPU else ["smollm2-135m-batch1"])
def case(request: pytest.FixtureRequest, fresh_backend: None) -> Iterator[Case]:
    name, layers, batch = CASES[request.param]
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    model = models.load(name, device=DEVICE, layers=layers if ON_GPU else 1)
    decoder = Decoder(model, batch=batch, **SHAPE)
    yield Case(model, decoder, torch.compile(model, backend="mpk", fullgraph=True, dynamic=False, options=STRICT))
    if ON_GPU:
        torch.cuda.empty_cache()


def test_as_accurate_as_eager(case: Case) -> None:
    batch = case.decoder.cache_ids.shape[0]
    reference = reference_logits(case.model, batch=batch, **SHAPE)
    eager = accuracy(reference, case.decoder.logits(case.model))
    kept = [t.clone() for t in state(case.decoder.cache)]
    ours = accuracy(reference, case.decoder.logits(case.compiled))
    assert ours.excess(eager) == "", f"ours {ours}, eager's {eager}"
    for mine, theirs in zip(state(case.decoder.cache), kept, strict=True):
        if mine.dtype.is_floating_point:
            assert (mine.float() - theirs.float()).norm() <= 1e-2 * theirs.float().norm()
        else:
            assert torch.equal(mine, theirs)
    assert [r.outcome for r in mpk_dynamo.reports()] == ["kernel" if ON_GPU else "reference"]


def test_repeats_are_bit_identical(case: Case) -> None:
    first = case.decoder.logits(case.compiled)
    kept = [t.clone() for t in state(case.decoder.cache)]
    for _ in range(REPEATS - 1):
        assert torch.equal(case.decoder.logits(case.compiled), first)
        assert all(torch.equal(a, b) for a, b in zip(state(case.decoder.cache), kept, strict=True))


@kernel_only
def test_replayed_cuda_graph(case: Case) -> None:
    """One captured step, replayed: it finds its position in the cache, and takes new inputs from the same memory."""
    decoder, compiled = case.decoder, case.compiled
    wanted = decoder.logits(compiled)
    kept = [t.clone() for t in state(decoder.cache)]
    step = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in decoder.steps[0].items()}
    masks = step.get("attention_mask")
    if isinstance(masks, dict):
        step["attention_mask"] = {k: v.clone() for k, v in masks.items()}
    decoder.rewind()
    with torch.no_grad():
        compiled(**step)  # should the copies need a program of their own, it cannot be loaded during capture
    decoder.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        logits = compiled(**step).logits
    for i, inputs in enumerate(decoder.steps):
        for name, value in inputs.items():
            for to, source in _pairs(step[name], value):
                to.copy_(source)
        graph.replay()
        assert torch.equal(logits[:, -1].float().cpu(), wanted[i]), f"replay {i}"
    assert all(torch.equal(a, b) for a, b in zip(state(decoder.cache), kept, strict=True))


def _pairs(to: Any, value: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of an argument of the step, each with its new value."""
    if isinstance(to, dict):
        return [(to[k], value[k]) for k in to]
    return [(to, value)] if isinstance(to, torch.Tensor) else []
