"""The text that stands for a capture: the same for the same graph, another for whatever a capture depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from mpk_dynamo import pipeline, proven
from mpk_dynamo.capture import capture, importer
from mpk_dynamo.capture.identity import identity
from mpk_dynamo.capture.registry import LOWERINGS
from mpk_dynamo.dump import Dump
from mpk_dynamo.ir.structure import structure
from mpk_dynamo.report import Report
from mpk_dynamo.settings import Settings


def graph_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """What Dynamo hands to a backend."""
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append((gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*args, **kwargs)
    (found,) = seen
    return found


def text_of(function: Callable[..., Any], *args: Any) -> str | None:
    return identity(*graph_of(function, *args))


class Layer(nn.Module):
    def __init__(self, scale: float = 2.0, width: int = 8) -> None:
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(8, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.linear(x)) * self.scale


def test_the_same_graph_has_the_same_text_and_another_has_not() -> None:
    x = torch.zeros(2, 8)
    buffered = Layer()
    del buffered.linear.weight
    buffered.linear.register_buffer("weight", torch.zeros(8, 8))
    others: list[tuple[Callable[..., Any], torch.Tensor]] = [
        (Layer(), x), (Layer(2.5), x), (Layer(width=9), x), (buffered, x), (Layer(), torch.zeros(3, 8)),
        (Layer(), torch.zeros(8, 2).T), (Layer().double(), x.double()), (nn.Sequential(Layer()), x),
        (Layer(), torch.zeros(17)[1:].view(2, 8)), (lambda x: x.exp(), x), (lambda x: x.log(), x),
        (lambda x: x[:, 1:], x), (lambda x: x[:, 2:], x), (lambda x: x.to(torch.bfloat16), x),
        (lambda x: x.to(torch.float16), x), (lambda x: x.sum(0, True), x), (lambda x: x.sum(0), x),
        (lambda x: x.sum(1), x), (lambda x: (x - 1, x + 1), x), (lambda x: (x + 1, x - 1), x),
    ]  # fmt: skip
    texts = [text_of(f, x) for f, x in others]
    assert None not in texts and len(set(texts)) == len(texts)
    # where in this file an operation stands is part of it: origins are shown to people
    again = [text_of(f, x) for f, x in others[:2]]
    assert again == texts[:2]


def test_memory_that_is_shared_is_part_of_it() -> None:
    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.add_(y)

    base = torch.zeros(4, 8)
    apart = text_of(add, torch.zeros(2, 8), torch.zeros(2, 8))
    assert apart != text_of(add, base[:2], base[:2].view(2, 8))
    assert apart == text_of(add, torch.ones(2, 8), torch.ones(2, 8)), "values are not"


def test_what_is_not_known_has_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 8)
    gm, inputs = graph_of(Layer(), x)
    assert identity(gm, inputs) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert identity(gm, inputs) is None
    before = identity(gm, inputs)
    with monkeypatch.context() as patch:
        patch.setitem(LOWERINGS, "silu", lambda imp, call: None)  # somebody else's
        assert identity(gm, inputs) is None
    monkeypatch.setattr(torch, "__version__", "0")
    assert identity(gm, inputs) != before
    (first, *_) = [n for n in gm.graph.nodes if n.op == "call_function"]
    first.target = lambda *args: args[0]
    assert identity(gm, inputs) is None
    assert identity(gm, [torch.zeros(2, 8).to_sparse(), *inputs[1:]]) is None


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "gpt2"))])
def test_a_stored_capture_is_the_capture(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a decode step, and a program of it too."""
    from mpk_dynamo.tools.decoder import Decoder
    from mpk_dynamo.tools.families import build

    model = build(family)
    gm, inputs = graph_of(model, **Decoder(model, batch=2, prompt=3, max_cache=8, steps=1).steps[0])
    store = Settings.from_options({"cache_dir": str(tmp_path)}, environ={})

    def captured() -> Any:
        return pipeline.capture_graph(gm, inputs, Report(), Dump("", None, Report()), store)

    wanted, first = capture(gm, inputs), captured()
    assert identity(gm, inputs) is not None
    monkeypatch.setattr(importer.Importer, "run", None)  # nothing is captured from here on
    found = captured()
    for made in (first, found):
        for f in dataclasses.fields(made):
            if f.name == "graph":
                assert structure(made.graph) == structure(wanted.graph)
            else:
                assert getattr(made, f.name) == getattr(wanted, f.name), f.name
    monkeypatch.setattr(proven, "_sources", lambda: "edited")
    with pytest.raises(TypeError):
        captured()


def test_a_capture_with_tensors_of_its_own_is_not_stored(tmp_path: Path) -> None:
    gm, inputs = graph_of(lambda x: x + torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
    made = capture(gm, inputs)
    assert made.constants
    proven.save_capture(made, "ab" * 32, tmp_path)
    assert list(tmp_path.iterdir()) == []
