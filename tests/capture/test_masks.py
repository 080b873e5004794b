"""Masks: whatever their form, with either attention implementation, results are eager's and only live keys count."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from capturing import capture

import mpk_dynamo
from mpk_dynamo.ir.graph import Attention, Graph
from mpk_dynamo.ir.printer import print_graph
from mpk_dynamo.passes.graph import PASSES
from mpk_dynamo.tools.families import WINDOW, build

BATCH, PROMPT, CAPACITY = 2, 6, 24
IMPLEMENTATIONS = ["sdpa", "eager"]
LOWEST = torch.finfo(torch.float32).min


def padding(total: int) -> torch.Tensor:
    mask = torch.ones(BATCH, total, dtype=torch.int64)
    mask[0, :2] = 0
    return mask


def full(total: int, *, holes: bool) -> torch.Tensor:
    """bool [B, 1, 1, CAPACITY]: keys up to the newest, some of them left out."""
    mask = (torch.arange(CAPACITY) < total).repeat(BATCH, 1)
    mask[0, :2] = False
    if holes:
        mask[:, 3:5] = False
    return mask[:, None, None]


MASKS: dict[str, Any] = {
    "none": lambda total: None,
    "padding": padding,
    "bool": lambda total: full(total, holes=False),
    "bool with holes": lambda total: full(total, holes=True),
    "float with holes": lambda total: torch.where(full(total, holes=True), 0.0, LOWEST),
    "float bias": lambda total: torch.where(full(total, holes=True), torch.arange(CAPACITY) * -0.3, LOWEST),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()


def prompted(model: Any) -> Any:
    cache = transformers.StaticCache(config=model.config, max_cache_len=CAPACITY)
    ids = torch.randint(3, 256, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, past_key_values=cache, attention_mask=padding(PROMPT))
    return cache


def inputs(step: int, mask: str) -> dict[str, Any]:
    total = PROMPT + step + 1
    token = torch.full((BATCH, 1), 7 + step)
    given = MASKS[mask](total)
    if mask not in ("none", "padding") and given.dtype.is_floating_point:
        given = given.float()
    return {"input_ids": token, "attention_mask": given, "position_ids": torch.full((BATCH, 1), total - 1)}


def turns() -> list[Any]:
    """Each mask with one implementation by default."""
    pairs = [(m, i) for m in MASKS for i in IMPLEMENTATIONS]
    return [pytest.param(*p, marks=[pytest.mark.slow] if (k % 4) in (1, 2) else []) for k, p in enumerate(pairs)]


@pytest.mark.parametrize(("mask", "implementation"), turns())
def test_results_are_those_of_eager(mask: str, implementation: str) -> None:
    model = build("llama", torch.float32, num_hidden_layers=1, attn_implementation=implementation)
    compiled = torch.compile(model.forward, backend="mpk", fullgraph=True, dynamic=False, options={"fallback": "error"})
    ours, theirs = prompted(model), prompted(model)
    with torch.no_grad():
        for step in range(2):
            given = inputs(step, mask)
            a, b = compiled(**given, past_key_values=ours).logits, model(**given, past_key_values=theirs).logits
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if mask == "padding":  # its shape grows with the tokens
        return
    assert len(mpk_dynamo.reports()) == 1


def captured(implementation: str, mask: str, family: str = "llama") -> Graph:
    model = build(family, num_hidden_layers=1, attn_implementation=implementation)
    found: list[Graph] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        graph = capture(gm, example_inputs).graph
        for graph_pass in PASSES:
            graph = graph_pass(graph)
        found.append(graph)
        return gm.forward

    torch._dynamo.reset()
    cache, given = prompted(model), inputs(0, mask)
    with torch.no_grad():
        torch.compile(model.forward, backend=backend, fullgraph=True)(**given, past_key_values=cache)
    (graph,) = found
    return graph


def unnamed(graph: Graph) -> list[str]:
    """The graph as text, with names that only say which operator made a buffer numbered in order; what a mask is, and
    how its live keys are found, left out."""
    lines = [x for x in print_graph(graph).split("\n") if not re.match(r"\s*(mask|first|last|live)|.*live_keys", x)]
    text = "\n".join(lines)
    internal = [n for n, b in graph.buffers.items() if b.kind.value in ("scratch", "output")]
    internal += [n.name for n in graph.nodes]
    for k, name in enumerate(dict.fromkeys(internal)):
        text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", f"%{k}", text)
    return text.split("\n")


@pytest.mark.parametrize("mask", ["none", "float with holes"])
def test_both_implementations_are_one_program(mask: str) -> None:
    sdpa, eager = (captured(i, mask) for i in IMPLEMENTATIONS)
    assert len(sdpa.nodes) == len(eager.nodes) and sum(isinstance(n, Attention) for n in eager.nodes) == 1
    assert unnamed(sdpa) == unnamed(eager)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_no_query_sees_are_not_read(implementation: str) -> None:
    """Neither those behind the newest token, nor padding in front."""
    model = build("llama", torch.float32, num_hidden_layers=1, attn_implementation=implementation)
    compiled = torch.compile(model.forward, backend="mpk", fullgraph=True, options={"fallback": "error"})
    caches = [prompted(model) for _ in range(2)]
    for tensor in (caches[1].layers[0].keys, caches[1].layers[0].values):
        tensor[0, :, :2] = float("nan")
        tensor[:, :, PROMPT + 1 :] = float("nan")
    with torch.no_grad():
        clean, poisoned = (compiled(**inputs(0, "float with holes"), past_key_values=c).logits for c in caches)
    assert torch.equal(clean, poisoned)


class Attend(torch.nn.Module):
    """One query at `position` against keys, with a mask made by arithmetic."""

    def __init__(self, kind: str, written_out: bool) -> None:
        super().__init__()
        self.kind, self.written_out = kind, written_out

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        key = torch.arange(k.shape[2])
        allowed = key <= position
        if self.kind == "sliding":
            allowed = allowed & (key > position - 5)
        elif self.kind == "chunked":
            allowed = allowed & (key // 4 == position // 4)
        if not self.written_out:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None, None, None])
        added = torch.where(allowed, 0.0, LOWEST)
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + added).softmax(-1) @ v


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_masks_by_arithmetic(kind: str, written_out: bool) -> None:
    model = Attend(kind, written_out)
    q, k, v = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options={"fallback": "error"})
    with torch.no_grad():
        for at in (0, 3, 4, 9, 15):
            position = torch.tensor(at)
            visible = range(16) if kind == "causal" else range(at - 4, at + 1) if kind == "sliding" else None
            first = max(0, visible.start) if visible else at // 4 * 4
            dead_k, dead_v = k.clone(), v.clone()
            for tensor in (dead_k, dead_v):
                tensor[:, :, :first] = float("nan")
                tensor[:, :, at + 1 :] = float("nan")
            torch.testing.assert_close(compiled(q, dead_k, dead_v, position), model(q, k, v, position))
    (report,) = mpk_dynamo.reports()
    assert report.node_kinds["Attention"] == 1


@pytest.mark.parametrize("family", ["mistral", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_window_that_fills_and_rolls(family: str) -> None:
    """No compilation per token: Dynamo makes three graphs of the cache's own code, whatever the number of tokens. Once
    the cache's length is a number that changes, the mask is made of it outside; attention stays in a program."""
    model = build(family, torch.float32)  # two layers: gemma3 has one of each kind
    compiled = torch.compile(model.forward, backend="mpk", fullgraph=True)
    caches = [transformers.StaticCache(config=model.config, max_cache_len=2 * WINDOW + 8) for _ in range(2)]
    ids = torch.randint(3, 256, (1, 2 * WINDOW + 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :4], past_key_values=cache)
        for i in range(4, ids.shape[1]):
            given = {"input_ids": ids[:, i : i + 1], "position_ids": torch.tensor([[i]])}
            a, b = (f(**given, past_key_values=c).logits for f, c in zip((compiled, model.forward), caches))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert len(mpk_dynamo.reports()) == 3
    for report in mpk_dynamo.reports():
        assert report.outcome.startswith("reference") and report.node_kinds["Attention"] == 2, str(report)
        assert sum(report.left_out.values()) < 0.1 * report.fx_nodes, str(report)


def test_explain_says_what_a_mask_costs() -> None:
    model = build("llama", num_hidden_layers=2)
    text = str(mpk_dynamo.explain(model, **inputs(0, "bool"), past_key_values=prompted(model)))
    found = re.search(rf"mask +bool, shared by 2 attentions of {CAPACITY} keys: \d+ tasks find the live keys", text)
    assert found, text
