"""What the tests of this folder share: a tiny model in bf16, on the loop and on HF's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig, Qwen3Config

import mpk_dynamo
from mpk_dynamo.generate import launches
from mpk_dynamo.generate.hf import compile_config

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
CAPACITY = 48
GREEDY = {"do_sample": False, "return_dict_in_generate": True}


def make(family: str = "qwen3", **more: Any) -> Any:
    torch.manual_seed(1)
    kinds = {"qwen3": Qwen3Config, "mistral": MistralConfig, "gemma3": Gemma3TextConfig}
    config = kinds[family](**SIZES, **more)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def one_step(model: Any) -> Any:
    """A copy that decodes by HF's own loop, one compiled step after the other."""
    made = copy.deepcopy(mpk_dynamo.disable(model))
    made.generation_config.update(
        cache_implementation="static", compile_config=compile_config(fallback="error"), max_cache_len=CAPACITY
    )
    return made


def prompts(batch: int, length: int = 6) -> dict[str, torch.Tensor]:
    """Ids and mask; each row but the first is padded on the left, one token more than the one before."""
    ids = torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, :row], mask[row, :row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def cache_of(out: Any) -> Any:
    return out.cache if "cache" in out else out.past_key_values


def lengths(cache: Any) -> list[int]:
    return [int(layer.cumulative_length) for layer in cache.layers]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Same tokens, and caches of the same length with the same contents."""
    assert torch.equal(ours.sequences, theirs.sequences)
    a, b = cache_of(ours), cache_of(theirs)
    assert lengths(a) == lengths(b)
    for mine, other in zip(a.layers, b.layers, strict=True):
        n = int(mine.cumulative_length)
        assert torch.equal(mine.keys[:, :, :n], other.keys[:, :, :n])
        assert torch.equal(mine.values[:, :, :n], other.values[:, :, :n])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    mpk_dynamo.clear_reports()
    launches.notice.cache_clear()
    yield


@pytest.fixture(scope="session")
def pair() -> tuple[Any, Any]:
    """(model on the loop, the same on HF's loop)."""
    torch._dynamo.reset()
    model = make()
    theirs = one_step(model)
    return mpk_dynamo.enable(model, max_cache_len=CAPACITY, fallback="error"), theirs
