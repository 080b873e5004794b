"""Model families through the backend: everything captured, a device form, and results as good as eager's.

By default each family runs one step of one layer at one batch size, 1 and 3 by turns; the rest is slow.
"""

from __future__ import annotations

from typing import Any

import pytest

from mpk_dynamo.targets import known
from mpk_dynamo.tools import coverage
from mpk_dynamo.tools.coverage import Coverage, ProgramCoverage, measure, table
from mpk_dynamo.tools.families import FAMILIES, PARTIAL, build

NAMES = list(FAMILIES)
WINDOWED = ["mistral", "gemma2", "gemma3"]


def check(c: Coverage, steps: int) -> None:
    """The claims of docs/coverage.md."""
    assert not c.failure and c.accurate, table([c])
    assert c.captured_nodes == 1.0 and c.weights > 0.99
    assert sum(p.calls for p in c.programs) == steps
    assert not any(p.device for p in c.programs)
    assert not any(p.reduced for p in c.programs), "a matrix is not streamed"
    assert 0 < c.error and all(p.report.outcome == "reference" for p in c.programs)


def turns() -> list[Any]:
    out = []
    for k, name in enumerate(NAMES):
        for batch in (1, 3):
            slow = (batch == 3) != bool(k % 2)
            out.append(pytest.param(name, batch, marks=[pytest.mark.slow] if slow else []))
    return out


@pytest.mark.parametrize(("name", "batch"), turns())
def test_family(name: str, batch: int) -> None:
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    if "layer_types" in FAMILIES[name]:
        layers["layer_types"] = FAMILIES[name]["layer_types"][:1]
    if "no_rope_layers" in FAMILIES[name]:
        layers["no_rope_layers"] = FAMILIES[name]["no_rope_layers"][:1]
    c = measure(name, batch, target=known("sm_90a"), steps=1, **layers)
    check(c, 1)
    assert len(c.programs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_steps_of_a_large_batch(name: str) -> None:
    c = measure(name, 8, target=known("sm_90a"))
    check(c, coverage.STEPS)
    # as its window fills, with the count first a constant and then a number; and when it is full
    assert len(c.programs) == (3 if name in WINDOWED else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi", "gpt2", "opt", "cohere", "gemma3"])
def test_eager_attention(name: str) -> None:
    """Attention written out with matrix products is one node, as sdpa is."""
    kinds = []
    for implementation in ("eager", "sdpa"):
        c = measure(name, 3, target=known("sm_90a"), steps=2, attn_implementation=implementation)
        check(c, 2)
        kinds.append(c.programs[0].report.node_kinds)
    assert kinds[0] == kinds[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTIAL)
def test_families_of_which_a_part_stays_outside(name: str) -> None:
    c = measure(name, 3, target=known("sm_90a"), steps=4)
    assert not c.failure and c.accurate, table([c])
    assert 0.5 < c.captured_nodes < 1.0 and 0.1 < c.weights < 1.0 and c.launches > 1
    assert all(p.report.programs and p.report.left_out for p in c.programs) and not any(p.device for p in c.programs)
    assert any("topk" in note and "no lowering" in note for note in c.notes())


def test_a_family_that_falls_short_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Report:
        fx_nodes, outcome, outside, left_out = 10, "", 0, {}

    refused = ProgramCoverage(Report(), reason="no lowering at model.x", calls=2)  # type: ignore[arg-type]
    formless = ProgramCoverage(Report(), device="a shift", calls=6, weights=50, reduced=25)  # type: ignore[arg-type]
    c = Coverage("made-up", 3, [refused, formless], weights_total=100, error=0.5, eager_error=0.01, differing=0.25)
    text = table([c, Coverage("broken", 1, failure="ValueError: no")], markdown=True)
    for expected in (
        "| made-up | 3 | 50% | 0% | 0.75 | 2 | 0 | no |", "falls back: no lowering at model.x",
        "6 of 8 steps have no device form: a shift", "25% of the weight bytes are read by plain reductions",
        "25% of the tokens differ", "broken, batch 1: ValueError: no",
    ):  # fmt: skip
        assert expected in text, text
    assert not c.accurate
    monkeypatch.setattr(coverage, "build", lambda *_, **__: build("llama", hidden_size=3))
    assert measure("llama", 1, target=known("sm_90a")).failure


def test_a_family_whose_process_dies_costs_one_row(capfd: pytest.CaptureFixture[str]) -> None:
    """The command measures in processes of their own; what they say, and how they end, becomes rows."""
    from mpk_dynamo.tools.cli import main

    words = ["coverage", "--family", "qwen2.5", "--batch", "1", "--jobs", "1"]
    assert main([*words, "--timeout", "1"]) == 1
    assert "qwen2.5, batch 1: not done after 1 s" in capfd.readouterr().out
