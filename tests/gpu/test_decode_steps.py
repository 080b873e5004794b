"""Decode steps of whole models through torch.compile: every position of the cache, against eager and fp32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, gpu, kernel_only
from small_models import empty_cache, make, relative, state, token_ids, walk, widened
from torch.profiler import ProfilerActivity, profile

import mpk_dynamo

pytestmark = [*gpu, pytest.mark.usefixtures("fresh_backend")]
STRICT = {"fallback": "error"}
OUTCOME = "kernel" if ON_GPU else "reference"
CAPACITY = 24
REPEATS = 50 if ON_GPU else 3
FACTOR, MARGIN = 1.25, 5e-4
"""Relative error of the logits against fp32, at most: FACTOR times eager's own plus MARGIN, over all positions."""
OUTLIER = 2.0
"""The same at one position: OUTLIER times eager's worst position plus MARGIN."""
CACHE_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
"""Relative difference to eager's cache: what the roundings before it leave open."""

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "llama-1": ("llama", False, BF16, 1),
    "llama-tied-5": ("llama", True, BF16, 5),
    "qwen2-2": ("qwen2", False, BF16, 2),
    "qwen2-tied-8": ("qwen2", True, BF16, 8),
    "qwen3-tied-1": ("qwen3", True, BF16, 1),
    "qwen3-3": ("qwen3", False, BF16, 3),
    "qwen3-16": ("qwen3", False, BF16, 16),
    "qwen3-f16-2": ("qwen3", False, F16, 2),
    "qwen3-f32-1": ("qwen3", False, F32, 1),
    "qwen2-f32-3": ("qwen2", False, F32, 3),
}


@dataclass
class Case:
    """One compiled model after a walk through its whole cache, and what eager and fp32 did on the way."""

    model: Any
    compiled: Any
    tokens: torch.Tensor
    logits: torch.Tensor  # [position, batch, vocabulary]
    eager: torch.Tensor
    exact: torch.Tensor
    cache: Any
    eager_cache: Any
    reports: list[Any]


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, fresh_backend: None) -> Iterator[Case]:
    family, tied, dtype, batch = CASES[request.param]
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    model = make(family, tied=tied, dtype=dtype)
    tokens = token_ids(batch, CAPACITY, seed=batch)
    wide = widened(model)
    caches = [empty_cache(m, batch, CAPACITY) for m in (model, model, wide)]
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options=STRICT)
    exact, eager = walk(wide, caches[2], tokens), walk(model, caches[1], tokens)
    logits = walk(compiled, caches[0], tokens)
    yield Case(model, compiled, tokens, logits, eager, exact, caches[0], caches[1], mpk_dynamo.reports())


def test_logits_at_every_position(case: Case) -> None:
    assert torch.isfinite(case.logits).all()
    own = [relative(a, b) for a, b in zip(case.eager, case.exact)]
    ours = [relative(a, b) for a, b in zip(case.logits, case.exact)]
    allowed = FACTOR * relative(case.eager, case.exact) + MARGIN
    assert relative(case.logits, case.exact) <= allowed, f"positions: ours {ours}, eager's {own}"
    bound = OUTLIER * max(own) + MARGIN
    assert max(ours) <= bound, f"position {ours.index(max(ours))}: {max(ours):.2e}, eager's worst is {max(own):.2e}"


def test_the_callers_cache_is_eagers(case: Case) -> None:
    dtype = case.cache.layers[0].keys.dtype
    for mine, theirs in zip(state(case.cache), state(case.eager_cache), strict=True):
        assert mine.dtype is theirs.dtype and mine.shape == theirs.shape
        if mine.dtype.is_floating_point:
            assert relative(mine, theirs) <= CACHE_ERROR[dtype]
        else:
            assert torch.equal(mine, theirs) and mine.max() == CAPACITY
    # the first layer's input is the same to the bit, so its keys and values differ by roundings at most
    first, other = case.cache.layers[0], case.eager_cache.layers[0]
    for mine, theirs in ((first.keys, other.keys), (first.values, other.values)):
        assert (mine.float() - theirs.float()).abs().max() <= CACHE_ERROR[dtype] * theirs.float().abs().max()


def test_one_compile_serves_all_positions(case: Case) -> None:
    assert [r.outcome for r in case.reports] == [OUTCOME], [str(r) for r in case.reports]
    assert case.reports[0].node_kinds["Attention"] == 2
    assert case.reports[0].workers == (torch.cuda.get_device_properties(DEVICE).multi_processor_count if ON_GPU else 8)


def test_repeats_from_one_state_are_bit_identical(case: Case) -> None:
    """A position in the middle, again and again: logits and cache."""
    cache, middle = copy.deepcopy(case.cache), CAPACITY // 2
    for layer in cache.layers:
        layer.cumulative_length.fill_(middle)
    before = [t.clone() for t in state(cache)]
    found: list[list[torch.Tensor]] = []
    for _ in range(REPEATS):
        for tensor, value in zip(state(cache), before, strict=True):
            tensor.copy_(value)
        logits = walk(case.compiled, cache, case.tokens[:, middle : middle + 1])
        found.append([logits, *(t.clone() for t in state(cache))])
    assert torch.equal(found[0][0][0], case.logits[middle]), "not what the walk gave at this position"
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def kernels(run: Any) -> list[str]:
    """Names of the kernels that `run` launches."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    on_gpu = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # the device's timeline also shows copies, waits and the ranges that torch.compile annotates
    others = ("memcpy", "memset", "context sync", "stream sync", "event sync", "torch-compiled", "##")
    ranges = {e.name for e in on_gpu if getattr(e, "is_user_annotation", False)}
    return [e.name for e in on_gpu if e.name not in ranges and not e.name.lower().startswith(others)]


@kernel_only
def test_one_launch_per_step(case: Case) -> None:
    x = torch.ones(8, device=DEVICE)
    if not kernels(lambda: x + 1):
        pytest.skip("the profiler sees no kernels on this machine")
    cache, steps = copy.deepcopy(case.cache), 5
    for layer in cache.layers:
        layer.cumulative_length.zero_()
    inputs = [case.tokens[:, i : i + 1] for i in range(steps)]

    def run() -> None:
        with torch.no_grad():
            for ids in inputs:
                case.compiled(ids, past_key_values=cache)

    run()
    for layer in cache.layers:
        layer.cumulative_length.zero_()
    assert kernels(run) == ["mpk_main"] * steps


def test_parameters_changed_in_place_are_used(case: Case) -> None:
    """Last of a case: it changes the model. Halving is exact in every type."""
    cache = copy.deepcopy(case.cache)
    for layer in cache.layers:
        layer.cumulative_length.fill_(CAPACITY - 1)
    before = walk(case.compiled, cache, case.tokens[:, -1:])
    for layer in cache.layers:
        layer.cumulative_length.fill_(CAPACITY - 1)
    with torch.no_grad():
        case.model.model.norm.weight.mul_(0.5)
    after = walk(case.compiled, cache, case.tokens[:, -1:])
    assert relative(2 * after, before) <= 1e-5 and len(mpk_dynamo.reports()) == len(case.reports)


@pytest.fixture(scope="module")
def masked(fresh_backend: None) -> dict[str, Any]:
    """Sequences of different lengths, padded on the left, with holes, stepped as generate() steps them: the mask
    [batch, 1, 1, capacity] is an input of the graph."""
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    model, prompt, capacity = make("qwen3"), 9, 20
    tokens = token_ids(3, capacity)
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[2, :2] = 0, 0
    mask[1, 3], mask[1, 6], mask[2, 4:7] = 0, 0, 0

    def logits(source: Any, forward: Any) -> tuple[torch.Tensor, Any]:
        cache, out = empty_cache(source, 3, capacity), []
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            source(tokens[:, :prompt], past_key_values=cache, attention_mask=mask[:, :prompt],
                   position_ids=positions[:, :prompt])  # fmt: skip
            for i in range(prompt, capacity):
                inputs = source.prepare_inputs_for_generation(
                    tokens[:, : i + 1], next_sequence_length=1, past_key_values=cache,
                    attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1], use_cache=True,
                )  # fmt: skip
                made = inputs["attention_mask"]
                made = next(iter(made.values())) if isinstance(made, dict) else made
                assert made.shape == (3, 1, 1, capacity)
                out.append(forward(**inputs).logits[:, -1].float())
        return torch.stack(out), cache

    compiled = torch.compile(model, backend="mpk", fullgraph=True, options=STRICT)
    wide = widened(model)
    return {"exact": logits(wide, wide), "eager": logits(model, model), "ours": logits(model, compiled)}


def test_padding_and_holes_in_the_mask(masked: dict[str, Any]) -> None:
    (exact, _), (eager, theirs), (ours, mine) = masked["exact"], masked["eager"], masked["ours"]
    for row in range(3):
        own = relative(eager[:, row], exact[:, row])
        assert relative(ours[:, row], exact[:, row]) <= FACTOR * own + MARGIN, f"sequence {row}"
    for a, b in zip(state(mine), state(theirs), strict=True):
        assert relative(a, b) <= CACHE_ERROR[BF16]
    assert [r.outcome for r in mpk_dynamo.reports()] == [OUTCOME]
