"""Each pass, on each unfused decoder, leaves results and the caller's tensors bit for bit the same."""

from __future__ import annotations

import graphs
import interpreter
import pytest
import torch

from mpk_dynamo.ir.graph import Graph
from mpk_dynamo.ir.types import DType
from mpk_dynamo.passes.graph import PASSES

MODELS = {
    "qwen3": graphs.Model(),
    "qwen3-batch3": graphs.Model(batch=3),
    "qwen3-direct": graphs.Model(mask="arithmetic"),
    "qwen3-direct-batch3": graphs.Model(mask="arithmetic", batch=3),
    "llama": graphs.Model(qk_norm=False),
    "llama-multi-head": graphs.Model(qk_norm=False, kv_heads=4, mask=None),
    "llama-multi-query-batch2": graphs.Model(qk_norm=False, kv_heads=1, batch=2),
    "qwen2": graphs.Model(qk_norm=False, bias=True),
    "qwen2-batch3": graphs.Model(qk_norm=False, bias=True, batch=3),
    "f32": graphs.Model(dtype=DType.F32, batch=2),
}


def assert_same(before: Graph, after: Graph, seeds: int = 1) -> None:
    for seed in range(seeds):
        inputs = interpreter.random_memory(before, seed)
        expected, kept = interpreter.run(before, inputs)
        got, kept_after = interpreter.run(after, inputs)
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, after.provenance[-1]
        for name, tensor in kept.items():
            assert torch.equal(tensor, kept_after[name]), (after.provenance[-1], name)


@pytest.mark.parametrize("name", MODELS)
def test_every_pass_keeps_results(name: str) -> None:
    graph = graphs.decoder(MODELS[name])
    inputs = interpreter.random_memory(graph)
    expected, kept = interpreter.run(graph, inputs)
    assert not any(torch.equal(kept[n], inputs[n]) for n in kept if "keys" in n or "length" in n), "nothing written"
    for graph_pass in PASSES:
        graph = graph_pass(graph)
        got, kept_after = interpreter.run(graph, inputs)
        assert torch.equal(expected[0], got[0]), graph_pass.__name__
        for n, tensor in kept.items():
            assert torch.equal(tensor, kept_after[n]), (graph_pass.__name__, n)


@pytest.mark.parametrize("name", MODELS)
def test_passes_are_idempotent(name: str) -> None:
    once = graphs.decoder(MODELS[name])
    for graph_pass in PASSES:
        once = graph_pass(once)
    twice = once
    for graph_pass in PASSES:
        twice = graph_pass(twice)
    assert twice.nodes == once.nodes and twice.buffers == once.buffers
