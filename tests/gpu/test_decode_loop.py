"""Several steps in one launch: the same tokens for every number of steps, as the reference executor's; the end of all
sequences; sampling; faults."""

from __future__ import annotations

import pytest
import torch
from frequencies import ROWS, VOCABULARY, check_frequencies, choice
from harness import DEVICE, ON_GPU, Step, emit, gpu, kernel_only, lower, target
from loops import PROMPT, Decoding, model_of

from mpk_dynamo import abi
from mpk_dynamo.errors import DeviceFault
from mpk_dynamo.ir.types import DType
from mpk_dynamo.loop import Sampling
from mpk_dynamo.ops.draw import draw
from mpk_dynamo.runtime import build
from mpk_dynamo.verify.tables import decode

pytestmark = gpu
GREEDY = Sampling()
SAMPLED = Sampling(do_sample=True, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.2)
LAUNCHES = ([14], [1] * 14, [2] * 7, [7, 7], [3, 1, 10])


@pytest.fixture(scope="module")
def options(cache_dir):
    return {"cache_dir": str(cache_dir), "timeout_s": 2.0}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family, batch", [("llama", 1), ("qwen3", 3), ("qwen3", 16)])
def test_every_number_of_steps_gives_the_tokens_of_the_reference(family, batch, sampling, options):
    pads = tuple(row % 5 for row in range(batch))
    reference = Decoding(model_of(family), sampling, batch, pads, device="reference").generate([14])
    decoding = Decoding(model_of(family, device=DEVICE), sampling, batch, pads, **options)
    for launches in LAUNCHES:
        found = decoding.generate(launches)
        assert found.ran == launches
        assert torch.equal(found.tokens, reference.tokens)
        for name in ("positions", "masks"):
            assert torch.equal(found.fed[name][0].cpu(), reference.fed[name][0])
        lengths = [int(layer.cumulative_length) for layer in found.cache.layers]
        assert lengths == [int(layer.cumulative_length) for layer in reference.cache.layers]


@pytest.mark.parametrize("batch", [1, 16])
def test_a_launch_in_bf16_repeats_bit_for_bit(batch, options):
    decoding = Decoding(model_of("llama", torch.bfloat16, DEVICE), SAMPLED, batch, **options)
    first = decoding.generate([40])
    for launches in ([40], [8] * 5, [13, 27]):
        again = decoding.generate(launches)
        assert torch.equal(again.tokens, first.tokens)
        for a, b in zip(again.cache.layers, first.cache.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_the_launch_ends_when_all_sequences_are_finished(options):
    decoding = Decoding(model_of("llama", device=DEVICE), SAMPLED, 3, **options)
    free = decoding.generate([30]).tokens
    eos = [int(free[0, 5]), int(free[1, 12]), int(free[2, 9])]
    found = decoding.generate([10, 30, 5], eos=eos)
    last = max(next(i for i, t in enumerate(row.tolist()) if t in eos) for row in free)
    assert sum(found.ran) == last and found.ran[-1] == 0 and found.state.read() == (last + 1, True)
    for row, whole in zip(found.tokens.tolist(), free.tolist(), strict=True):
        end = next(i for i, t in enumerate(whole) if t in eos)
        assert row == whole[: end + 1] + [0] * (last - end)
    again = decoding.generate([30])  # the loader gave up in the middle of its weights: the next launch starts afresh
    assert torch.equal(again.tokens, free)


def test_launches_behind_the_end_run_no_step(options):
    decoding = Decoding(model_of("llama", device=DEVICE), GREEDY, 2, **options)
    free = decoding.generate([20]).tokens
    eos = [int(free[0, 4]), int(free[1, 6])]
    last = max(next(i for i, t in enumerate(row.tolist()) if t in eos) for row in free)
    made = decoding.generate([], eos=eos, room=40)
    ahead = [decoding._loop.start(made.args, made.state, 10, tokens=True) for _ in range(4)]  # nobody waits in between
    assert [one.wait() for one in ahead] == [(last + 1, True)] * 4
    assert torch.equal(ahead[0].tokens[:, :last], made.state.tokens[:, 1 : last + 1].cpu())
    assert {int(layer.cumulative_length) for layer in made.cache.layers} == {PROMPT + last}
    assert torch.equal(decoding.generate([20]).tokens, free)  # another generation starts afresh


@kernel_only
def test_the_host_may_ask_for_the_end_of_launches_under_way(options):
    decoding = Decoding(model_of("llama", device=DEVICE), GREEDY, 2, **options)
    free = decoding.generate([40]).tokens
    made = decoding.generate([], room=56)
    torch.cuda._sleep(400_000_000)  # cycles: the launches have not begun when they are asked to end
    ahead = [decoding._loop.start(made.args, made.state, 28) for _ in range(2)]
    made.state.stop()
    assert [one.wait() for one in ahead] == [(2, False)] * 2, "one step, and none in the launch behind"
    assert torch.equal(made.tokens, free[:, :2])
    assert torch.equal(decoding.generate([40]).tokens, free)


@kernel_only
def test_several_steps_inside_a_graph(options):
    decoding = Decoding(model_of("llama", device=DEVICE), SAMPLED, 2, **options)
    expected = decoding.generate([3, 24]).tokens
    made = decoding.generate([3], room=24)
    state, loop = made.state, decoding._loop
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop._run((*made.args, *(state.storages[name] for name in loop._storages)), 8, state.done)
    for _ in range(3):
        graph.replay()
    assert state.read() == (28, False)
    assert torch.equal(made.tokens, expected)


def scores(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab + rows)
    x = torch.randn(rows, vocab, generator=generator) * 3
    if kind == "flat":
        x = x * 0.01
    if kind == "ties":
        x = (x * 2).round() / 2
    if kind == "infinite":
        x[:, ::3], x[0, 1] = float("-inf"), float("nan")
    return x.to(dtype)


def step_of(graph, cache_dir) -> Step:
    made = lower(graph, target().sm_count)
    program = emit(made) if ON_GPU else None
    return Step(made, build(program, target(), cache_dir=cache_dir) if ON_GPU else None, program)


@pytest.mark.parametrize("stages", [(), ("top_k", "top_p"), ("min_p",)], ids=" ".join)
def test_frequencies_are_the_probabilities_of_torch(stages, cache_dir):
    run = step_of(choice(ROWS, VOCABULARY, DType.F32, *stages)[1], cache_dir)
    check_frequencies(run, stages, DEVICE)


@pytest.mark.parametrize("stages", ["", "top_k", "top_p", "min_p", "top_k top_p", "top_k top_p min_p"])
@pytest.mark.parametrize("vocab, dtype", [(151936, DType.F32), (50257, DType.BF16), (300, DType.F32)])
def test_the_drawn_tokens_are_those_of_the_definition(stages, vocab, dtype, cache_dir):
    rows, names = 16, tuple(stages.split())
    run = step_of(choice(rows, vocab, dtype, *names)[1], cache_dir)
    torch_dtype = {DType.F32: torch.float32, DType.BF16: torch.bfloat16}[dtype]
    sequences = torch.arange(rows) * 977 + (1 << 40)
    for kind, top_k, top_p, min_p in (
        ("normal", 50, 0.95, 0.05),
        ("flat", 7, 0.5, 0.9),
        ("ties", 20, 0.8, 0.01),
        ("infinite", 700, 0.999, 0.0),
    ):
        values = scores(kind, rows, vocab, torch_dtype)
        given = torch.tensor([1.0, top_k, top_p, min_p, 1.0], dtype=torch.float64)
        for n in range(3):
            tensors = {
                "x": values,
                "numbers": given,
                "key": torch.tensor([n * 12345678901]),
                "step": torch.tensor(n),
                "sequences": sequences,
            }
            got = run({name: t.to(DEVICE) for name, t in tensors.items()})["out"].tolist()
            want = [
                draw(row, frozenset(names), given, n * 12345678901, n, q)
                for row, q in zip(values, sequences.tolist(), strict=True)
            ]
            assert got == want, (kind, n)


@kernel_only
def test_a_signal_that_is_missing_in_a_launch_of_several_steps_is_a_fault(cache_dir):
    decoding = Decoding(model_of("llama", device=DEVICE), GREEDY, 1, cache_dir=str(cache_dir), timeout_s=0.3)
    decoding.generate([4])
    callable_ = decoding._loop._run.__self__
    executable = callable_.executable
    table = decode(executable.program)["waits"].copy()
    # counts that are one too high are never reached within a step
    offset = executable._fixed["tables"][2]
    start = offset - executable._tables.data_ptr()
    table["count"][:] += 1
    executable._tables[start : start + table.nbytes].copy_(
        torch.frombuffer(bytearray(table.tobytes()), dtype=torch.uint8)
    )
    # whoever waits longest says so first: for the event, or for a value of a task that waits for it
    with pytest.raises(DeviceFault, match="an event did not arrive|a value was not published"):
        decoding.generate([20])
    works = torch.ones(3, device=DEVICE) * 2
    assert works.sum().item() == 6


@kernel_only
def test_a_signal_that_is_missing_in_a_later_step_is_a_fault(cache_dir):
    """One event wants one signal more than it gets, and has three steps' worth of them in advance."""
    decoding = Decoding(model_of("llama", device=DEVICE), GREEDY, 1, cache_dir=str(cache_dir), timeout_s=0.3)
    decoding.generate([4])
    executable = decoding._loop._run.__self__.executable
    program = executable.program
    made = program.schedule.tasks
    (task,) = [t.id for t in made.tasks if made.graph.nodes[t.node].name == "loop_done"]
    tables = decode(program)
    (row,) = [t for t in tables["tasks"] if t["id"] == task]
    waits = tables["waits"].copy()
    assert row["wait_count"] == 1
    wait = waits[row["waits"]]
    slot = int(wait["slot"])
    (binding,) = executable._bindings.values()
    control = binding._keep[1].view(torch.int32)
    done = int(control[abi.CONTROL_EPOCH])
    if (waits["slot"] == slot).sum() > 1:
        pytest.skip("other tasks wait for the same event")
    wait["count"] += 1
    control[abi.CONTROL_EVENTS + slot * abi.EVENT_STRIDE] += done + 3
    start = executable._fixed["tables"][2] - executable._tables.data_ptr()
    new = torch.frombuffer(bytearray(waits.tobytes()), dtype=torch.uint8)
    executable._tables[start : start + len(new)].copy_(new)
    made = decoding.generate([], room=20)
    with pytest.raises(DeviceFault, match=f"loop_done.*an event did not arrive.*step {done + 3}"):
        decoding._loop(made.args, made.state, 20)
    assert int(made.state.step) in (4, 5), "three whole steps, and the fourth up to the missing signal"
