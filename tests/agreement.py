"""When results of device code are those of the reference."""

from __future__ import annotations

import torch

EPSILON = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
"""Of the narrow types: one unit in the last place, relative to the smallest number of its binade."""


def assert_equals(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    """Integers and bools exactly. Floats, with eps of the type: each element within eps of its own size plus eps of
    the typical size (where terms cancel, what they were rounded to stays), and eps / 4 in the norm, so that only few
    elements may have been rounded the other way."""
    assert got.dtype is want.dtype and got.shape == want.shape
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{name}: {(got != want).sum()} of {want.numel()} elements differ"
        return
    eps = EPSILON[want.dtype]
    a, b = got.double(), want.double()
    assert torch.isfinite(a).all(), f"{name}: {(~torch.isfinite(a)).sum()} of {a.numel()} elements are not finite"
    typical = b.square().mean().sqrt()
    excess = (a - b).abs() - eps * (b.abs() + typical)
    worst = int(excess.argmax())
    assert excess.max() <= 0, f"{name}[{worst}]: {a.flatten()[worst]} instead of {b.flatten()[worst]}"
    assert (a - b).norm() <= eps / 4 * b.norm(), f"{name}: relative error {(a - b).norm() / b.norm():.2e}"
