"""Modules of random parts in random order through the backend, against eager: linear layers, norms, activations,
residuals, gates and attention, at random widths, row counts and dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mpk_dynamo

WIDTHS = (16, 32, 64)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "softplus", "mish", "hardswish")
LEAVES = ("linear", "layer_norm", "rms_norm", "softmax", "gate", "attention", "scale", *ACTIVATIONS)
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Relative error against f64: at most twice eager's own, or a quarter of this where eager's is smaller."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, width = x.shape
        q, k, v = (t.view(1, rows, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(rows, width))


class Gate(nn.Module):
    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(getattr(F, self.activation)(self.gate(x)) * self.up(x))


class Step(nn.Module):
    """One part, with a residual around it or not."""

    def __init__(self, kind: str, width: int, residual: bool, option: int) -> None:
        super().__init__()
        self.kind, self.residual = kind, residual
        if kind == "linear":
            self.body: nn.Module = nn.Linear(width, width, bias=bool(option % 2))
        elif kind == "gate":
            self.body = Gate(width, ACTIVATIONS[option % len(ACTIVATIONS)])
        elif kind == "attention":
            self.body = Attention(width, (1, 2)[option % 2], bool(option // 2 % 2))
        elif kind == "layer_norm":
            self.body = nn.LayerNorm(width)
        elif kind == "rms_norm":
            self.body = nn.RMSNorm(width, eps=1e-6)
        elif kind == "scale":
            self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "softmax":
            y = x.softmax(-1)
        elif self.kind == "scale":
            y = x * self.weight - 0.25
        elif self.kind in ACTIVATIONS:
            y = getattr(F, self.kind)(x)
        else:
            y = self.body(x)
        return x + y if self.residual else y


steps = st.tuples(st.sampled_from(LEAVES), st.booleans(), st.integers(0, 7))
cases = st.tuples(
    st.lists(steps, min_size=1, max_size=6), st.sampled_from(WIDTHS), st.integers(1, 16),
    st.sampled_from(list(ALLOWED)), st.integers(0, 2**16),
)  # fmt: skip


def check(case: tuple, device: str) -> None:
    parts, width, rows, dtype, seed = case
    torch.manual_seed(seed)
    model = nn.Sequential(*(Step(kind, width, residual, option) for kind, residual, option in parts))
    x = torch.randn(rows, width).to(dtype)
    model = model.to(dtype)
    with torch.no_grad():
        exact = model.double()(x.double())
        model = model.to(device, dtype)
        eager = model(x.to(device)).cpu().double()
        torch._dynamo.reset()
        mpk_dynamo.clear_reports()
        ours = torch.compile(model, backend="mpk", options={"fallback": "error"})(x.to(device))
        assert ours.dtype is dtype and ours.shape == exact.shape
    (report,) = mpk_dynamo.reports()
    assert report.outcome == ("reference" if device == "cpu" else "kernel")
    norm = exact.norm().clamp(min=1e-6)
    own, error = ((y - exact).norm() / norm for y in (eager, ours.cpu().double()))
    assert error <= max(2 * own, ALLOWED[dtype] / 4), f"relative error {error:.2e}, eager's own {own:.2e}"


common = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=30, **common)
@given(cases)
def test_random_modules(case: tuple) -> None:
    check(case, "cpu")


@pytest.mark.slow
@settings(max_examples=400, **common)
@given(cases)
def test_many_random_modules(case: tuple) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@settings(max_examples=12, **common)
@given(cases)
def test_random_modules_by_the_kernel(case: tuple) -> None:
    check(case, "cuda")
