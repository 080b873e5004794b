"""Every pointwise operator of the table at the edges of its types, against torch: what is not a number, infinities,
signed zeros, denormals, the greatest and least values.

Each value stands alone in its tensor's row often enough for torch's vectorised and plain code to meet it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capturing import run
from test_pointwise import BINARY, UNARY

REPEATS = 17  # more than a vector of any CPU holds, and no multiple of one
SLACK = {torch.float64: 1e-15, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative difference: a unit in the last place of a narrow result, a few of f32, whose functions are others here."""


CANCELS = {"gelu": 1e-6}
"""Absolute difference: the tail is a small difference of numbers near 1, good to a few last places of f32."""


def edges(dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.tensor([False, True])
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.tensor([info.min, info.min + 1, -7, -1, 0, 1, 2, 7, info.max - 1, info.max], dtype=dtype)
    info = torch.finfo(dtype)
    positive = [0.0, info.smallest_normal / 4, info.smallest_normal, 1e-3, 0.5, 1.0, 1.5, 2.5, 3.0, 20.0, 90.0]
    positive += [info.max, float("inf")]
    return torch.tensor([x for p in positive for x in (p, -p)] + [float("nan")], dtype=torch.float64).to(dtype)


def assert_alike(name: str, ours: torch.Tensor, theirs: torch.Tensor, what: str, signs: bool = True) -> None:
    """The same kind of number everywhere: nan, an infinity of the same sign, or near; zeros of the same sign if signs
    and the operator leaves it to neither device of torch."""
    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
    if not theirs.dtype.is_floating_point:
        other = ours != theirs
        assert not other.any(), f"{what}: {ours[other][:5].tolist()} for {theirs[other][:5].tolist()}"
        return
    a, b = ours.double(), theirs.double()
    finite = b.isfinite()
    wrong = (a.isnan() != b.isnan()) | (~finite & ~b.isnan() & (a != b)) | (finite & ~a.isfinite())
    # results below the normal numbers may be flushed or rounded otherwise
    slack = SLACK[theirs.dtype] * b.abs() + CANCELS.get(name, 0.0) + 2 * torch.finfo(theirs.dtype).smallest_normal
    wrong |= finite & ~((a - b).abs() <= slack)
    if signs and name not in ZERO_SIGN_OPEN:
        wrong |= (a == 0) & (b == 0) & (a.signbit() != b.signbit())
    assert not wrong.any(), f"{what}: {a[wrong][:5].tolist()} for {b[wrong][:5].tolist()}"


def assert_all_alike(ours: dict[str, Any], theirs: dict[str, Any], signs_open: frozenset[str] = frozenset()) -> None:
    """Results of many operators by their names, one tensor or several each. All that differ are reported."""
    failures = []
    for name in theirs:
        both = (ours[name], theirs[name])
        for k, (a, b) in enumerate(zip(*both, strict=True) if isinstance(both[1], (tuple, list)) else [both]):
            try:
                assert_alike(name, a.cpu(), b.cpu(), f"result {k} of {name}", name not in signs_open)
            except AssertionError as failure:
                failures.append(str(failure).split("\nassert")[0])
    assert not failures, "\n".join(failures)


# the sign of a zero is open where torch takes a maximum or minimum, or its vectorised code differs from its plain one
ZERO_SIGN_OPEN = frozenset(
    "gelu relu6 clamp clamp_min clamp_max clip hardtanh fmax fmin maximum minimum max min "
    "div.rounding floor_divide doubles".split()
)
# torch's vectorised code for the CPU multiplies and adds in one step, which overflows later
FUSED = frozenset("add sub rsub".split())
# torch's vectorised code of some CPUs doubles the greatest value before it halves it, its plain code does not
OVERFLOWS = frozenset(["gelu"])
# a denormal divisor: torch flushes it or not, by the way it takes
FLOORED = frozenset("div.rounding floor_divide remainder".split())


def plain(function: Callable[..., Any], x: torch.Tensor) -> Any:
    """The function's results of a vector, each element by itself, where torch takes no vectorised code."""
    results = [function(v) for v in x.split(1)]
    return torch.cat(results) if isinstance(results[0], torch.Tensor) else tuple(map(torch.cat, zip(*results)))


def check(name: str, function: Callable[..., Any], *args: torch.Tensor) -> None:
    ours, theirs, *_ = run(lambda *xs: function(*xs), *args)
    theirs = plain(function, *args) if name in OVERFLOWS else theirs
    flat = (ours, theirs) if isinstance(ours, (tuple, list)) else ((ours,), (theirs,))
    for k, (a, b) in enumerate(zip(*flat, strict=True)):
        if isinstance(b, torch.Tensor):
            assert_alike(name, a, b, f"result {k} of {[x.dtype for x in args]}")


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    function, dtypes = UNARY[name]
    for dtype in dtypes:
        check(name, function, edges(dtype).repeat_interleave(REPEATS))


def pairs(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of edge values for which the operator's result is defined."""
    values = edges(dtype)
    x, y = values.repeat_interleave(len(values)), values.repeat(len(values))
    if dtype.is_floating_point and name in FUSED | FLOORED:
        sizes = torch.stack((x, y)).abs().double()
        if name in FUSED:
            kept = (sizes <= torch.finfo(dtype).max / 4).all(0)
        else:
            kept = ((sizes == 0) | (sizes >= torch.finfo(dtype).smallest_normal) | sizes.isnan()).all(0)
        x, y = x[kept], y[kept]
    if not dtype.is_floating_point and name in UNDEFINED_FOR_INTEGERS:
        # the most negative value over -1 traps, and these functions divide by -(y * y + 1) and the like as well
        kept = (y != 0) & ((x != torch.iinfo(dtype).min) | (x == 0))
        x, y = x[kept], y[kept]
    return x, y


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    function, dtypes = BINARY[name]
    for dtype in dtypes:
        check(name, function, *pairs(name, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_floor_division_by_anything(dtype: torch.dtype) -> None:
    check("floor_divide", lambda x, y: torch.div(x, y, rounding_mode="floor"), *pairs("floor_divide", dtype))


UNDEFINED_FOR_INTEGERS = frozenset(("div.rounding", "floor_divide", "remainder", "fmod", "pow"))


MOST, LEAST = 2**63 - 1, -(2**63)
FURTHER: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "greatest of the least": (lambda x: x.amax(-1), torch.full((2, 5), LEAST)),
    "least of the greatest": (lambda x: x.amin(-1), torch.full((2, 5), MOST)),
    "sums that wrap": (lambda x: x.sum(-1), torch.full((2, 5), MOST - 7)),
    "a 32-bit sum, divided": (
        lambda x: x.sum(-1, dtype=torch.int32) // (x[:, 0] // 2),
        torch.full((2, 5), 2**31 - 7, dtype=torch.int32),
    ),
    "bytes that wrap": (
        lambda x: ((x * 7 + 200) // 3, x - 200 > 100, torch.maximum(x + 100, x), -x),
        torch.arange(256, dtype=torch.uint8),
    ),
    "doubles": (
        lambda x: (x.relu(), torch.maximum(x, -3 * x).clamp(max=1.1), torch.sqrt(abs(x)) / 3),
        torch.arange(-9, 9, dtype=torch.float64) / 7,
    ),
}
"""Reductions of integers, and the types whose arithmetic is not in the table."""


def further(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: FURTHER[name][0](x) for name, x in given.items()}


@pytest.mark.parametrize("name", FURTHER)
def test_further(name: str) -> None:
    check(name, *FURTHER[name])
