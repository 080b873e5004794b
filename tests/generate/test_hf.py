"""generate() on the decode loop: what HF's own loop returns, for every kind of argument, and for any launch length."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from generate.conftest import CAPACITY, GREEDY, assert_equal, cache_of, lengths, make, one_step, prompts
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
)
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import mpk_dynamo
from mpk_dynamo import pipeline
from mpk_dynamo.generate.hf import compile_config
from mpk_dynamo.generate.run import LAUNCH_S, Pace

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_model" / "model"


class Steps:
    """Every launch, as (asked for, run)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mpk_dynamo.generate import launches

        self.seen: list[int] = []
        launch = launches._launch

        def seen(loop: Any, args: Any, segment: Any, steps: int) -> None:
            self.seen.append(steps)
            launch(loop, args, segment, steps)

        monkeypatch.setattr(launches, "_launch", seen)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return Steps(monkeypatch).seen


def with_steps(steps: int) -> Any:
    return compile_config(fallback="error", loop_steps=steps)


class Recorder(BaseStreamer):
    def __init__(self, interrupt_at: int = 0) -> None:
        self.got: list[list[int]] = []
        self.ended, self._at = 0, interrupt_at

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.got.append(value.tolist())
        if len(self.got) == self._at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


class StopAt(StoppingCriteria):
    """Row r stops once it has `lengths[r]` tokens. Remembers what it was asked."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.asked = torch.tensor(lengths), []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.asked.append(input_ids.tolist())
        return input_ids.shape[1] >= self.lengths


def ends_of(theirs: Any, inputs: dict[str, torch.Tensor], at: list[int], new: int = 14) -> list[int]:
    """Token ids that end row r at its `at[r]`-th new token, if no other row has it earlier."""
    out = theirs.generate(**inputs, max_new_tokens=new, do_sample=False)
    start = inputs["input_ids"].shape[1]
    return [int(out[row, start + n]) for row, n in enumerate(at)]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_padded_rows_end_at_different_steps(pair: Any, launched: list[int], steps: int):
    ours, theirs = pair
    inputs = prompts(2)
    how = {**inputs, **GREEDY, "max_new_tokens": 14, "eos_token_id": ends_of(theirs, inputs, [3])}
    expected = theirs.generate(**how)
    assert expected.sequences[:, -1].eq(0).any() and expected.sequences[:, -1].ne(0).any(), "one row must end before"
    assert_equal(ours.generate(**how, compile_config=with_steps(steps)), expected)
    assert launched and max(launched) <= steps


def test_all_end_early_and_the_launch_with_them(pair: Any):
    ours, theirs = pair
    inputs = prompts(2)
    how = {**inputs, **GREEDY, "max_new_tokens": 14, "eos_token_id": ends_of(theirs, inputs, [5, 3])}
    expected = theirs.generate(**how)
    assert expected.sequences.shape[1] < 6 + 14
    assert_equal(ours.generate(**how, compile_config=with_steps(10)), expected)


@pytest.mark.parametrize("limit", [{"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_length": 11}])
def test_limits(pair: Any, limit: dict[str, int]):
    ours, theirs = pair
    how = {**prompts(2), **GREEDY, **limit}
    assert_equal(ours.generate(**how, compile_config=with_steps(4)), theirs.generate(**how))


def test_plain_tensor_without_a_dict_and_growing_launches(pair: Any, launched: list[int]):
    ours, theirs = pair
    how = {**prompts(2), "max_new_tokens": 9, "do_sample": False}
    out = ours.generate(**how)
    assert isinstance(out, torch.Tensor) and torch.equal(out, theirs.generate(**how))
    assert sum(launched) == 8


def test_streamer_gets_what_hf_hands_it(pair: Any):
    ours, theirs = pair
    inputs = prompts(2)
    how = {**inputs, "max_new_tokens": 12, "do_sample": False, "eos_token_id": ends_of(theirs, inputs, [4, 7])}
    mine, other = Recorder(), Recorder()
    theirs.generate(**how, streamer=other)
    ours.generate(**how, streamer=mine, compile_config=with_steps(5))
    assert mine.got == other.got and mine.ended == other.ended == 1


@pytest.mark.parametrize(
    "more", [{"min_new_tokens": 6}, {"min_length": 13, "min_new_tokens": 2, "repetition_penalty": 1.3}]
)
def test_the_end_may_be_made_to_wait(pair: Any, launched: list[int], more: dict[str, Any]):
    ours, theirs = pair
    how = {**prompts(2), **GREEDY, "max_new_tokens": 12}
    free = theirs.generate(**how, repetition_penalty=more.get("repetition_penalty")).sequences[:, 6:]
    eos = [int(free[0, 2]), int(free[1, 3])]
    expected = theirs.generate(**how, **more, eos_token_id=eos)
    early = theirs.generate(**how, eos_token_id=eos, repetition_penalty=more.get("repetition_penalty"))
    assert early.sequences.shape[1] < expected.sequences.shape[1], "the ends come too early where nothing bars them"
    assert_equal(ours.generate(**how, **more, eos_token_id=eos, compile_config=with_steps(4)), expected)
    assert launched


@pytest.mark.parametrize(
    ("eos", "stops", "steps"),
    [(False, (11, 11), 6), (False, (9, 13), 6), (True, (9, 13), 6), (True, (13, 10), 6), (True, (10, 13), 1),
     (True, (7, 12), 5)],
)  # fmt: skip
def test_custom_criteria_cut_within_a_launch(pair: Any, eos: bool, stops: tuple[int, ...], steps: int):
    """A row that a criterion ends gets padding if there are eos ids, and goes on otherwise: as in HF's loop."""
    ours, theirs = pair
    how = {**prompts(2), **GREEDY, "max_new_tokens": 14, "eos_token_id": 127 if eos else None}
    mine, other = StopAt(*stops), StopAt(*stops)
    expected = theirs.generate(**how, stopping_criteria=StoppingCriteriaList([other]))
    out = ours.generate(**how, stopping_criteria=StoppingCriteriaList([mine]), compile_config=with_steps(steps))
    assert_equal(out, expected)
    assert mine.asked == other.asked, "the criterion must be asked about each token once, in order"
    assert out.sequences.shape[1] == max(stops)


@pytest.mark.slow
def test_stop_strings():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY).eval(), AutoTokenizer.from_pretrained(TINY)
    inputs = tokenizer("Count from 42 to 50:", return_tensors="pt")
    how = {**inputs, **GREEDY, "max_new_tokens": 20, "stop_strings": ["44,"], "tokenizer": tokenizer}
    expected = one_step(model).generate(**how)
    mpk_dynamo.enable(model, max_cache_len=CAPACITY, fallback="error", loop_steps=8)
    out = model.generate(**how)
    assert_equal(out, expected)
    assert tokenizer.decode(out.sequences[0]).endswith("44,")


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_is_continued(pair: Any, whole: bool):
    """Two turns of a chat: the second with all tokens so far, or with the new ones alone and a mask for all."""
    outs = []
    for model in pair:
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        # a caller's cache leaves no room for the default that the second model has
        model = copy.deepcopy(model) if not hasattr(model, "_mpk_dynamo_saved") else model
        if not hasattr(model, "_mpk_dynamo_saved"):
            model.generation_config.cache_implementation = None
        first = model.generate(**prompts(1), **GREEDY, max_new_tokens=7, past_key_values=cache)
        assert lengths(cache) == [6 + 7 - 1] * 2 and cache_of(first) is cache
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
        given = ids if whole else ids[:, lengths(cache)[0] :]
        outs.append(
            model.generate(
                given, attention_mask=torch.ones_like(ids), **GREEDY, max_new_tokens=6, past_key_values=cache
            )
        )
    assert_equal(*outs)
    assert lengths(cache_of(outs[0])) == [13 + 3 + 6 - 1] * 2


def test_a_cache_that_is_too_small_is_refused_before_the_first_token(pair: Any):
    ours, _ = pair
    cache, seen = StaticCache(config=ours.config, max_cache_len=12), Recorder()
    with pytest.raises(mpk_dynamo.OptionError, match="12 tokens is too small"):
        ours.generate(**prompts(1), max_new_tokens=8, past_key_values=cache, streamer=seen)
    assert len(seen.got) == 1, "the prompt alone"
    out = ours.generate(**prompts(1), **GREEDY, max_new_tokens=7, past_key_values=cache)
    assert lengths(cache_of(out)) == [12] * 2


def test_an_interrupt_leaves_all_usable(pair: Any):
    ours, theirs = pair
    how = {**prompts(1), **GREEDY, "max_new_tokens": 10}
    with pytest.raises(KeyboardInterrupt):
        ours.generate(**how, streamer=Recorder(interrupt_at=5), compile_config=with_steps(3))
    assert_equal(ours.generate(**how, compile_config=with_steps(3)), theirs.generate(**how))


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupt_leaves_a_cache_that_counts_alike(at: int):
    """A sliding window counts its tokens in Python and on the device."""
    torch._dynamo.reset()
    model = mpk_dynamo.enable(make("mistral", sliding_window=14), fallback="error", loop_steps=3)
    cache, given = StaticCache(config=model.config, max_cache_len=CAPACITY), prompts(1)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**given, **GREEDY, max_new_tokens=12, past_key_values=cache, streamer=Recorder(at + 1))
    for layer in cache.layers:
        assert layer.cumulative_length_int == int(layer.cumulative_length) >= 6 + at - 1


class Forbid(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 10:20] = -float("inf")
        return scores


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"output_logits": True, "output_scores": True}, "scores and logits of each step"),
        ({"logits_processor": LogitsProcessorList([Forbid()])}, "Forbid has no place in the loop"),
        ({"bad_words_ids": [[5]]}, "NoBadWordsLogitsProcessor has no place"),
        ({"cache_implementation": "dynamic"}, "not DynamicCache"),
        ({"use_cache": False, "cache_implementation": None}, "not no cache"),
    ],
)
def test_what_the_loop_cannot_do_is_left_to_hf_and_said_once(
    pair: Any, launched: list[int], caplog: pytest.LogCaptureFixture, more: dict[str, Any], said: str
):
    ours, theirs = pair
    how = {**prompts(2), **GREEDY, "max_new_tokens": 5, **more}
    expected = theirs.generate(**how)
    with caplog.at_level(logging.WARNING, "mpk_dynamo"):
        for _ in range(2):
            out = ours.generate(**how)
            assert torch.equal(out.sequences, expected.sequences) and type(out) is type(expected)
    (message,) = [r.message for r in caplog.records if r.name == "mpk_dynamo"]
    assert said in message
    assert not launched
    if "output_logits" in more:
        assert all(map(torch.equal, out.logits, expected.logits)) and len(out.scores) == 5


@pytest.mark.parametrize(
    ("more", "said"), [({"num_beams": 2}, "beam search"), ({"prompt_lookup_num_tokens": 2}, "assisted generation")]
)
def test_other_searches_are_hf_s(pair: Any, caplog: pytest.LogCaptureFixture, more: dict[str, int], said: str):
    ours, theirs = pair
    how = {**prompts(1), **GREEDY, "max_new_tokens": 5, **more}
    expected = theirs.generate(**how, cache_implementation="dynamic", disable_compile=True)
    with caplog.at_level(logging.WARNING, "mpk_dynamo"):
        assert torch.equal(ours.generate(**how).sequences, expected.sequences)
        ours.generate(**how)
    (message,) = [r.message for r in caplog.records if r.name == "mpk_dynamo"]
    assert said in message


def test_disable_compile_is_hf_s_path_without_a_word(pair: Any, launched: list[int], caplog: pytest.LogCaptureFixture):
    ours, theirs = pair
    how = {**prompts(1), "max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    with caplog.at_level(logging.WARNING, "mpk_dynamo"):
        assert torch.equal(ours.generate(**how), theirs.generate(**how))
    assert not launched and not [r for r in caplog.records if r.name == "mpk_dynamo"]


def test_another_backend_s_options_are_not_ours_to_check(pair: Any, launched: list[int]):
    ours, theirs = pair
    how = {**prompts(1), "max_new_tokens": 3, "do_sample": False}
    other = CompileConfig(backend="eager", mode=None)
    other.options = {"of": "another backend"}
    out = ours.generate(**how, compile_config=other, use_cache=False, cache_implementation=None)
    assert torch.equal(out, theirs.generate(**how)) and not launched


@pytest.mark.slow
def test_repetition_penalty_counts_prompt_and_new_tokens(pair: Any):
    ours, theirs = pair
    free = theirs.generate(**prompts(2), **GREEDY, max_new_tokens=10).sequences
    given = {"input_ids": free, "attention_mask": torch.ones_like(free)}  # what it would say again is in the prompt
    how = {**given, **GREEDY, "max_new_tokens": 10}
    expected = theirs.generate(**how, repetition_penalty=1.7)
    new_alone = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=free.shape[1])])
    ignoring = theirs.generate(**how, logits_processor=new_alone)
    assert not torch.equal(expected.sequences, ignoring.sequences), "the prompt makes no difference"
    assert_equal(ours.generate(**how, repetition_penalty=1.7, compile_config=with_steps(4)), expected)
    assert_equal(ours.generate(**how, logits_processor=new_alone, compile_config=with_steps(4)), ignoring)


def test_sampling_follows_the_seed_and_nothing_else(pair: Any):
    ours, _ = pair
    how = {**prompts(2), "max_new_tokens": 10, "do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9}

    def drawn(seed: int, steps: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return ours.generate(**how, compile_config=with_steps(steps))

    first = drawn(7, 1)
    assert torch.equal(first, drawn(7, 4)), "depends on the length of a launch"
    assert not torch.equal(first, drawn(8, 4))


@pytest.mark.slow
def test_a_step_without_a_loop_goes_one_by_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def refuse(*_: Any) -> Any:
        raise mpk_dynamo.Unsupported("a mask of unknown form", remedy="none")

    monkeypatch.setattr(pipeline, "compile_loop", refuse)
    torch._dynamo.reset()
    model = make()
    theirs = one_step(model)
    how = {**prompts(2), **GREEDY, "max_new_tokens": 6, "eos_token_id": ends_of(theirs, prompts(2), [2, 3], 6)}
    expected = theirs.generate(**how)
    mpk_dynamo.enable(model, max_cache_len=CAPACITY)
    with caplog.at_level(logging.WARNING, "mpk_dynamo"):
        assert_equal(model.generate(**how), expected)
    assert "one step per launch: a mask of unknown form" in caplog.text
    with pytest.raises(mpk_dynamo.Unsupported, match="unknown form"):
        model.generate(**how, compile_config=with_steps(2))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_sliding_window_fills_and_goes_on(launched: list[int], family: str):
    """Launches go on in a full window, which each step moves, once padding has left it. Gemma 3 has a mask for each
    kind of layer."""
    torch._dynamo.reset()
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    model = make(family, sliding_window=14, **kinds)
    theirs = one_step(model)
    mpk_dynamo.enable(model, max_cache_len=CAPACITY, fallback="error", loop_steps=4)
    for length, padding in ((6, 0), (8, 0), (12, 9)):
        inputs = prompts(1, length)
        if padding:
            inputs = {name: torch.cat([t, t]) for name, t in inputs.items()}
            inputs["input_ids"][1, :padding] = inputs["attention_mask"][1, :padding] = 0
        for stopping in ((), *((StopAt(*[length + n] * (1 + bool(padding))),) for n in (18, 20))):
            launched.clear()
            how = {**inputs, **GREEDY, "max_new_tokens": 26}
            ours = model.generate(**how, stopping_criteria=StoppingCriteriaList(stopping))
            wanted = theirs.generate(**how, stopping_criteria=StoppingCriteriaList(map(copy.copy, stopping)))
            assert_equal(ours, wanted)  # of which what left a window is no part: it cannot be taken back
            new = ours.sequences.shape[1] - length
            for layer in cache_of(ours).layers:
                assert getattr(layer, "cumulative_length_int", int(layer.cumulative_length)) == length + new - 1
            if not padding and not stopping:
                assert launched[-3:] == [4, 4, launched[-1]] and sum(launched) >= new - 2


@pytest.mark.slow
def test_enable_keeps_the_class_s_name_and_copies_stay_enabled(pair: Any):
    ours, theirs = pair
    assert type(ours).__name__ == type(theirs).__name__ and type(ours) is not type(theirs)
    how = {**prompts(1), "max_new_tokens": 4, "do_sample": False}
    expected = ours.generate(**how)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours) and torch.equal(copied.generate(**how), expected)
        assert type(mpk_dynamo.disable(copied)) is type(theirs)
        assert not [name for name in copied.__dict__ if "mpk_dynamo" in name]
    mpk_dynamo.enable(ours, max_cache_len=CAPACITY, fallback="error")
    assert type(ours).__mro__[1] is type(theirs), "enabling twice must not nest"


@pytest.mark.slow
def test_custom_generate_for_one_call(launched: list[int]):
    torch._dynamo.reset()
    model = make()
    how = {**prompts(2), "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    expected = one_step(model).generate(**how)
    out = model.generate(**how, custom_generate=mpk_dynamo.custom_generate)
    assert torch.equal(out, expected) and sum(launched) == 7


def test_launches_grow_until_they_take_long_enough():
    pace, now, taken = Pace(0, short=False), 7.0, []
    for _ in range(12):
        taken.append(pace.steps)
        # launched while the one before it was running: only the time after that one's end counts
        begun, now = now - 0.5 * (len(taken) > 1), now + pace.steps * 0.001
        pace.took(pace.steps, begun, now)
    assert taken[:4] == [1, 2, 4, 8] and abs(taken[-1] - LAUNCH_S * 1000) <= 1
    assert Pace(0, False, pace.step_s).steps == taken[-1], "a later generation starts with what one learned"
    pace.took(100, now, now + 10.0)
    assert pace.steps == 1
    fixed = Pace(5, short=True)
    fixed.took(5, 0.0, 99.0)
    assert fixed.steps == 5


@pytest.mark.slow
def test_a_launch_ahead_of_the_end_runs_no_step(launched: list[int]):
    """The host launches the next steps before it knows of the end, which leaves no trace in the cache."""
    torch._dynamo.reset()
    model, given = make(), prompts(1)
    free = one_step(model).generate(**given, **GREEDY, max_new_tokens=12).sequences[0, 6:].tolist()
    eos = free[5]
    new = free[: free.index(eos) + 1]
    mpk_dynamo.enable(model, fallback="error", loop_steps=len(new))
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    out = model.generate(**given, **GREEDY, max_new_tokens=30, eos_token_id=eos, past_key_values=cache)
    assert out.sequences[0, 6:].tolist() == new
    assert launched == [len(new)] * 2 and set(lengths(cache)) == {6 + len(new) - 1}
