"""Every model family on the loop: the tokens of HF's loop around one compiled step."""

from __future__ import annotations

import pytest
import torch
from generate.conftest import CAPACITY, GREEDY, one_step, prompts
from transformers import AutoConfig, AutoModelForCausalLM

import mpk_dynamo
from mpk_dynamo.tools.families import FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_single_steps(family: str):
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family]), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    how = {**prompts(2), **GREEDY, "max_new_tokens": 14}
    expected = one_step(model).generate(**how).sequences
    mpk_dynamo.clear_reports()
    mpk_dynamo.enable(model, max_cache_len=CAPACITY, loop_steps=5, fallback="error")
    assert torch.equal(model.generate(**how).sequences, expected)
    assert {r.outcome for r in mpk_dynamo.reports()} == {"reference"}
