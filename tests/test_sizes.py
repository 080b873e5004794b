"""Sizes that change between calls: batches, caches that grow, prompts. Right for each, and few compilations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import DynamicCache, StaticCache

import mpk_dynamo
from mpk_dynamo import by_size
from mpk_dynamo.errors import Unsupported
from mpk_dynamo.fallback import compile_outside
from mpk_dynamo.pipeline import Place
from mpk_dynamo.report import Report
from mpk_dynamo.settings import Settings
from mpk_dynamo.tools.families import build

STRICT = {"fallback": "error"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mpk_dynamo.clear_reports()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", torch.float32, num_hidden_layers=1)


def graphs() -> int:
    """How many graphs Dynamo has made."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(batch))


def static(model: Any, batch: int, prompt: int = 3) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(ids(batch, prompt), past_key_values=cache)
    return cache


def step(model: Any, compiled: Any, batch: int, mark: bool = False, **limits: int) -> None:
    caches = [static(model, batch) for _ in range(2)]
    token = torch.full((batch, 1), 9)
    if mark:
        for tensor in (token, caches[0].layers[0].keys, caches[0].layers[0].values):
            torch._dynamo.mark_dynamic(tensor, 0, **limits)
    with torch.no_grad():
        a, b = (f(token, past_key_values=c).logits for f, c in zip((compiled, model), caches))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(caches[0].layers[0].keys, caches[1].layers[0].keys, rtol=1e-4, atol=1e-5)


def few() -> list[Any]:
    every = pytest.param((*range(1, 17), 7), id="all", marks=pytest.mark.slow)
    return [pytest.param((1, 2, 3, 6, 3), id="few"), every]


@pytest.mark.parametrize("batches", few())
def test_batches(model: Any, batches: tuple[int, ...]) -> None:
    """One batch is a graph of its own for Dynamo, the first other one too; all further ones share a third."""
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options=STRICT)
    for batch in batches:
        step(model, compiled, batch)
    assert graphs() <= 3 and len(mpk_dynamo.reports()) == len(set(batches))
    assert sum(r.calls for r in mpk_dynamo.reports()) == len(batches)


def test_marked_batches(model: Any) -> None:
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options=STRICT)
    for batch in (5, 2, 3, 5):
        step(model, compiled, batch, mark=True)
    assert graphs() == 1 and [r.calls for r in mpk_dynamo.reports()] == [2, 1, 1]


def test_a_marked_range_is_compiled_at_once(model: Any) -> None:
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options=STRICT)
    step(model, compiled, 3, mark=True, min=2, max=5)
    assert [r.calls for r in mpk_dynamo.reports()] == [1, 0, 0, 0]
    for batch in (2, 5, 4, 3):
        step(model, compiled, batch, mark=True, min=2, max=5)
    assert graphs() == 1 and [r.calls for r in mpk_dynamo.reports()] == [2, 1, 1, 1]


def test_a_marked_range_beside_numbers_and_views_of_it() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
        return x.reshape(-1) * x.shape[0], y.sum() + x.shape[0] * 2, x.shape[0] * 3

    compiled = torch.compile(function, backend="mpk", fullgraph=True, options=STRICT)
    for rows in (4, 2, 6):
        x, y = torch.randn(rows, 3, 2).transpose(1, 2), torch.randn(7)
        torch._dynamo.mark_dynamic(x, 0, min=2, max=6)
        for ours, theirs in zip(compiled(x, y), function(x, y)):
            torch.testing.assert_close(ours, theirs)
    assert graphs() == 1 and len(mpk_dynamo.reports()) == 5


def test_dynamic_batches(model: Any) -> None:
    compiled = torch.compile(model, backend="mpk", dynamic=True)
    for batch in (3, 2, 4):
        step(model, compiled, batch)
    assert graphs() == 1 and all(r.node_kinds.get("Attention") for r in mpk_dynamo.reports())


@pytest.mark.slow
def test_enable_serves_more_batch_sizes_than_dynamo_compiles(model: Any) -> None:
    mpk_dynamo.enable(model, max_cache_len=8, **STRICT)
    try:
        for batch in range(1, 12):
            model.generate(ids(batch, 3), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    finally:
        mpk_dynamo.disable(model)
    assert graphs() <= 3 and [r.calls for r in mpk_dynamo.reports()] == [2] * 11


def test_sizes_beyond_the_limit_run_eagerly(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(by_size, "LIMIT", 2)
    layer = torch.nn.Linear(8, 8)
    compiled = torch.compile(layer, backend="mpk", options=STRICT)
    with torch.no_grad():
        for rows in (2, 3, 4, 5, 6, 5):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x), layer(x))
    assert [r.calls for r in mpk_dynamo.reports()] == [1, 1, 1] and caplog.text.count("run eagerly") == 1


def test_more_rows_than_the_kernel_takes_are_for_the_fallback() -> None:
    """The graph for every size goes there as a whole when it comes with too many rows at first."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    compiled = torch.compile(layers, backend="mpk")
    with torch.no_grad():
        for rows in (16, 17, 2, 40):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x), layers(x))
    assert [r.outcome.split()[0] for r in mpk_dynamo.reports()] == ["reference", "fallback"] and graphs() == 2
    assert "17 rows" in mpk_dynamo.reports()[1].reason


def test_a_later_size_that_is_refused_falls_back() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return (x[:, None] * x[None]).sum(-1).cumsum(0)

    compiled = torch.compile(model, backend="mpk")
    for rows in (4, 5, 5000, 6):
        x = torch.randn(rows, 1)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    outcomes = [r.outcome for r in mpk_dynamo.reports()]
    assert outcomes == ["reference", "reference", "fallback to eager", "reference"]
    assert "running sum" in mpk_dynamo.reports()[2].reason


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_growing_cache(model: Any, batch: int) -> None:
    compiled = torch.compile(model, backend="mpk", fullgraph=True)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    tokens, mask = ids(batch, 20), torch.ones(batch, 20, dtype=torch.int64)
    mask[0, : batch - 1] = 0
    with torch.no_grad():
        for cache in caches:
            model(tokens[:, :4], attention_mask=mask[:, :4].clone(), past_key_values=cache)
        for i in range(4, 20):
            given = {"input_ids": tokens[:, i : i + 1], "attention_mask": mask[:, : i + 1].clone()}
            a, b = (f(**given, past_key_values=c).logits for f, c in zip((compiled, model), caches))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert graphs() == 2
    first, second = mpk_dynamo.reports()
    assert first.outcome.startswith("eager for one call") and second.calls == 15 and len(second.programs) == 2
    assert any("changes from call to call" in why for why in second.left_out)


@pytest.mark.parametrize("fallback", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_growing_caches_of_other_batches(model: Any, fallback: str) -> None:
    """A batch that changed is a symbol beside the cache's length: programs for each batch, none for each length."""
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options={"fallback": fallback})
    for batch, prompt in ((2, 4), (3, 6), (5, 3), (4, 5), (3, 9)):
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        tokens, mask = ids(batch, 16), torch.ones(batch, 16, dtype=torch.int64)
        mask[0, :2] = 0
        with torch.no_grad():
            for cache in caches:
                model(tokens[:, :prompt], attention_mask=mask[:, :prompt].clone(), past_key_values=cache)
            for i in range(prompt, prompt + 5):
                given = {"input_ids": tokens[:, i : i + 1], "attention_mask": mask[:, : i + 1].clone()}
                a, b = (f(**given, past_key_values=c).logits for f, c in zip((compiled, model), caches))
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for kept, plain in zip(caches[0].layers, caches[1].layers):
            torch.testing.assert_close(kept.keys, plain.keys, rtol=1e-4, atol=1e-5)
    first, *others = mpk_dynamo.reports()
    assert first.outcome.startswith("eager for one call")
    assert graphs() == 3 and [r.calls for r in others] == [4, 10, 5, 5]
    assert all(len(r.programs) == 2 and r.outcome == f"reference and {fallback}" for r in others)


def test_a_graph_with_a_grown_cache_that_is_called_again_is_compiled() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, y))

    compiled = torch.compile(model, backend="mpk")
    x, y = torch.randn(6, 4), torch.randn(1, 4)
    for _ in range(3):
        assert torch.equal(compiled(x, y), model(x, y))
    (report,) = mpk_dynamo.reports()
    assert report.outcome == "reference" and report.calls == 2


def test_prompts_are_compiled_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first length alone is run eagerly; the second gives a graph for all."""
    compiles: list[Any] = []

    def inductor(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compiles.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)][0])
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", inductor)
    compiled = torch.compile(model, backend="mpk", options={"fallback": "inductor"})
    for length in (18, 20, 25, 18):
        caches = [StaticCache(config=model.config, max_cache_len=40) for _ in range(2)]
        with torch.no_grad():
            a, b = (f(ids(1, length), past_key_values=c).logits for f, c in zip((compiled, model), caches))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(compiles) == 1 and all("query tokens" in r.reason for r in mpk_dynamo.reports())
    assert not isinstance(compiles[0][1], int) or graphs() == 2


def test_a_graph_of_fixed_sizes_stays_so_beside_fakes_of_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's mode makes symbols of the sizes of what it is handed, and fails on guards about them."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    number = mode.from_tensor(torch.tensor(3.0), static_shapes=True)
    given: list[Any] = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs: given.extend(inputs) or gm.forward)
    gm = torch.fx.symbolic_trace(lambda x, n: x + n)
    compile_outside(gm, [torch.ones(4, 5), number], "inductor", Report())
    assert given[0].fake_mode is mode and all(type(n) is int for n in given[0].shape)


def test_an_empty_cache_on_a_gpu_is_no_case_for_a_program() -> None:
    """Its count is a tensor on the CPU until the first call moved it."""
    with FakeTensorMode():
        inputs = [torch.empty(2, 20, device="cuda"), torch.empty((), dtype=torch.int64)]
    with pytest.raises(Unsupported, match="empty cache") as why:
        Place.of(inputs, Settings())
    assert why.value.passing
    with FakeTensorMode():
        inputs.append(torch.empty(3))
    with pytest.raises(Unsupported, match="inputs are on cpu, cuda:0") as why:
        Place.of(inputs, Settings())
    assert not why.value.passing
