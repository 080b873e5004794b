"""Launch parameter, bindings per stream, faults and the calling convention, on host memory instead of a GPU."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_program
from host_device import HostDevice

from mpk_dynamo import abi
from mpk_dynamo.errors import DeviceFault, LaunchError
from mpk_dynamo.ir.graph import Output
from mpk_dynamo.runtime.callable import DeviceCallable
from mpk_dynamo.runtime.faults import explain
from mpk_dynamo.runtime.launch import Binding, Executable
from mpk_dynamo.targets import known

ARTIFACT = SimpleNamespace(cubin=b"\x7fELF", report=SimpleNamespace(registers=32))
ARGUMENTS = {"x": 1, "w": 0, "n": 3}


def make(device=None, program=None, **options):
    device = device or HostDevice()
    return Executable(ARTIFACT, program or toy_program.program(), known("sm_90a"), device=device, **options)


def callable_of(executable, *arguments):
    return DeviceCallable(executable, executable.program.schedule.tasks.graph, *arguments)


def tensors():
    """w, x, an argument the kernel does not use, n."""
    w = torch.nn.Parameter(torch.randn(toy_program.SIZE), requires_grad=False)
    return [w, torch.rand(toy_program.SIZE), 3, torch.tensor(5)]


def with_outputs(program, *outputs):
    tg = program.schedule.tasks
    graph = dataclasses.replace(tg.graph, outputs=outputs)
    return dataclasses.replace(
        program, schedule=dataclasses.replace(program.schedule, tasks=dataclasses.replace(tg, graph=graph))
    )


# --- parameter packing ----------------------------------------------------------------------------------------


def test_the_parameter_is_the_abi_struct_and_the_pointers():
    fixed = {"tables": list(range(1, len(abi.TABLES) + 1)), "arena": 1 << 40, "control": 7, "fault": 8, "profile": 9}
    fixed |= {"timeout_ns": (1 << 63) + 5, "flight": 4, "flight_waiting": 1, "flagged": 1 << 41, "flagged_bytes": 512}
    fixed |= {"steps": 1, "done": 0}
    binding = Binding(fixed, 3, None, ())
    binding.bind([11, (1 << 64) - 1, 13])
    record = np.frombuffer(binding.bytes, abi.LAUNCH_FIXED.dtype, count=1)[0]
    assert {n: record[n].tolist() for n in abi.LAUNCH_FIXED.dtype.names} == fixed
    pointers = np.frombuffer(binding.bytes, "<u8", offset=abi.LAUNCH_FIXED.dtype.itemsize)
    assert pointers.tolist() == [11, (1 << 64) - 1, 13]
    assert toy_program.read(binding.params, np.dtype("<u8"), 1)[0] == binding._memory.ctypes.data
    binding.words[1] = 12
    binding.touch()
    binding.bind([11, 12, 13])
    binding.words[1] = 99
    binding.touch()
    binding.bind([11, 12, 13])
    assert np.frombuffer(binding.bytes, "<u8", offset=abi.LAUNCH_FIXED.dtype.itemsize).tolist() == [11, 12, 13]


def test_a_launch_of_no_tensors_has_room_for_one_pointer():
    assert len(Binding({}, 0, None, ()).bytes) == abi.LAUNCH_FIXED.dtype.itemsize + 8


def test_launch_passes_everything_to_the_kernel():
    executable = make(timeout_ns=123, flight=3, flight_waiting=2, profile=0x5000)
    w, x, _, n = tensors()
    y = torch.empty(toy_program.SIZE)
    for step in range(3):
        executable.launch([t.data_ptr() for t in (y, w, n, x)])
        assert torch.equal(y, 2 * x + w) and n.item() == 6 + step
        x += 1
    assert len(executable.device.kernel.launches) == 3
    launch = executable.device.kernel.launches[-1]
    assert launch["arena"] and launch["control"] and launch["fault"]
    expected = {"grid": 2, "threads": 64, "shared": 256, "timeout_ns": 123, "flight": 3, "flight_waiting": 2}
    assert launch.items() >= (expected | {"profile": 0x5000, "stream": 0}).items()


@pytest.mark.parametrize(
    ("given", "expected"), [({}, (3, 2)), ({"flight": 4}, (4, 2)), ({"flight_waiting": 1}, (3, 1))]
)
def test_slots_in_flight_are_the_programs_unless_they_are_given(given, expected):
    executable = make(program=dataclasses.replace(toy_program.program(), flight=3), **given)
    w, x, _, n = tensors()
    y = torch.empty(toy_program.SIZE)
    executable.launch([t.data_ptr() for t in (y, w, n, x)])
    launch = executable.device.kernel.launches[-1]
    assert (launch["flight"], launch["flight_waiting"]) == expected


def test_a_wrong_number_of_pointers_is_refused():
    with pytest.raises(LaunchError, match="3 pointers for 4 bindings"):
        make().launch([16, 32, 48])


# --- checks before the first launch ---------------------------------------------------------------------------


def test_workers_must_be_co_resident():
    with pytest.raises(LaunchError, match="can hold 1 at once.*at most 1 workers"):
        make(HostDevice(resident=1))


def test_the_kernel_must_be_for_this_gpu():
    with pytest.raises(LaunchError, match="built for sm_90a.*the device has 8.9"):
        make(HostDevice(capability=(8, 9)))


def test_too_many_tensors():
    program = dataclasses.replace(toy_program.program(), bindings=("x",) * (abi.MAX_BINDINGS + 1))
    with pytest.raises(LaunchError, match=f"{abi.MAX_BINDINGS + 1} tensors"):
        make(program=program)


def test_loading_during_capture_is_refused():
    device = HostDevice()
    with device.capturing(stream=3, ident=1), pytest.raises(LaunchError, match="CUDA graph"):
        make(device)


def test_a_malformed_table_is_refused():
    program = toy_program.program()
    tables = program.tables | {"queues": program.tables["queues"][:-1]}
    with pytest.raises(LaunchError, match="table queues has 31 bytes"):
        make(program=dataclasses.replace(program, tables=tables))


# --- streams and captures -------------------------------------------------------------------------------------


def test_each_stream_has_its_own_arena_and_control_block():
    device = HostDevice()
    run = callable_of(make(device), ARGUMENTS)
    args = tensors()
    for stream in (0, 7, 9, 7, 0):
        device.current = stream
        assert torch.equal(run(*args)[0], 2 * args[1] + args[0])
    used = [(launch["stream"], launch["arena"], launch["control"]) for launch in device.kernel.launches]
    assert used[0] == used[4] and used[1] == used[3]
    for field in (1, 2):
        assert len({launch[field] for launch in used}) == 3


def test_each_capture_has_its_own_arena_and_control_block():
    device = HostDevice()
    run = callable_of(make(device), ARGUMENTS)
    args = tensors()
    device.current = 7
    run(*args)
    for ident in (1, 2):
        with device.capturing(stream=7, ident=ident):
            run(*args)
            run(*args)
    run(*args)
    arenas = [launch["arena"] for launch in device.kernel.launches]
    assert arenas[1] == arenas[2] and arenas[3] == arenas[4] and arenas[0] == arenas[5]
    assert len(set(arenas)) == 3


def test_an_exception_while_binding_launches_nothing_and_frees_the_lock():
    executable = make()
    with pytest.raises(ZeroDivisionError), executable.prepared():
        raise ZeroDivisionError
    assert not executable.device.kernel.launches
    callable_of(executable, ARGUMENTS)(*tensors())
    assert len(executable.device.kernel.launches) == 1


def test_threads_do_not_mix_their_pointers():
    run = callable_of(make(), ARGUMENTS)
    w, _, unused, n = tensors()
    wrong = []

    def work(seed):
        x = torch.full((toy_program.SIZE,), float(seed))
        for _ in range(100):
            if not torch.equal(run(w, x, unused, n)[0], 2 * x + w):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and n.item() == 405


# --- calling convention ---------------------------------------------------------------------------------------


def test_results_are_in_the_order_of_the_graph():
    args = tensors()
    y, seven, n = callable_of(make(), ARGUMENTS)(*args)
    assert torch.equal(y, 2 * args[1] + args[0])
    assert seven == 7 and n is args[3] and n.item() == 6


def test_each_call_returns_new_tensors():
    run, args = callable_of(make(), ARGUMENTS), tensors()
    first, _, _ = run(*args)
    kept = first.clone()
    args[1] = args[1] + 1
    second, _, _ = run(*args)
    assert torch.equal(first, kept) and torch.equal(second, 2 * args[1] + args[0])


def test_one_buffer_can_be_returned_twice():
    run = callable_of(make(program=with_outputs(toy_program.program(), Output("y"), Output("y"))), ARGUMENTS)
    first, second = run(*tensors())
    assert first is second


def test_tensors_may_move_between_calls():
    run, args = callable_of(make(), ARGUMENTS), tensors()
    run(*args)
    args[0].data = torch.randn(toy_program.SIZE)  # the same Parameter object at another address
    args[3] = torch.tensor(40)
    y, _, n = run(*args)
    assert torch.equal(y, 2 * args[1] + args[0]) and n.item() == 41


def test_constants_of_the_graph_are_bound():
    args = tensors()
    w = args[0].detach().clone()
    run = callable_of(make(), {"x": 0, "n": 1}, {"w": w})
    assert torch.equal(run(args[1], args[3])[0], 2 * args[1] + w)


def test_a_misaligned_input_is_copied():
    args = tensors()
    args[1] = torch.rand(toy_program.SIZE + 1)[1:]
    assert args[1].data_ptr() % 16
    y, _, _ = callable_of(make(), ARGUMENTS)(*args)
    assert torch.equal(y, 2 * args[1] + args[0])


def test_a_misaligned_parameter_is_refused_with_its_place():
    args = tensors()
    args[0] = torch.randn(toy_program.SIZE + 1)[1:]
    with pytest.raises(LaunchError, match=r"param w lies at .* not a multiple of 16 bytes at model\.w") as caught:
        callable_of(make(), ARGUMENTS)(*args)
    assert caught.value.origin == "model.w"


@pytest.mark.parametrize(
    "wrong",
    (torch.rand(2, 32), torch.rand(128)[::2], torch.zeros(64, dtype=torch.float64), torch.empty(64, device="meta"), 3),
)
def test_other_arguments_than_captured_are_refused(wrong):
    args = tensors()
    args[1] = wrong
    with pytest.raises(LaunchError, match=r"argument 1 \(input x\) is"):
        callable_of(make(), ARGUMENTS)(*args)


def test_a_binding_nobody_provides():
    with pytest.raises(LaunchError, match="binding n .state."):
        callable_of(make(), {"x": 0, "w": 1})


# --- faults ---------------------------------------------------------------------------------------------------


def failing(executable):
    """Arguments that make the toy kernel report a fault."""
    args = tensors()
    args[1].fill_(-1.0)
    callable_of(executable, ARGUMENTS)(*args)


def test_a_fault_names_worker_task_event_and_module():
    executable = make()
    executable.check_fault()
    failing(executable)
    with pytest.raises(DeviceFault) as caught:
        executable.check_fault()
    text = str(caught.value)
    assert "worker 1, task 1 (model.copy#copy[0])" in text
    assert "event 0 in slot 0, which model.add#add[0] signal, needed 5, seen 1 (4 signals missing), step 0" in text
    assert caught.value.origin == "model.copy" and "timeout_s" in text


def test_after_a_fault_every_launch_raises_the_same():
    executable = make()
    failing(executable)
    run, messages = callable_of(executable, ARGUMENTS), []
    for _ in range(2):
        with pytest.raises(DeviceFault) as caught:
            run(*tensors())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert len(executable.device.kernel.launches) == 1


def test_a_record_that_is_only_claimed_is_no_fault_yet():
    executable = make()
    record = toy_program.read(executable._record.host, abi.FAULT.dtype, 1)
    record["state"] = 1
    executable.check_fault()
    callable_of(executable, ARGUMENTS)(*tensors())


def flagged_program():
    """The toy program, with its scratch buffer flagged: a set of 512 bytes behind 256 others."""
    program = toy_program.program()
    tasks = dataclasses.replace(program.schedule.tasks, flagged=frozenset("t"), events=())
    schedule = dataclasses.replace(
        program.schedule,
        tasks=tasks,
        arena={"t": 256},
        arena_bytes=1280,
        flagged_start=256,
        flagged_bytes=512,
        slots=(),
    )
    return dataclasses.replace(program, schedule=schedule)


def test_a_launch_of_several_steps_says_how_many_and_what_ends_it():
    executable = make()
    w, x, _, n = tensors()
    held = torch.empty(toy_program.SIZE), w, n, x
    bound = [t.data_ptr() for t in held]
    for steps, done in ((7, 0x600), (1, 0), (2, 0x700)):
        with executable.prepared(steps, done) as binding:
            binding.bind(bound)
        record = np.frombuffer(binding.bytes, abi.LAUNCH_FIXED.dtype, count=1)[0]
        assert (record["steps"], record["done"]) == (steps, done)


def test_both_sets_of_flagged_buffers_hold_the_sentinel_at_first():
    executable = make(program=flagged_program())
    w, x, _, n = tensors()
    bound = (torch.empty(toy_program.SIZE), w, n, x)
    with executable.prepared() as binding:
        arena, _ = binding._keep
        assert (arena[:256] == 0xA5).all() and (arena[256:] == 0xFF).all() and len(arena) == 1280
        record = np.frombuffer(binding.bytes, abi.LAUNCH_FIXED.dtype, count=1)[0]
        assert record["arena"] == arena.data_ptr() and record["flagged"] == arena.data_ptr() + 256
        assert record["flagged_bytes"] == 512
        binding.bind([t.data_ptr() for t in bound])
    # a capture has sets of its own
    with executable.device.capturing(stream=3, ident=1), executable.prepared() as binding:
        other, _ = binding._keep
        assert other.data_ptr() != arena.data_ptr() and (other[256:] == 0xFF).all()
        binding.bind([t.data_ptr() for t in bound])


def test_an_unpublished_value_names_buffer_and_writer():
    record = {"state": 2, "kind": 5, "worker": 1, "task": 1, "slot": 0, "needed": 1, "seen": 0, "epoch": 7}
    text = str(explain(record, flagged_program()))
    assert "task 1 (model.copy#copy[0]): a value was not published" in text
    assert "an element of t, written by model.add#add[0], step 7" in text and "timeout_s" in text


@pytest.mark.parametrize("kind", range(len(abi.FAULT_KINDS) + 1))
def test_every_kind_of_fault_has_words(kind):
    record = {"state": 2, "kind": kind, "worker": 9, "task": 99, "slot": 4, "needed": 8, "seen": 0xFFFFFFFF, "epoch": 3}
    text = str(explain(record, toy_program.program()))
    assert "worker 9, task 99" in text and "step 3" in text and "->" in text
    if kind < len(abi.FAULT_KINDS):
        assert abi.FAULT_KINDS[kind] in text
    if kind == 4:
        assert "index -1, size 8" in text


# --- profiling ------------------------------------------------------------------------------------------------


def test_recording_is_on_for_the_calls_asked_for_and_changes_no_result():
    from mpk_dynamo.runtime.profiled import ProfiledCallable

    seen, device = [], HostDevice()
    inner = callable_of(make(device), ARGUMENTS)
    profiled = ProfiledCallable(inner, 3, 3, seen.append)
    plain = callable_of(make(), ARGUMENTS)
    args, others = tensors(), tensors()
    others[:2] = args[:2]
    for call in range(8):
        assert torch.equal(profiled(*args)[0], plain(*others)[0])
        assert len(seen) == (call >= 4)
    recorded = [launch["profile"] != 0 for launch in device.kernel.launches]
    assert recorded == [False, False, True, True, True, False, False, False]
    assert len(seen[0].clock) == 3 and seen[0].makespan > 0
    profiled.check_fault()


def test_a_captured_call_is_not_recorded():
    from mpk_dynamo.runtime.profiled import ProfiledCallable

    device = HostDevice()
    profiled = ProfiledCallable(callable_of(make(device), ARGUMENTS), 1, 1, lambda timeline: None)
    with device.capturing(stream=3, ident=1):
        profiled(*tensors())
    profiled(*tensors())
    assert [launch["profile"] != 0 for launch in device.kernel.launches] == [False, True]


# --- memory that is written and shared ------------------------------------------------------------------------


@pytest.mark.parametrize("other", [0, 1])
def test_what_is_written_shares_memory_with_no_other_argument(other):
    """Neither with a weight nor with an input, in the first call and later ones; a refused call launches nothing."""
    executable = make()
    call = callable_of(executable, ARGUMENTS)
    apart = tensors()
    call(*apart)
    shared = tensors()
    shared[3] = shared[other].data.view(torch.int64)[4]
    for _ in range(2):
        with pytest.raises(LaunchError, match="share memory.*clone"):
            call(*shared)
    assert len(executable.device.kernel.launches) == 1
    call(*apart)
    beside = torch.zeros(toy_program.SIZE + 4)
    apart[1], apart[3] = beside[:-4], beside[-4:].view(torch.int64)[0]  # next to each other
    call(*apart)
    assert apart[3].item() == 1 and len(executable.device.kernel.launches) == 3
