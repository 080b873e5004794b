"""Every operator of the pointwise table, through torch.compile, against eager: dtype, shape and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import same

from mpk_dynamo.capture.pointwise import names

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (*FLOATS, torch.int64, torch.int32)
EXACT = (torch.float32, torch.int64, torch.int32)
ALL = (*NUMBERS, torch.bool)
Function = Callable[..., Any]

# operator of the table -> (a function that uses it, dtypes)
UNARY: dict[str, tuple[Function, tuple[torch.dtype, ...]]] = {
    "neg": (torch.neg, NUMBERS),
    "negative": (torch.negative, NUMBERS),
    "abs": (torch.abs, NUMBERS),
    "absolute": (torch.absolute, NUMBERS),
    "sqrt": (lambda x: torch.sqrt(abs(x)), NUMBERS),
    "rsqrt": (lambda x: torch.rsqrt(abs(x) + 1), NUMBERS),
    "exp": (torch.exp, ALL),
    "exp2": (torch.exp2, FLOATS),
    "log": (lambda x: torch.log(abs(x) + 1), NUMBERS),
    "log2": (lambda x: torch.log2(abs(x) + 1), NUMBERS),
    "log1p": (lambda x: torch.log1p(abs(x)), NUMBERS),
    "expm1": (torch.expm1, FLOATS),
    "sin": (torch.sin, NUMBERS),
    "cos": (torch.cos, NUMBERS),
    "tanh": (torch.tanh, NUMBERS),
    "sigmoid": (torch.sigmoid, NUMBERS),
    "special_expit": (torch.special.expit, FLOATS),
    "erf": (torch.erf, FLOATS),
    "reciprocal": (lambda x: torch.reciprocal(abs(x) + 1), NUMBERS),
    "floor": (torch.floor, NUMBERS),
    "ceil": (torch.ceil, NUMBERS),
    "trunc": (torch.trunc, NUMBERS),
    "fix": (torch.fix, NUMBERS),
    "round": (torch.round, NUMBERS),
    "sign": (torch.sign, ALL),
    "sgn": (torch.sgn, NUMBERS),
    "square": (torch.square, NUMBERS),
    "relu": (F.relu, NUMBERS),
    "silu": (F.silu, FLOATS),
    "gelu": (lambda x: (F.gelu(x), F.gelu(x, approximate="tanh")), FLOATS),
    "softplus": (lambda x: F.softplus(x * 9, beta=2), FLOATS),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), FLOATS),
    "elu": (F.elu, FLOATS),
    "relu6": (lambda x: F.relu6(x * 4), FLOATS),
    "hardtanh": (F.hardtanh, FLOATS),
    "hardsigmoid": (F.hardsigmoid, FLOATS),
    "hardswish": (F.hardswish, FLOATS),
    "mish": (F.mish, FLOATS),
    "log_sigmoid": (F.logsigmoid, FLOATS),
    "clamp": (lambda x: (x.clamp(-1, 1), x.clamp(max=1), x.clamp(min=x.flip(0))), NUMBERS),
    "clip": (lambda x: torch.clip(x, -1, 1), NUMBERS),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), NUMBERS),
    "clamp_max": (lambda x: torch.clamp_max(x, 0), NUMBERS),
    "logical_not": (torch.logical_not, ALL),
    "bitwise_not": (torch.bitwise_not, (torch.bool, torch.int64, torch.int32)),
    "isnan": (lambda x: torch.isnan(x / x), ALL),
    "isinf": (lambda x: torch.isinf(x / 0), ALL),
    "isfinite": (lambda x: torch.isfinite(x / 0), ALL),
    "pow": (lambda x: (x**1, x**2, x**3), NUMBERS),
}
BINARY: dict[str, tuple[Function, tuple[torch.dtype, ...]]] = {
    "add": (lambda x, y: (x + y, torch.add(x, y, alpha=2), x + 1, 2 + y), NUMBERS),
    "sub": (lambda x, y: (x - y, torch.sub(x, y, alpha=3), x - 0.25), NUMBERS),
    "subtract": (torch.subtract, NUMBERS),
    "rsub": (lambda x, y: (1 - x, torch.rsub(x, y, alpha=2)), NUMBERS),
    "mul": (lambda x, y: (x * y, x * 0.1, 1 * x), ALL),
    "multiply": (torch.multiply, NUMBERS),
    "div": (lambda x, y: (x / (y * y + 1), x / 3), NUMBERS),
    "divide": (lambda x, y: torch.divide(x, y * y + 1), NUMBERS),
    "true_divide": (lambda x, y: torch.true_divide(x, y * y + 1), NUMBERS),
    "div.rounding": (
        lambda x, y: [torch.div(x * 9, s * (y * y + 1), rounding_mode=m) for m in ("floor", "trunc") for s in (1, -1)],
        EXACT,
    ),
    "floor_divide": (lambda x, y: (x // (y * y + 1), (x * 8) // 3, (x * 8) // -3), EXACT),
    "remainder": (lambda x, y: (x % (y * y + 1), (x * 8) % 3, (x * 8) % -3), EXACT),
    "maximum": (torch.maximum, ALL),
    "minimum": (torch.minimum, ALL),
    "max.other": (torch.max, NUMBERS),
    "min.other": (torch.min, NUMBERS),
    "fmax": (torch.fmax, NUMBERS),
    "fmin": (torch.fmin, NUMBERS),
    "addcmul": (lambda x, y: torch.addcmul(x, y, y, value=2), FLOATS),
    "lerp": (lambda x, y: (torch.lerp(x, y, 0.3), torch.lerp(x, y, y)), (torch.float32,)),
    "where": (lambda x, y: (torch.where(x > y, x, y), torch.where(x > y, x, 0.5)), NUMBERS),
    "masked_fill": (lambda x, y: (x.masked_fill(x > y, 2), x.masked_fill(y == x, float(7))), NUMBERS),
    "logical_and": (torch.logical_and, ALL),
    "logical_or": (torch.logical_or, ALL),
    "logical_xor": (torch.logical_xor, ALL),
    "bitwise_and": (lambda x, y: torch.bitwise_and(x > 0, y > 0), NUMBERS),
    "bitwise_or": (lambda x, y: torch.bitwise_or(x > 0, y > 0), NUMBERS),
    "bitwise_xor": (lambda x, y: torch.bitwise_xor(x > 0, y > 0), NUMBERS),
    "__and__": (lambda x, y: (x > 0) & (y > 0), NUMBERS),
    "__or__": (lambda x, y: (x > 0) | (y > 0), NUMBERS),
    "__xor__": (lambda x, y: (x > 0) ^ (y > 0), NUMBERS),
    "eq": (lambda x, y: (x == y, x == 1), ALL),
    "ne": (lambda x, y: (x != y, x != 1), ALL),
    "lt": (lambda x, y: (x < y, x < 0.1), ALL),
    "le": (lambda x, y: (x <= y, x <= 0.1), ALL),
    "gt": (lambda x, y: (x > y, x > 0.1), ALL),
    "ge": (lambda x, y: (x >= y, x >= 0.1), ALL),
    "not_equal": (torch.not_equal, NUMBERS),
    "less": (torch.less, NUMBERS),
    "less_equal": (torch.less_equal, NUMBERS),
    "greater": (torch.greater, NUMBERS),
    "greater_equal": (torch.greater_equal, NUMBERS),
}
# here torch's vectorised functions for the CPU fuse or round otherwise, in the last place
ULPS = dict.fromkeys("silu softplus mish log_sigmoid elu lerp sigmoid tanh special_expit".split(), 4)
ULPS |= dict(sqrt=1, rsqrt=1, pow=1, addcmul=2, gelu=16, sub=4, add=4, rsub=4)


def sample(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (3, 4, 5)) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    if dtype.is_floating_point:
        x[0, 0, :2] = torch.tensor([0.0, -0.0]) if seed else torch.tensor([0.5, -1.5])
        return x.to(dtype)
    return x > 0 if dtype is torch.bool else x.round().to(dtype)


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    function, dtypes = UNARY[name]
    same(lambda *xs: [function(x) for x in xs], *(sample(d, 0) for d in dtypes), ulps=ULPS.get(name, 0))


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    function, dtypes = BINARY[name]
    pairs = [sample(d, seed) for d in dtypes for seed in (0, 1)]
    same(lambda *xs: [function(x, y) for x, y in zip(xs[::2], xs[1::2])], *pairs, ulps=ULPS.get(name, 0))


def test_the_tables_above_are_complete() -> None:
    assert names() == set(UNARY) | set(BINARY)


@pytest.mark.parametrize("exponent", [0, 0.5, -0.5, -1, -2, 2.5, 4, -3])
def test_powers(exponent: float) -> None:
    def function(x: torch.Tensor, i: torch.Tensor, *floats: torch.Tensor) -> list[torch.Tensor]:
        out = [(abs(x) + 0.5) ** exponent for x in floats]
        return [*out, 2.0**x, *([i ** int(exponent)] if exponent in (0, 2, 4) else [])]

    same(function, sample(torch.float32, 0), sample(torch.int64, 0), *(sample(d, 0) for d in FLOATS), ulps=1)


@pytest.mark.parametrize("left", ALL)
def test_promotion_between_tensors(left: torch.dtype) -> None:
    """Types of every pair, with tensors of dimension 0 and Python numbers, which weigh less."""

    def all_ways(x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        out = [x * 2, x * 2.5, x * True, x > 1.5]
        for y in others:
            out += [x * y, x * y[0, 0, 0], x < y, torch.where(x > 0, x, y)]
        return out

    same(all_ways, sample(left, 0), *(sample(d, 1) for d in ALL))


def test_broadcasting() -> None:
    x, row, column, number = (torch.randn(s) for s in ((2, 3, 4), (4,), (3, 1), ()))
    same(lambda x, r, c, n: (x + r, r * c, n - x, c / (n + 9)), x, row, column, number)


@pytest.mark.parametrize("to", ALL)
def test_conversions(to: torch.dtype) -> None:
    same(lambda *xs: [x.to(to) for x in xs], *(sample(d, 0) for d in ALL))


def test_in_place_arithmetic_on_an_internal_tensor() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        z = y.clone()
        row = y[0]
        y.add_(1).mul_(y).clamp_(max=5)
        row.sub_(3)
        y[:, 1].fill_(9)
        y[:, ::2, 1:3] = x[:, ::2, :2]
        return y, z, row + 0, torch.zeros(3, 4).add_(x[0, 0, 0])

    for dtype in FLOATS:
        torch._dynamo.reset()
        same(function, sample(dtype, 0))


def test_numbers_made_in_the_graph() -> None:
    def function(x: torch.Tensor) -> tuple[Any, ...]:
        number = torch.tensor(0.3, dtype=x.dtype)
        return (
            x * number,
            torch.full((2, 3), 1.5, dtype=x.dtype) + x[0, :2, :3],
            torch.arange(2, 12, 3) * 2,
            torch.arange(4, dtype=x.dtype) / 3,
            torch.ones_like(x).tril() + x.triu(1),
            torch.zeros(3, dtype=torch.bool) | True,
            torch.arange(5)[None, :] <= torch.arange(4)[:, None],
            x.new_full((2,), 7) + x.new_ones(2),
        )

    for dtype in FLOATS:
        torch._dynamo.reset()
        same(function, sample(dtype, 0))


def test_arithmetic_with_the_neutral_element_costs_no_node() -> None:
    found = same(lambda x: (x * 1.0 / 1) ** 1 + 2, torch.randn(3))
    assert len(found.graph.nodes) == 1
