"""A loop of decode steps on the reference executor: equal to HF's greedy generate() and to itself for every number of
steps per launch, with what it feeds and what ends it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loops import CAPACITY, PROMPT, Decoding, model_of

from mpk_dynamo import pipeline
from mpk_dynamo.dump import Dump
from mpk_dynamo.errors import MpkError, Unsupported
from mpk_dynamo.ir.expr import var
from mpk_dynamo.ir.graph import Graph, Output, RowMap
from mpk_dynamo.ir.types import DType
from mpk_dynamo.loop import Feed, LoopState, Sampling, append_loop
from mpk_dynamo.ops.argmax import ArgmaxOperator
from mpk_dynamo.ops.choice import ChoiceOperator
from mpk_dynamo.ops.sampling import Sample
from mpk_dynamo.report import Report
from mpk_dynamo.runtime import build
from mpk_dynamo.targets import known

SAMPLED = Sampling(do_sample=True, temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def greedy(model):
    return Decoding(model, Sampling(), 2, pads=(0, 3))


@pytest.fixture(scope="module")
def sampled(model):
    return Decoding(model, SAMPLED, 2, pads=(0, 3))


def test_greedy_tokens_are_those_of_generate(model, greedy):
    found = greedy.generate([12])
    attention = (torch.arange(PROMPT)[None] >= torch.tensor([[0], [3]])).long()
    want = model.generate(
        found.prompt, attention_mask=attention, max_new_tokens=13, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(found.tokens, want[:, PROMPT:])
    assert found.fed["positions"][0].tolist() == [[PROMPT + 12], [PROMPT - 3 + 12]]
    mask = found.fed["masks"][0][:, 0, 0]
    assert mask[:, PROMPT : PROMPT + 13].all() and not mask[:, PROMPT + 13 :].any() and mask[1].sum() == PROMPT - 3 + 13
    assert found.fed["tokens"].tolist() == found.tokens[:, -1:].tolist()
    assert greedy.report.task_kinds["argmax"] == 2


@pytest.mark.parametrize("decoding", ["greedy", pytest.param("sampled", marks=pytest.mark.slow)])
def test_every_number_of_steps_per_launch_gives_the_same(decoding, request):
    decoding = request.getfixturevalue(decoding)
    whole = decoding.generate([14])
    for launches in ([1] * 14, [2] * 7, [7, 7], [3, 11]):
        found = decoding.generate(launches)
        assert found.ran == launches and torch.equal(found.tokens, whole.tokens)
        for a, b in zip(found.cache.layers, whole.cache.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_a_seed_repeats_and_another_does_not(sampled):
    first, again, other = (sampled.generate([10], seed=seed).tokens for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_finished_sequences_emit_padding_and_all_of_them_end_the_launch(sampled):
    free = sampled.generate([20]).tokens
    eos = [int(free[0, 3]), int(free[1, 8])]
    ends = [next(i for i, t in enumerate(row) if t in eos) for row in free.tolist()]
    found = sampled.generate([5, 15, 4], eos=eos)
    assert sum(found.ran) == max(ends) and found.ran[-1] == 0 and found.state.read() == (max(ends) + 1, True)
    for row, whole, end in zip(found.tokens.tolist(), free.tolist(), ends, strict=True):
        assert row == whole[: end + 1] + [0] * (max(ends) - end)
    found.state.rewind(2, seen_ids=torch.cat([found.prompt, found.tokens[:, :2]], 1))
    assert found.state.read() == (2, False) and not found.state.finished.any()
    assert found.state.seen.sum() == sum(
        len(set(r)) for r in torch.cat([found.prompt, found.tokens[:, :2]], 1).tolist()
    )


def test_a_state_of_another_kind_or_without_room_is_refused(greedy):
    made = greedy.generate([2])
    loop, args = greedy._loop, ()
    with pytest.raises(MpkError, match="room for 3"):
        loop(args, made.state, 1)
    other = LoopState.create(2, 8, "cpu", 300, SAMPLED)
    with pytest.raises(MpkError, match="the loop was compiled for 2 with"):
        loop(args, other, 1)
    with pytest.raises(ValueError, match="1 to"):
        LoopState.create(2, 1 << 20, "cpu", 300, Sampling())


def step_graph(
    mask: tuple[DType, tuple[int, ...]] = (DType.BOOL, (2, 1, 1, CAPACITY)), logits: tuple[int, ...] = (2, 1, 9)
):
    """logits made of the token alone; a mask, which something reads."""
    s = Sample()
    tokens, dims = s.input("tokens", DType.I64, 2, 1), tuple(var(f"i{n}", size) for n, size in enumerate(logits))
    shown, table = s.input("mask", mask[0], *mask[1]), s.param("table", DType.F32, 50)
    out, seen = s.output("logits", DType.F32, *logits), s.output("seen", mask[0], *mask[1])
    at = tuple(var(f"i{n}", size) for n, size in enumerate(mask[1]))
    nodes = (
        RowMap("look", dims, s.at(table, s.at(tokens, dims[0], 0)), out, dims),
        RowMap("copy", at, s.at(shown, *at), seen, at),
    )
    return Graph(nodes, s.buffers, (Output(out), Output(seen)), ("by hand",))


@pytest.mark.parametrize(
    "graph, feed, message",
    [
        (step_graph(), Feed("mask"), r"feeds int64 tokens \[2, 1\]"),
        (step_graph(), Feed("table"), "no input of the step but a param"),
        (step_graph(), Feed("absent"), "does not read absent"),
        (step_graph(), Feed("tokens", positions=("mask",)), "int64 positions"),
        (step_graph((DType.I64, (2, 1, 1, 8))), Feed("tokens", masks=("mask",)), "bool or float masks"),
        (step_graph((DType.BOOL, (2, 4, 1, 8))), Feed("tokens", masks=("mask",)), "that heads share"),
        (step_graph(logits=(2, 3, 9)), Feed("tokens"), r"logits \[B, 1, V\]"),
    ],
)
def test_what_it_cannot_feed_is_refused(graph, feed, message):
    with pytest.raises(Unsupported, match=message):
        append_loop(graph, feed, Sampling())


@pytest.mark.parametrize("dtype", [DType.BOOL, DType.F32, DType.BF16])
def test_the_next_key_becomes_visible(dtype):
    from mpk_dynamo.passes.schedule import schedule
    from mpk_dynamo.passes.tasks import derive_events, tile
    from mpk_dynamo.reference import Executor
    from mpk_dynamo.verify import verify_graph

    graph = append_loop(step_graph((dtype, (2, 1, 1, 8))), Feed("tokens", masks=("mask",)), Sampling())
    verify_graph(graph)
    hidden = False if dtype is DType.BOOL else float("-inf")
    shown = True if dtype is DType.BOOL else 0.0
    torch_dtype = {DType.BOOL: torch.bool, DType.F32: torch.float32, DType.BF16: torch.bfloat16}[dtype]
    mask = torch.full((2, 1, 1, 8), hidden, dtype=torch_dtype)
    mask[0, 0, 0, 2:4], mask[1, 0, 0, :7] = shown, shown
    state = LoopState.create(2, 4, "cpu", 9, Sampling())
    run = Executor(schedule(derive_events(tile(graph, 4)), 4))
    for visible in ([2, 3, 4], [2, 3, 4, 5]):
        run({**state.storages, "tokens": torch.zeros(2, 1, dtype=torch.int64), "mask": mask, "table": torch.ones(50)})
        assert (mask[0, 0, 0] == shown).nonzero().flatten().tolist() == visible
        assert (mask[1] == shown).all()  # full: no more keys
    assert state.step == 2


@pytest.mark.parametrize("operator, index", [(ArgmaxOperator(), 0), (ChoiceOperator(), 0), (ChoiceOperator(), 1)])
def test_the_bodies_compile_without_spilling(operator, index):
    target, report = known("h200"), Report()
    _, graph = operator.samples()[index]
    made = pipeline.lower(graph, target.sm_count, target, report, Dump("", None, report))
    built = build(pipeline.emit(made, target, report, Dump("", None, report)), target, cache=False)
    assert not built.report.spilling, built.report


def test_samplings_differ_in_stages_not_in_numbers():
    one, two = Sampling(do_sample=True, top_k=3), dataclasses.replace(SAMPLED, min_p=0.0, repetition_penalty=1.0)
    assert one.stages == {"sample", "top_k"} and two.stages == {"sample", "temperature", "top_k", "top_p"}
    assert Sampling(temperature=0.1, top_k=5).stages == frozenset() == Sampling().stages
