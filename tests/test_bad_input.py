"""Whatever comes in at the public entry points: the same as eager, or an error of this package's or PyTorch's own
that says what is wrong; and what was compiled goes on working."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import mpk_dynamo
from mpk_dynamo.errors import LaunchError, MpkError, OptionError
from mpk_dynamo.ir.region import check_apart
from mpk_dynamo.settings import Settings

common = {
    "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],  # a case is small as it is
}  # fmt: skip

# --- options ------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(sorted(f for f in Settings.__dataclass_fields__)) | st.text(max_size=8) | st.integers()
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
    | st.sampled_from([2**31, 2**32, 2**63, 10**400, math.inf, 1e18, 0, 1, "auto", "error", "cuda", "reference"])
    | st.lists(st.integers(), max_size=2) | st.builds(object)
)  # fmt: skip


@settings(max_examples=200, **common)
@given(st.dictionaries(NAMES, VALUES, max_size=4) | VALUES)
def test_options_are_right_or_refused(options: Any) -> None:
    try:
        made = Settings.from_options(options, environ={})
    except OptionError as error:
        assert error.remedy
        return
    for name, field in Settings.__dataclass_fields__.items():
        assert type(getattr(made, name)) is type(field.default)
    assert 0 < int(made.timeout_s * 1e9) < 2**64 and max(made.flight, made.flight_waiting, made.workers) < 2**32


# --- compiled calls -----------------------------------------------------------------------------------------------

WIDTH = 8


class Parts(nn.Module):
    """Products, sums of rows, pointwise operations; of one tensor or two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH, bias=False))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.body(self.norm(x)) + y).softmax(-1)


def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 2 + y, torch.maximum(x, y).sum(-1)


def in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x * y


def crosswise(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    y.sub_(x)
    return x + y


TARGETS: dict[str, Callable[[], Callable[..., Any]]] = {
    "parts": lambda: Parts().requires_grad_(False).eval(),
    "both": lambda: both,
    "in place": lambda: in_place,
    "crosswise": lambda: crosswise,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8,
          torch.bool, torch.complex64)  # fmt: skip
SHAPES = ((2, WIDTH), (1, WIDTH), (WIDTH,), (0, WIDTH), (2, 0), (3, 2, WIDTH), (2, 5), (WIDTH, WIDTH), (), (17, WIDTH))
LAYOUTS = ("contiguous", "transposed", "every second", "shifted", "expanded")
FILLS = ("normal", "nan", "inf", "huge", "zero", "denormal")
OTHERS = ("itself", "a view of it", "its rows turned", "shifted by one", None, 3, 1.5, "text", "meta")


def tensor(dtype: torch.dtype, shape: tuple[int, ...], layout: str, fill: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)

    def base(shape: tuple[int, ...]) -> torch.Tensor:
        x = torch.randn(shape, generator=generator)
        if fill == "nan":
            x.view(-1)[::3] = math.nan
        elif fill == "inf":
            x.view(-1)[::3] = math.inf
            x.view(-1)[1::5] = -math.inf
        elif fill != "normal":
            x *= {"huge": 1e30, "zero": 0.0, "denormal": 1e-42}[fill]
        return (x.nan_to_num(0, 100, -100).clamp(-100, 100) if not dtype.is_floating_point else x).to(dtype)

    if layout == "transposed" and len(shape) >= 2:
        return base((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    if layout == "every second" and shape:
        return base((*shape[:-1], shape[-1] * 2))[..., ::2]
    if layout == "shifted":
        size = math.prod(shape)
        return base((size + 1,))[1:].view(shape)
    if layout == "expanded" and shape:
        return base((1, *shape[1:])).expand(shape)
    return base(shape)


def other(x: torch.Tensor, what: Any) -> Any:
    """A second argument made of the first."""
    if what == "itself":
        return x
    if what == "a view of it":
        return x.view(x.shape)
    if what == "its rows turned":
        return x.transpose(0, -1) if x.dim() > 1 and x.shape[0] == x.shape[-1] else x.view(x.shape)
    if what == "shifted by one":
        storage = x.as_strided((x.untyped_storage().nbytes() // max(x.element_size(), 1),), (1,), 0)
        size = x.numel()
        return storage[1 : 1 + size].view(x.shape) if storage.numel() > size else x.view(x.shape)
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if what == "meta" else what


tensors = st.tuples(
    st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from(LAYOUTS), st.sampled_from(FILLS)
)
cases = st.tuples(st.sampled_from(list(TARGETS)), tensors, tensors | st.sampled_from(OTHERS), st.booleans())


def arguments(case: tuple) -> tuple[Any, Any]:
    _, first, second = case
    x = tensor(*first)
    return x, tensor(*second) if isinstance(second, tuple) else other(x, second)


def outcome(call: Callable[..., Any], given: tuple[Any, Any]) -> tuple[Any, Any]:
    """(results or None, what was raised or None)."""
    try:
        with torch.no_grad():
            out = call(*given)
    except Exception as error:  # any: what is allowed is asked afterwards
        return None, error
    return (out if isinstance(out, tuple) else (out,)), None


def assert_same(a: Any, b: Any) -> None:
    if not isinstance(a, torch.Tensor):
        assert a is b or a == b
        return
    assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    if a.device.type == "meta":
        return
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        assert torch.equal(a, b)
        return
    allowed = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(a.dtype, 1e-5)
    torch.testing.assert_close(a, b, rtol=allowed, atol=allowed, equal_nan=True)



@pytest.mark.parametrize("second", ["a view of it", "shifted by one"])
@pytest.mark.parametrize("name", ["in place", "crosswise"])
def test_arguments_that_share_memory(name: str, second: str) -> None:
    """Nothing of Dynamo's guards tells them from others."""
    check((name, (torch.float32, (2, WIDTH), "shifted", "normal"), second, True))


@pytest.mark.parametrize(("name", "shape"), [("parts", (0, WIDTH)), ("both", (2, 0)), ("in place", (0, WIDTH))])
def test_tensors_without_elements(name: str, shape: tuple[int, ...]) -> None:
    empty = torch.float32, shape, "contiguous", "nan"
    check((name, empty, empty, True))
    check((name, (torch.float32, (1, WIDTH), "contiguous", "normal"), empty, False))


def test_spans_that_share_memory() -> None:
    check_apart([(0, 4, True, "a"), (4, 8, True, "b"), (8, 9, False, "c"), (8, 10, False, "d")])
    for spans in (
        [(0, 4, True, "a"), (3, 8, False, "b")],
        [(0, 100, False, "a"), (3, 4, False, "c"), (50, 60, True, "b")],
        [(0, 100, True, "a"), (3, 4, True, "b")],
        [(5, 9, False, "a"), (5, 9, True, "b")],
    ):
        with pytest.raises(LaunchError, match="share memory.*clone"):
            check_apart(spans)


def check(case: tuple) -> None:
    *case, usual_first = case
    function = TARGETS[case[0]]()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(function), backend="mpk", dynamic=False)
    usual = tensor(torch.float32, (2, WIDTH), "contiguous", "normal"), torch.ones(2, WIDTH)
    wanted, _ = outcome(function, tuple(t.clone() for t in usual))
    if usual_first:
        outcome(compiled, tuple(t.clone() for t in usual))
    for _ in range(2):
        theirs, ours = arguments(case), arguments(case)
        expected, refused = outcome(function, theirs)
        found, error = outcome(compiled, ours)
        if refused is not None:
            assert error is not None and str(error), f"eager raises {refused!r}"
        elif error is not None:
            assert isinstance(error, MpkError) and error.message, f"not a clear error: {error!r}"
        else:
            for a, b in zip((*expected, *theirs), (*found, *ours), strict=True):
                assert_same(a, b)
        # nothing is broken afterwards
        again, error = outcome(compiled, tuple(t.clone() for t in usual))
        assert error is None, error
        for a, b in zip(wanted, again, strict=True):
            assert_same(a, b)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Dynamo and this package say much about what they refuse."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()


@settings(max_examples=8, **common)
@given(cases)
def test_any_arguments(case: tuple) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=250, **common)
@given(cases)
def test_many_arguments(case: tuple) -> None:
    check(case)
