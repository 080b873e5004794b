"""generate() on the device with whatever comes, and compiled calls: eager's result or a clear error, and a device that
goes on working. Without what makes eager itself end the context: ids outside the embedding, draws from no number,
a cache handed in that is too small."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from bad_generate import CAPACITY, IDS, MASKS, SHAPES, WEIGHTS, check, extras, model_of
from harness import DEVICE, ON_GPU, gpu
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mpk_dynamo

pytestmark = [*gpu]
common = {
    "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate],
}  # fmt: skip
HARMLESS = {"max_new_tokens", "repetition_penalty", "min_new_tokens", "num_beams", "return_dict_in_generate",
            "output_logits", "use_cache", "cache_implementation"}  # fmt: skip
ids = st.sampled_from(IDS[:1]) | st.sampled_from([i for i in IDS if i not in ("negative", "too large")])
safe = extras.filter(lambda e: set(e) <= HARMLESS)
cases = st.tuples(
    st.sampled_from(SHAPES[:3]) | st.sampled_from(SHAPES), ids, st.sampled_from([m for m in MASKS if m != "nan"]),
    safe, st.just(False), st.sampled_from(WEIGHTS[:1]) | st.sampled_from(WEIGHTS),
) | st.tuples(
    st.sampled_from(SHAPES[:3]), st.just("usual"), st.sampled_from(("none", "ones", "padded")), st.just({}),
    st.just(True), st.just("usual"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def test_any_call() -> None:
    plain = model_of(DEVICE)
    ours = mpk_dynamo.enable(model_of(DEVICE), max_cache_len=CAPACITY)
    came: Counter[str] = Counter()

    @settings(max_examples=40, **common)
    @given(cases)
    def run(case: tuple) -> None:
        came[check(case, plain, ours, {})] += 1
        if ON_GPU:
            torch.cuda.synchronize()

    run()
    print(dict(came))
    assert came["equal"] > 10 and came["refused by both"] > 3, came
