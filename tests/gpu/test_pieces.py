"""Pieces of graphs, sizes that change, and a cache that grows: against eager, on the tests' device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import ON_GPU, gpu
from small_models import make, token_ids
from transformers import DynamicCache, StaticCache

import mpk_dynamo

pytestmark = [*gpu, pytest.mark.usefixtures("fresh_backend")]
KERNEL = "kernel" if ON_GPU else "reference"


@torch.library.custom_op("mpk_gpu_test::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return x.sinh().clamp(-2, 2)


@odd.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Odd(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return odd(x)


@pytest.fixture(autouse=True)
def fresh_reports() -> None:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


def compare(model: Any, compiled: Any, caches: list[Any], ids: torch.Tensor, start: int) -> None:
    """Steps from `start` on with both caches, after the same prompt."""
    with torch.no_grad():
        for cache in caches:
            model.forward(ids[:, :start], past_key_values=cache)
        for i in range(start, ids.shape[1]):
            a, b = (
                f(ids[:, i : i + 1], past_key_values=c).logits for f, c in zip((compiled, model.forward), caches)
            )
            near(a, b)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_custom_operator_in_the_middle_of_a_model(batch: int) -> None:
    model = make("qwen3")
    model.model.layers[1].mlp.act_fn = Odd()
    compiled = torch.compile(model.forward, backend="mpk", fullgraph=True, dynamic=False)
    caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
    compare(model, compiled, caches, token_ids(batch, 20), 8)
    (report,) = mpk_dynamo.reports()
    assert report.outcome.startswith(KERNEL) and len(report.programs) == 2 and "odd" in str(report.left_out)
    print(report.summary())


def test_a_growing_cache_compiles_no_more_than_twice() -> None:
    model = make("llama")
    compiled = torch.compile(model.forward, backend="mpk")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    compare(model, compiled, caches, token_ids(1, 40), 5)
    reports = mpk_dynamo.reports()
    assert len(reports) <= 2 and reports[-1].outcome.startswith(KERNEL) and len(reports[-1].programs) >= 2
    print(reports[-1].summary())


@pytest.mark.parametrize("sizes", [range(2, 17, 2), range(1, 17, 2)], ids=["even", "odd"])
def test_batch_sizes_by_one_compiled_graph(sizes: range) -> None:
    model = make("qwen3")
    compiled = torch.compile(model.forward, backend="mpk")
    for batch in (*sizes, sizes[2]):
        caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
        compare(model, compiled, caches, token_ids(batch, 8), 6)
    reports = mpk_dynamo.reports()
    assert len(reports) == len(sizes) and all(r.outcome == KERNEL for r in reports), [r.summary() for r in reports]


def test_prompts_of_many_lengths_compile_once() -> None:
    model = make("llama")
    compiled = torch.compile(model.forward, backend="mpk")
    for length in (20, 25, 31, 40, 20):
        ids = token_ids(1, length)
        caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
        with torch.no_grad():
            a, b = (f(ids, past_key_values=c).logits for f, c in zip((compiled, model.forward), caches))
        near(a, b)
    assert len(mpk_dynamo.reports()) == 2
    compiles = [r for r in mpk_dynamo.reports() if "inductor" in r.seconds]
    assert len(compiles) == (1 if ON_GPU else 0)


def test_short_prompts_into_new_caches() -> None:
    """Few enough tokens for a program; but on a GPU the count of an empty cache is on the CPU."""
    model = make("llama")
    compiled = torch.compile(model.forward, backend="mpk")
    for length in (4, 9, 12, 4):
        ids = token_ids(1, length)
        caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
        with torch.no_grad():
            a, b = (f(ids, past_key_values=c).logits for f, c in zip((compiled, model.forward), caches))
            near(a, b)
            a, b = (f(ids[:, :1], past_key_values=c).logits for f, c in zip((compiled, model.forward), caches))
        near(a, b)
    assert any(r.outcome == KERNEL for r in mpk_dynamo.reports())
