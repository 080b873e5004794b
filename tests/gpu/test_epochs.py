"""Counters are never reset: launch after launch, over the wrap of 32 bits, in CUDA graphs and beside other kernels."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import DEVICE, ON_GPU, Step, emit, gpu, kernel_only, target
from plain_kernels import hold_sms
from self_checking import assert_counted, expected, preset, schedule, tensors

from mpk_dynamo.runtime import build

pytestmark = gpu
MANY = int(os.environ.get("MPK_TEST_LAUNCHES", 1_000_000))
WRAP = 1 << 32


@pytest.fixture(scope="module")
def make_step(cache_dir: Path) -> Callable[..., Step]:
    def make(workers: int = 7) -> Step:
        made = schedule(workers)
        if not ON_GPU:
            return Step(made)
        program = emit(made)
        return Step(made, build(program, target(), cache_dir=cache_dir), program)

    return make


def launch(step: Step, given: dict[str, torch.Tensor], times: int) -> None:
    """Without waiting for the device."""
    if not ON_GPU:
        for _ in range(times):
            step(given)
        return
    pointers = [given[name].data_ptr() for name in step.program.bindings]
    for _ in range(times):
        step.executable.launch(pointers)


def settled(step: Step) -> None:
    if ON_GPU:
        torch.cuda.synchronize()
        step.executable.check_fault()


@pytest.mark.parametrize("workers", [1, 7, 132])
def test_every_launch_counts(workers: int, make_step: Callable[..., Step]) -> None:
    step, given = make_step(min(workers, target().sm_count)), tensors()
    done = 0
    for more in (1, 1, 1, 47):
        launch(step, given, more)
        settled(step)
        done += more
        assert_counted(given, done)


def test_a_lost_update_would_show() -> None:
    given = {name: tensor.to(DEVICE) for name, tensor in expected(10).items()}
    assert_counted(given, 10)
    given["total"][7] += 5
    with pytest.raises(AssertionError, match="1 of .* elements of total"):
        assert_counted(given, 10)


@kernel_only
@pytest.mark.parametrize("epoch", [WRAP - 1, WRAP - 2, WRAP - 101, WRAP // 2 - 1, WRAP // 7 - 3])
def test_over_the_wrap_of_32_bits(epoch: int, make_step: Callable[..., Step]) -> None:
    """Epochs wrap, and so do the counters of events, which go faster: the last two cross 2**31 and 2**32 of theirs."""
    step, given = make_step(), tensors()
    preset(step, epoch)
    launch(step, given, 200)
    settled(step)
    assert_counted(given, 200)


@kernel_only
def test_a_replayed_graph_beside_other_kernels(make_step: Callable[..., Step]) -> None:
    step, given = make_step(), tensors()
    launch(step, given, 2)
    a = torch.rand(1024, 1024, device=DEVICE)
    b = a @ a  # makes what cuBLAS may not make during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(step, given, 1)
        b = a @ a  # kernels before, between and after
        launch(step, given, 2)
        b = b.relu()
    done = 2
    for replay in range(100):
        graph.replay()
        done += 3
        if replay % 10 == 0:
            launch(step, given, 1)  # on the stream, at an epoch of its own
            done += 1
    settled(step)
    assert_counted(given, done)
    torch.testing.assert_close(b, (a @ a).relu())


@kernel_only
def test_two_models_on_two_streams_from_two_threads(make_step: Callable[..., Step]) -> None:
    """Each on half of the SMs, so that both are resident at once; a third kernel takes SMs of both in between."""
    half = target().sm_count // 2
    steps, errors = [make_step(half), make_step(half - 1)], []
    sets = [tensors() for _ in steps]
    a = torch.rand(2048, 2048, device=DEVICE)
    torch.mm(a, a)
    torch.cuda.synchronize()

    def work(step: Step, given: dict[str, torch.Tensor]) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    launch(step, given, 25)
                    torch.mm(a, a)
                torch.cuda.current_stream().synchronize()
        except Exception as error:  # the main thread raises it
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(steps, sets, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and not errors, errors
    for step, given in zip(steps, sets, strict=True):
        settled(step)
        assert_counted(given, 500)


@kernel_only
def test_two_models_that_fill_the_device(make_step: Callable[..., Step]) -> None:
    """Neither fits beside the other: cooperative launches of two streams follow each other, whole."""
    steps = [make_step(target().sm_count) for _ in range(2)]
    sets, streams = [tensors() for _ in steps], [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    for _ in range(100):
        for step, given, stream in zip(steps, sets, streams, strict=True):
            with torch.cuda.stream(stream):
                launch(step, given, 2)
    for step, given in zip(steps, sets, strict=True):
        settled(step)
        assert_counted(given, 200)


@kernel_only
def test_a_kernel_that_holds_the_sms_delays_a_launch(make_step: Callable[..., Step]) -> None:
    """A cooperative launch starts when all its workers fit. Until then its waits do not run, so no time is up."""
    step, given = make_step(target().sm_count), tensors()
    launch(step, given, 1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.cuda.stream(torch.cuda.Stream()):
        hold_sms(10, seconds=3.0)  # longer than the bound of every wait, which is 2 s here
    launch(step, given, 3)
    settled(step)
    assert time.perf_counter() - start > 2.5, "the kernel did not hold the SMs"
    assert_counted(given, 4)


@kernel_only
@pytest.mark.slow
def test_many_launches(make_step: Callable[..., Step]) -> None:
    """MPK_TEST_LAUNCHES of them, from 1000 before the wrap of the epoch."""
    step, given = make_step(), tensors()
    preset(step, WRAP - 1001)
    start = time.perf_counter()
    for done in range(0, MANY, 50_000):
        launch(step, given, min(50_000, MANY - done))
        settled(step)
    seconds = time.perf_counter() - start
    print(f"{MANY} launches in {seconds:.1f} s, {seconds / MANY * 1e6:.2f} us each")
    assert_counted(given, MANY)
