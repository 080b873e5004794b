"""Weights that are no plain parameters: quantised ones are refused with a reason, written ones are read as written."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import mpk_dynamo


class Quantised(torch.nn.Module):
    """A linear layer that keeps int8 weights and a scale per row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (16, 32), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class Drifting(torch.nn.Module):
    """A linear layer that changes its weight before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.add_(1.0)
        return F.linear(x, self.weight)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    torch.manual_seed(0)


def test_a_quantised_layer_falls_back_and_says_why() -> None:
    layer, x = Quantised(), torch.randn(1, 32)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="mpk", options={"fallback": "eager"})(x), layer(x))
    (report,) = mpk_dynamo.reports()
    assert (
        report.outcome.startswith("fallback") and "int8" in report.reason and "weight" in report.origin + report.reason
    )


def test_a_weight_written_in_the_step_is_read_after_the_write() -> None:
    layer, x = Drifting(), torch.randn(1, 32)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="mpk", options={"fallback": "error"})
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(layer.weight, eager.weight)
