"""generate() by launches of many steps: the tokens of the one-step path, whatever the length of a launch."""

from __future__ import annotations

import _thread
import copy
import threading
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, gpu
from small_models import make, token_ids
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

import mpk_dynamo
from mpk_dynamo.generate.hf import compile_config

pytestmark = [*gpu, pytest.mark.usefixtures("fresh_backend")]
NEW = 64 if ON_GPU else 12
CAPACITY = 8 + NEW
OUTCOME = "kernel" if ON_GPU else "reference"


@pytest.fixture(autouse=True)
def fresh_reports() -> None:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()


def config(steps: int = 0) -> Any:
    return compile_config(fallback="error", loop_steps=steps)


def pair(family: str) -> tuple[Any, Any]:
    """(model on the loop, the same with HF's loop around one compiled step)."""
    model = make(family)
    theirs = copy.deepcopy(model)
    theirs.generation_config.update(cache_implementation="static", compile_config=config(), max_cache_len=CAPACITY)
    return mpk_dynamo.enable(model, max_cache_len=CAPACITY, fallback="error"), theirs


def padded(batch: int) -> dict[str, torch.Tensor]:
    ids, mask = token_ids(batch, 8), torch.ones(batch, 8, dtype=torch.int64, device=DEVICE)
    for row in range(1, batch, 2):
        ids[row, :3], mask[row, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("qwen3", 4), ("qwen2", 16)])
def test_any_length_of_a_launch_gives_the_tokens_of_single_steps(family: str, batch: int) -> None:
    ours, theirs = pair(family)
    how = {**padded(batch), "max_new_tokens": NEW, "do_sample": False}
    expected = theirs.generate(**how)
    eos = sorted({int(expected[0, 8 + NEW // 2]), int(expected[-1, 8 + NEW // 3])})
    ended = theirs.generate(**how, eos_token_id=eos)
    for steps in (1, 5, 0):
        assert torch.equal(ours.generate(**how, compile_config=config(steps)), expected), steps
        assert torch.equal(ours.generate(**how, compile_config=config(steps), eos_token_id=eos), ended), steps
    assert {r.outcome for r in mpk_dynamo.reports()} == {OUTCOME}
    assert len(mpk_dynamo.reports()) == 2, "the step, and the loop for every length"


def test_launches_go_on_in_a_full_window() -> None:
    ours, theirs = pair("mistral")
    new = max(NEW, 24)
    for model in (ours, theirs):
        model.generation_config.max_cache_len = 8 + new
    for batch in (1, 2):
        how = {**padded(batch), "max_new_tokens": new, "do_sample": False}
        expected = theirs.generate(**how)
        for steps in (0, 7):
            assert torch.equal(ours.generate(**how, compile_config=config(steps)), expected), (batch, steps)


@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_follows_the_seed_alone(batch: int) -> None:
    ours, _ = pair("qwen3")
    how = {**padded(batch), "max_new_tokens": NEW, "do_sample": True, "top_k": 50, "top_p": 0.95, "temperature": 1.2}

    def drawn(seed: int, steps: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return ours.generate(**how, compile_config=config(steps))

    first = drawn(3, 1)
    assert torch.equal(first, drawn(3, 6)) and torch.equal(first, drawn(3, 0))
    assert not torch.equal(first, drawn(4, 0))


class Interrupting(BaseStreamer):
    def __init__(self) -> None:
        self.tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.dim() == 1
        if self.tokens == 4:
            raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError("interrupted")


@pytest.mark.skipif(not ON_GPU, reason="launches take no time to end on the reference executor")
def test_ctrl_c_ends_launches_of_any_length() -> None:
    """Two launches of seconds are under way when the signal comes."""
    model, prompt = make("llama", tied=True), token_ids(1, 8)
    capacity = 60_000
    mpk_dynamo.enable(model, max_cache_len=capacity, fallback="error", loop_steps=25_000)

    def generate(new: int, cache: StaticCache) -> torch.Tensor:
        return model.generate(prompt, do_sample=False, max_new_tokens=new, past_key_values=cache)

    def empty() -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=capacity)

    expected = generate(20, empty())
    cache = empty()
    timer = threading.Timer(0.2, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        generate(50_002, cache)
    assert 8 < int(cache.layers[0].cumulative_length) < 25_000, "it ends within the first launch"
    assert torch.equal(generate(20, empty()), expected)


def test_a_cache_is_continued_and_an_interrupt_leaves_all_usable() -> None:
    ours, theirs = pair("llama")
    theirs.generation_config.cache_implementation = None
    prompt = token_ids(1, 8)
    with pytest.raises(KeyboardInterrupt):
        ours.generate(prompt, max_new_tokens=NEW, do_sample=False, streamer=Interrupting())
    made = []
    for model in (ours, theirs):
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        ids = model.generate(prompt, max_new_tokens=NEW // 3, do_sample=False, past_key_values=cache)
        ids = torch.cat([ids, token_ids(1, 3, seed=5)], 1)
        made.append(model.generate(ids, max_new_tokens=NEW // 3, do_sample=False, past_key_values=cache))
        assert int(cache.layers[0].cumulative_length) == made[-1].shape[1] - 1
    assert torch.equal(*made)
