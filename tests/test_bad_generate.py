"""`enable` and generate() with whatever comes: what eager gives, or an error that says what is wrong."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from bad_generate import CAPACITY, cases, check, model_of
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

import mpk_dynamo
from mpk_dynamo.errors import OptionError

common = {
    "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate],
}  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Any:
    return model_of("cpu")


@pytest.fixture(scope="module")
def enabled() -> Any:
    return mpk_dynamo.enable(model_of("cpu"), max_cache_len=CAPACITY)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    mpk_dynamo.clear_reports()


WAYS: dict[str, dict[str, Any]] = {
    "enabled": {},
    "custom_generate": {"custom_generate": mpk_dynamo.custom_generate, "cache_implementation": "static"},
}


@settings(max_examples=3, **common)
@given(cases)
def test_any_call(plain: Any, enabled: Any, case: tuple) -> None:
    check(case, plain, enabled, {})


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_many_calls(plain: Any, enabled: Any, way: str) -> None:
    called, came = model_of("cpu"), Counter[str]()

    @settings(max_examples=120, **common)
    @given(cases)
    def run(case: tuple) -> None:
        came[check(case, plain, enabled if way == "enabled" else called, WAYS[way])] += 1

    run()
    assert came["equal"] > 20 and came["refused by both"] > 10, came


def kind(what: object) -> str:
    """An id that is the same in every process."""
    return type(what).__name__


@pytest.mark.parametrize("what", [None, 3, "a model", nn.Linear(2, 2), nn.Linear, object(), torch.ones(2)], ids=kind)
def test_what_cannot_generate(what: Any) -> None:
    with pytest.raises(OptionError, match="generat"):
        mpk_dynamo.enable(what)
    mpk_dynamo.disable(what)


@pytest.mark.parametrize(
    "options",
    [{"max_cache_len": n} for n in (0, -1, 2.5, "8", True, math.nan, [8])]
    + [{"workers": -1}, {"device": "tpu"}, {"no such": 1}, {"timeout_s": math.nan}, {"fallback": None}, {"flight": -1}],
    ids=repr,
)
def test_wrong_options_change_nothing(plain: Any, options: dict[str, Any]) -> None:
    before = dict(vars(plain.generation_config)), type(plain)
    with pytest.raises(OptionError):
        mpk_dynamo.enable(plain, **options)
    assert (dict(vars(plain.generation_config)), type(plain)) == before
