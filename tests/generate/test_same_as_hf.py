"""Every kind of argument that generate() has: what an enabled model returns, raises and streams is what HF's would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from generate.conftest import CAPACITY, make, prompts
from transformers import DynamicCache, GenerationConfig, WatermarkingConfig
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import mpk_dynamo

pytestmark = pytest.mark.slow
DRAWN = {"do_sample": True, "top_k": 1}  # one token is left, whatever the random numbers are


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


class AsksForScores(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), scores is not None and len(scores) > 3)


CASES: dict[str, dict[str, Any]] = {
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "scores for a criterion": {
        "stopping_criteria": [AsksForScores()], "output_scores": True, "return_dict_in_generate": True
    },
    "scores without a dict": {"output_scores": True},
    "several sequences": {"num_return_sequences": 3, **DRAWN},
    "several sequences, greedy": {"num_return_sequences": 3},
    "no new tokens": {"max_new_tokens": 0},
    "a length below the prompt's": {"max_new_tokens": None, "max_length": 4},
    "two limits": {"max_new_tokens": 4, "max_length": 30},
    "no time": {"max_time": 0.0},
    "a minimum above the maximum": {"min_new_tokens": 9, "eos_token_id": 5},
    "an unknown argument": {"nonsense": 3},
    "temperature 0": {"do_sample": True, "temperature": 0.0},
    "top-k -1": {"do_sample": True, "top_k": -1},
    "min-p 2": {"do_sample": True, "min_p": 2.0},
    "top-p 0": {"do_sample": True, "top_p": 0.0},
    "penalty -1": {"repetition_penalty": -1.0},
    "numbers that greedy decoding ignores": {"temperature": 0.3, "top_k": 5},
    "suppressed tokens": {"suppress_tokens": [3, 4]},
    "a forced end": {"forced_eos_token_id": 7},
    "guidance": {"guidance_scale": 1.5},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "typical-p": {"typical_p": 0.9, **DRAWN},
    "a watermark": {"watermarking_config": WatermarkingConfig(context_width=1)},
    "ends in a list": {"eos_token_id": [1, 2, 3, 4, 5]},
    "ends in a tensor": {"eos_token_id": torch.tensor([1, 2])},
    "many ends": {"eos_token_id": list(range(60))},
    "an end and no padding": {"eos_token_id": [9], "pad_token_id": None},
    "a prompt in chunks": {"prefill_chunk_size": 2},
    "a dynamic cache": {"past_key_values": DynamicCache},
    "no cache": {"use_cache": False},
    "two beams": {"num_beams": 2},
    "beams and a streamer": {"num_beams": 2, "streamer": Recorder},
    "a streamer": {"streamer": Recorder},
    "another model's help": {"assistant_model": copy.deepcopy, "rows": 1},
    "help from the prompt": {"prompt_lookup_num_tokens": 2, "rows": 1},
    "a configuration": {
        "generation_config": GenerationConfig(max_new_tokens=5, eos_token_id=3, pad_token_id=0), "max_new_tokens": None
    },
    "no prompt": {"rows": 0, "bos_token_id": 1},
    "an empty prompt": {"input_ids": torch.zeros(1, 0, dtype=torch.int64), "rows": 0},
    "no mask": {"attention_mask": None},
    "a mask of truths": {"attention_mask": prompts(2)["attention_mask"].bool()},
    "a mask that is too long": {"attention_mask": torch.ones(2, 9, dtype=torch.int64)},
    "nothing visible": {"attention_mask": torch.zeros(2, 6, dtype=torch.int64)},
    "an id beyond the vocabulary": {"input_ids": torch.full((1, 4), 100_000), "rows": 0},
    "stop strings and no tokenizer": {"stop_strings": ["a"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """(enabled, plain), in fp32, where no two tokens are nearly as good."""
    torch._dynamo.reset()
    plain = make().float()
    enabled = mpk_dynamo.enable(copy.deepcopy(plain), max_cache_len=CAPACITY, loop_steps=4)
    plain.generation_config.disable_compile = True
    return enabled, plain


def outcome(model: Any, plain: Any, case: dict[str, Any]) -> Any:
    """What came of it, in plain Python."""
    case = dict(case)
    rows = case.pop("rows", 2)
    how = {**(prompts(rows) if rows else {}), "max_new_tokens": 7, "do_sample": False, **case}
    streamer = None
    if how.get("streamer") is Recorder:
        streamer = how["streamer"] = Recorder()
    if "past_key_values" in how:
        how["past_key_values"] = DynamicCache(config=plain.config)
    if "assistant_model" in how:
        how["assistant_model"] = copy.deepcopy(plain)
    try:
        out = model.generate(**{k: v for k, v in how.items() if v is not None or k == "pad_token_id"})
    except Exception as error:
        return type(error), str(error)
    said = streamer and streamer.got
    if isinstance(out, torch.Tensor):
        return out.tolist(), said
    return type(out), sorted(k for k, v in out.items() if v is not None), out.sequences.tolist(), said


@pytest.mark.parametrize("name", CASES)
def test_the_outcome_is_hf_s(models: tuple[Any, Any], name: str) -> None:
    enabled, plain = models
    wanted = outcome(plain, plain, CASES[name])
    assert outcome(enabled, plain, CASES[name]) == wanted
