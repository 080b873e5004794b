"""The runtime on a GPU, with the toy kernel: results, streams, threads, CUDA graphs, faults, refusals."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch
import toy_program

from mpk_dynamo.errors import DeviceFault, LaunchError
from mpk_dynamo.runtime import DeviceCallable, Executable, build
from mpk_dynamo.targets import detect, known

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ARGUMENTS = {"x": 1, "w": 0, "n": 3}


@pytest.fixture(scope="module")
def loaded():
    """(program, target, artifact) of the toy kernel for this GPU."""
    target, program = detect(0), toy_program.program()
    return program, target, build(program, target, cache=False)


@pytest.fixture
def executable(loaded):
    program, target, artifact = loaded
    return Executable(artifact, program, target, torch.device("cuda", 0))


@pytest.fixture
def run(executable):
    return callable_of(executable)


def callable_of(executable):
    return DeviceCallable(executable, executable.program.schedule.tasks.graph, ARGUMENTS)


def tensors():
    w = torch.nn.Parameter(torch.rand(toy_program.SIZE, device="cuda"), requires_grad=False)
    return [w, torch.rand(toy_program.SIZE, device="cuda"), 3, torch.tensor(5, device="cuda")]


def expected(args):
    return 2 * args[1] + args[0]


def test_detect_knows_the_gpu():
    found, props = detect(0), torch.cuda.get_device_properties(0)
    assert found.compute_capability == (props.major, props.minor)
    assert found.sm_count == props.multi_processor_count and found.bandwidth > 1e11
    assert found.shared_bytes_per_block >= 99 * 1024 and "async_copy" in found.features
    if found.name in ("h100", "h200", "a100"):
        table = known(found.name)
        assert found.features == table.features and found.arch == table.arch
        assert found.shared_bytes_per_block == table.shared_bytes_per_block


def test_results_and_state(run):
    args = tensors()
    for step in range(5):
        y, seven, n = run(*args)
        assert torch.equal(y, expected(args))
        assert seven == 7 and n is args[3] and n.item() == 6 + step
        args[1] = torch.rand(toy_program.SIZE, device="cuda")
    run.check_fault()


def test_launch_takes_addresses(executable):
    w, x, _, n = tensors()
    y = torch.empty_like(x)
    executable.launch([t.data_ptr() for t in (y, w, n, x)])
    torch.cuda.synchronize()
    assert torch.equal(y, 2 * x + w) and n.item() == 6


def test_a_misaligned_input_is_copied(run):
    args = tensors()
    args[1] = torch.rand(toy_program.SIZE + 1, device="cuda")[1:]
    assert torch.equal(run(*args)[0], expected(args))


def test_streams_share_no_scratch(run):
    streams = [torch.cuda.Stream() for _ in range(3)]
    sets = [tensors() for _ in streams]
    results = [[] for _ in streams]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, args, made in zip(streams, sets, results):
            with torch.cuda.stream(stream):
                made.append(run(*args)[0])
    torch.cuda.synchronize()
    for args, made in zip(sets, results):
        assert all(torch.equal(y, expected(args)) for y in made)
        assert args[3].item() == 55
    arenas = {binding._keep[0].data_ptr() for binding in run.executable._bindings.values()}
    assert len(arenas) == 3
    run.check_fault()


def test_a_new_thread_has_a_context(run):
    args, out = tensors(), []
    thread = threading.Thread(target=lambda: out.append(run(*args)[0]))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(out[0], expected(args))


def test_cuda_graph_capture_and_replay(run):
    args = tensors()
    run(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, _, _ = run(*args)
        second, _, _ = run(*args)
    assert args[3].item() == 6  # capture runs nothing
    for step in range(4):
        args[1].copy_(torch.rand(toy_program.SIZE, device="cuda"))
        graph.replay()
        eager, _, _ = run(*args)  # between replays, on the default stream
        torch.cuda.synchronize()
        for y in (first, second, eager):
            assert torch.equal(y, expected(args))
        assert args[3].item() == 6 + 3 * (step + 1)
    run.check_fault()


def test_two_graphs_replay_in_any_order(run):
    sets, graphs, outputs = [tensors(), tensors()], [], []
    for args in sets:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append(run(*args)[0])
    for which in (1, 0, 0, 1, 1):
        outputs[which].zero_()
        graphs[which].replay()
        torch.cuda.synchronize()
        assert torch.equal(outputs[which], expected(sets[which]))


def test_a_fault_makes_the_round_trip(executable):
    run, args = callable_of(executable), tensors()
    args[1].fill_(-1.0)
    run(*args)
    torch.cuda.synchronize()
    with pytest.raises(DeviceFault, match=r"worker 1, task 1 \(model\.copy#copy\[0\]\).*needed 5, seen 1.*step 0"):
        executable.check_fault()
    with pytest.raises(DeviceFault, match="worker 1"):
        run(*tensors())
    again = callable_of(Executable(executable.artifact, executable.program, executable.target, 0))
    args = tensors()
    assert torch.equal(again(*args)[0], expected(args))  # the context survived


def test_workers_must_be_co_resident(loaded):
    program, target, artifact = loaded
    queues = program.schedule.queues + ((),) * (64 * target.sm_count)
    wide = dataclasses.replace(program, schedule=dataclasses.replace(program.schedule, queues=queues))
    with pytest.raises(LaunchError, match="can hold .* at once"):
        Executable(artifact, wide, target, 0)


def test_a_cubin_for_another_gpu_is_refused(loaded):
    program, target, _ = loaded
    other = known("sm_80" if target.compute_capability != (8, 0) else "sm_90a")
    with pytest.raises(LaunchError, match="was built for"):
        Executable(build(program, other, cache=False), program, other, 0)


def test_loading_during_capture_is_refused(loaded):
    program, target, artifact = loaded
    stream = torch.cuda.Stream()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream), pytest.raises(LaunchError, match="CUDA graph"):
        Executable(artifact, program, target, 0)


def test_host_time_of_a_launch(executable, capsys):
    """A bound loose enough for a busy machine; the figure itself is printed (pytest -s)."""
    w, x, _, n = tensors()
    pointers = [t.data_ptr() for t in (torch.empty_like(x), w, n, x)]
    executable.launch(pointers)
    torch.cuda.synchronize()
    best = min(_seconds(lambda: executable.launch(pointers), 200) for _ in range(5))
    with capsys.disabled():
        print(f"\nhost time of launch(): {best * 1e6:.1f} us")
    assert best < 100e-6


def _seconds(call, count):
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    return elapsed
