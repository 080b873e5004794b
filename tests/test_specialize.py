"""Numbers among the inputs: guarded where a tensor depends on them, computed by Python where they are only counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import mpk_dynamo

STRICT = {"fallback": "error"}


class Counter:
    def __init__(self) -> None:
        self.count = 3


class Counting(torch.nn.Module):
    """Counts its calls in Python; `scale` makes the tensors depend on the count."""

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor, state: Counter) -> torch.Tensor:
        before = state.count
        state.count = 2 * before + 1
        return x * before if self.scale else x + 1


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", [False, True])
def test_counted_numbers(scale: bool) -> None:
    model, x = Counting(scale), torch.arange(4.0)
    compiled = torch.compile(model, backend="mpk", fullgraph=True, options=STRICT)
    ours, theirs = Counter(), Counter()
    with torch.no_grad():
        for _ in range(5):
            assert torch.equal(compiled(x, ours), model(x, theirs))
            assert ours.count == theirs.count
    # the first program has the number as a constant; the second serves all others when no tensor depends on it
    assert [r.calls for r in mpk_dynamo.reports()] == ([1, 1, 1, 1, 1] if scale else [1, 4])
