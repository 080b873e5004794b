"""Drawing a token: what HF's warpers keep with the probabilities they give, the stated inverse of the distribution, and
random numbers that are named and not counted."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from frequencies import ROWS, VOCABULARY, check_counts, check_frequencies, choice
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mpk_dynamo import pipeline
from mpk_dynamo.dump import Dump
from mpk_dynamo.ir.types import DType
from mpk_dynamo.loop import LoopState, Sampling
from mpk_dynamo.ops import draw as d
from mpk_dynamo.passes import graph as passes
from mpk_dynamo.reference import Executor
from mpk_dynamo.report import Report
from mpk_dynamo.targets import reference_target

VOCAB = 200
slow = pytest.mark.slow


def rows(seed: int, count: int = 8, vocab: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def hf_probabilities(logits: torch.Tensor, ids: torch.Tensor, s: Sampling) -> torch.Tensor:
    chain = [RepetitionPenaltyLogitsProcessor(s.repetition_penalty)] if s.repetition_penalty != 1 else []
    chain += [TemperatureLogitsWarper(s.temperature)] if s.temperature != 1 else []
    chain += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    chain += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    chain += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    scores = logits.clone()
    for stage in chain:
        scores = stage(ids, scores)
    return scores.softmax(-1)


SAMPLINGS = [
    Sampling(do_sample=True),
    Sampling(do_sample=True, temperature=0.6),
    Sampling(do_sample=True, top_k=7),
    Sampling(do_sample=True, top_k=VOCAB + 5),
    Sampling(do_sample=True, top_p=0.9),
    Sampling(do_sample=True, top_p=1e-6),
    Sampling(do_sample=True, min_p=0.1),
    Sampling(do_sample=True, temperature=1.4, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
    Sampling(do_sample=True, temperature=0.3, top_p=0.5, repetition_penalty=0.8),
]


@pytest.mark.parametrize("s", SAMPLINGS, ids=lambda s: " ".join(sorted(s.stages)))
def test_the_weights_are_the_probabilities_of_hf(s):
    logits, ids = rows(1), torch.randint(0, VOCAB, (8, 11), generator=torch.Generator().manual_seed(2))
    want = hf_probabilities(logits, ids, s)
    state = LoopState.create(8, 4, "cpu", VOCAB, s, seen_ids=ids)
    got = torch.stack([d.kept_weights(row, s.stages, state.inputs["loop.numbers"]) for row in state.scores(logits)])
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close((got / got.sum(1, keepdim=True)).float(), want, rtol=1e-5, atol=1e-7)


def test_greedy_with_a_penalty_is_that_of_hf():
    logits, ids = rows(3), torch.randint(0, VOCAB, (8, 60), generator=torch.Generator().manual_seed(4))
    s = Sampling(repetition_penalty=5.0)
    state = LoopState.create(8, 4, "cpu", VOCAB, s, seen_ids=ids)
    assert torch.equal(state.choose(logits), hf_probabilities(logits, ids, s).argmax(1))


def test_equal_scores_at_the_edges():
    numbers = torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    ties = torch.tensor([1.0, 3.0, 1.0, 3.0, 3.0])
    # top-k keeps every score that equals the second largest; HF too
    assert (d.kept_weights(ties, frozenset({"top_k"}), numbers) > 0).tolist() == [False, True, False, True, True]
    # top-p drops equal scores from the lowest index on: half of three equal ones is one and a half, one goes
    equal = torch.zeros(3)
    assert (d.kept_weights(equal, frozenset({"top_p"}), numbers) > 0).tolist() == [False, True, True]
    kept = TopPLogitsWarper(0.5)(None, equal[None])[0].isfinite()
    assert kept.sum() == 2
    numbers[2] = 0.0  # the largest stays, whatever top_p
    assert (d.kept_weights(ties, frozenset({"top_p"}), numbers) > 0).tolist() == [False, False, False, False, True]
    numbers[3] = 1.0
    assert (d.kept_weights(ties, frozenset({"min_p"}), numbers) > 0).tolist() == [False, True, False, True, True]


def test_what_is_no_number_is_never_drawn():
    numbers = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    row = torch.tensor([float("nan"), 1.0, float("-inf"), 1.0])
    assert {d.draw(row, frozenset(), numbers, 0, step, 0) for step in range(40)} == {1, 3}
    for row in (torch.full((3,), float("-inf")), torch.full((3,), float("nan")), torch.tensor([0.0, math.inf, 1.0])):
        assert d.draw(row, frozenset({"top_p", "min_p"}), numbers, 0, 0, 0) == 0


def test_the_token_is_the_inverse_of_the_running_sum_by_index():
    weights = torch.tensor([0, 3, 0, 1, 4, 0])
    draws = [d.pick(weights, k * (1 << 61)) for k in range(8)]
    assert draws == [1, 1, 1, 3, 4, 4, 4, 4]
    assert d.pick(weights, (1 << 64) - 1) == 4 and d.pick(weights, (3 << 61) - 1) == 1


def test_weights_are_within_fp32_of_the_exponential():
    scores = torch.linspace(-28.0, 0.0, 5000)
    exact = (scores.double().exp() * 2**d.WEIGHT_BITS).round()
    torch.testing.assert_close(d.weights(scores).double(), exact, rtol=3e-6, atol=1.0)


def test_known_answers_of_philox():
    # of the Random123 library's own tests
    assert d.uniform64(0, 0, 0) == 0xE169C58D6627E8D5
    ones = (1 << 64) - 1
    assert d.uniform64(ones, ones, ones) == 0x41C83B0E408F276D
    assert d.uniform64(-1, -1, -1) == d.uniform64(ones, ones, ones)  # int64 as the tensors hold them


@pytest.mark.parametrize("s", SAMPLINGS[3:5] + SAMPLINGS[7:8], ids=lambda s: " ".join(sorted(s.stages)))
def test_frequencies_are_the_probabilities(s):
    """Chi-square over the tokens; draws are of one key, so the test is the same each time."""
    vocab, draws = 12, 4000
    logits = rows(7, 1, vocab, 1.0)
    state = LoopState.create(1, 4, "cpu", vocab, s)
    row, numbers = state.scores(logits)[0], state.inputs["loop.numbers"]
    kept = d.kept_weights(row, s.stages, numbers)
    found = torch.zeros(vocab)
    for step in range(draws):
        found[d.pick(kept, d.uniform64(99, step, 3))] += 1
    want = hf_probabilities(
        logits, torch.zeros(1, 0, dtype=torch.long), Sampling(**{**vars(s), "repetition_penalty": 1.0})
    )
    check_counts(found, want[0] * draws)


@pytest.mark.parametrize(
    "stages", [pytest.param((), marks=slow), ("top_k", "top_p"), pytest.param(("min_p",), marks=slow)], ids=" ".join
)
def test_frequencies_on_the_executor_are_the_probabilities(stages):
    _, graph = choice(ROWS, VOCABULARY, DType.F32, *stages)
    with mock.patch.object(passes, "PASSES", ()):
        report = Report()
        made = pipeline.lower(graph, 4, reference_target(4), report, Dump("", None, report))
    check_frequencies(Executor(made, poison=True), stages, "cpu")


def test_a_sequence_draws_the_same_at_every_place_of_a_batch():
    s = Sampling(do_sample=True, top_k=40)
    logits, ids = rows(5, 4), torch.tensor([11, 7, 1 << 50, 3])
    order = torch.tensor([2, 0, 3, 1])

    def tokens(rows_, ids_, seed):
        state = LoopState.create(len(ids_), 20, "cpu", VOCAB, s, seed=seed, sequence_ids=ids_)
        return torch.stack([state.choose(rows_) for _ in range(20)])

    first = tokens(logits, ids, 8)
    assert torch.equal(tokens(logits[order], ids[order], 8), first[:, order])
    assert torch.equal(tokens(logits[1:2], ids[1:2], 8), first[:, 1:2])
    assert torch.equal(tokens(logits, ids, 8), first) and not torch.equal(tokens(logits, ids, 9), first)


WRONG = [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": math.inf}]


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_outside_their_range(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*it must be"):
        Sampling(do_sample=True, **wrong)
