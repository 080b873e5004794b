"""The only place where the stages are listed, in order, each verified before the next reads it."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .dump import Dump
from .errors import OptionError, Unsupported
from .ir import printer
from .ir.graph import is_callers
from .report import Report
from .settings import Settings
from .specialize import fix_numbers, has_symbols, without_symbols
from .verify.report import without_collector

if TYPE_CHECKING:
    from .capture import Captured
    from .capture.importer import Alias
    from .ir.graph import Graph
    from .ir.program import Program
    from .ir.schedule import Schedule
    from .loop import Feed, Loop, Sampling
    from .passes.schedule.timeline import Timeline
    from .targets import Target

    Observe = Callable[[Timeline], None]
    Ahead = Callable[[Program], None]

_log = logging.getLogger("mpk_dynamo")

REFERENCE_WORKERS = 8
"""Simulated workers of the reference executor: enough for every kind of event, few enough to be quick."""


@dataclass(frozen=True)
class Place:
    """Where a program runs: the inputs' device, and the target that it is made for, on a GPU or not."""

    device: torch.device
    target: "Target"

    @staticmethod
    def of(example_inputs: Sequence[Any], settings: Settings) -> "Place":
        """Raises Unsupported for devices that nothing is made for, OptionError when the settings contradict it."""
        device = _device_of(example_inputs)
        on_gpu = _runs_on_gpu(device, settings)
        return Place(device, _target_of(device, settings) if on_gpu else _reference_target(settings))


def compile_captured(
    captured: "Captured",
    place: Place,
    settings: Settings,
    report: Report,
    dump: Dump,
    observe: "Observe | None" = None,
    recorded: int = 5,
) -> Callable[..., Any]:
    """A captured graph as a callable with the arguments and results of the graph it was captured from, in which
    numbers have their present values. `observe` is given a timeline of the kernel, once: the median of `recorded`
    calls, the first after those that the settings leave out. Without it the setting `profile` says where one is
    written. Raises Unsupported (it has no device form), VerificationError, CompileError."""
    target = place.target
    workers = settings.workers or target.sm_count
    if not target.is_gpu:
        if settings.profile:
            _log.warning("option 'profile' records kernels; the reference executor has no times worth recording")
        schedule = lower(captured.graph, workers, target, report, dump)
        compiled = _interpret(captured, schedule, report)
        report.outcome, report.device = "reference", str(place.device)
    else:
        profiled = bool(settings.profile or observe)
        with ThreadPoolExecutor(1) as pool:  # NVRTC, while tables are verified and stored; it holds no lock of Python's
            begun: list[Future[Any]] = []

            def begin(program: "Program") -> None:
                begun.append(pool.submit(build, program, target, settings, report))

            program = proven_program(captured.graph, workers, target, settings, report, dump, profiled, begin)
            if not begun:  # it comes from the cache
                begin(program)
            with report.stage("nvrtc"):
                artifact = begun[0].result()
        compiled = _load(captured, program, artifact, target, place.device, settings, report, observe, recorded)
        report.outcome, report.device, report.launches = "kernel", torch.cuda.get_device_name(place.device), 1
    dump.report(report)
    return with_aliases(compiled, captured.aliases) if captured.aliases else compiled


def compile_loop(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    fed: Mapping[str, Any],
    sampling: "Sampling",
    settings: Settings,
    report: Report,
) -> "Loop":
    """From Dynamo's graph of a decode step to a loop of such steps: `loop(args, state, steps)`.

    fed: "tokens" (a tensor), "positions" and "masks" (lists of tensors): the very objects among `example_inputs` that
    the loop advances, see loop.Feed; one that is not among them is ignored. The first output of the graph that is a
    tensor is the logits. `args` are the arguments of the graph, `state` a loop.LoopState of its device and batch. A
    call runs up to `steps` steps, fewer when all sequences finish, and returns how many; afterwards the fed tensors of
    `args` hold what the next step is fed.

    Raises Unsupported (as compile_captured; no tokens among the inputs; a mask of unknown form), VerificationError,
    CompileError.
    """
    from .loop import Loop, append_loop, host_loop
    from .verify import verify_graph

    place = Place.of(example_inputs, settings)
    dump = Dump(settings.dump_dir, gm, report)
    captured = capture_graph(gm, example_inputs, report, dump, store_of(place, settings))
    graph = append_loop(captured.graph, _feed(captured, example_inputs, fed), sampling)
    dump.text("1-loop.txt", printer.print_graph, graph)
    with report.stage("verify"):
        verify_graph(graph)
    added = [n for n, b in graph.buffers.items() if is_callers(b) and n == b.storage and n.startswith("loop.")]
    positions = {name: len(example_inputs) + i for i, name in enumerate(added)}
    captured = dataclasses.replace(
        captured, graph=graph, arguments={**captured.arguments, **positions}, aliases={}
    )
    compiled = compile_captured(captured, place, settings, report, dump)
    batch = graph.buffers["loop.finished"].shape[0]
    if place.target.is_gpu:
        return Loop(compiled.run, added, batch, sampling, compiled.check_fault)
    return Loop(host_loop(compiled), added, batch, sampling)


def _feed(captured: "Captured", example_inputs: Sequence[Any], fed: Mapping[str, Any]) -> "Feed":
    """The storages that the loop advances, from the tensors."""
    from .loop import Feed

    place = {id(x): i for i, x in enumerate(example_inputs)}
    storages = {i: storage for storage, i in captured.arguments.items()}

    def found(tensors: Sequence[Any]) -> tuple[str, ...]:
        names = (storages.get(place.get(id(t), -1)) for t in tensors)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    tokens = found([fed["tokens"]])
    if not tokens:
        raise Unsupported("the step does not take the tokens that the loop should feed")
    outputs = captured.graph.outputs
    logits = next((i for i, o in enumerate(outputs) if o.buffer is not None), None)
    if logits is None:
        raise Unsupported("the step returns no tensor; the loop needs its logits")
    return Feed(tokens[0], found(fed.get("positions", ())), found(fed.get("masks", ())), logits)


@without_collector
def capture_graph(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], report: Report, dump: Dump, store: Settings | None = None
) -> "Captured":
    """Dynamo's graph as a verified, unfused Graph. With `store`, a capture of an earlier time is looked for in the
    cache folder of these settings, and a new one kept there."""
    from .capture import capture
    from .verify import verify_graph

    with report.stage("capture"):
        if has_symbols(gm, example_inputs):
            fixed, inputs, positions, _ = fix_numbers(gm, example_inputs)
            with without_symbols():
                captured = capture(fixed, inputs)
            arguments = {storage: positions[k] for storage, k in captured.arguments.items()}
            aliases = {
                k: a if a.argument is None else dataclasses.replace(a, argument=positions[a.argument])
                for k, a in captured.aliases.items()
            }
            captured = dataclasses.replace(captured, arguments=arguments, aliases=aliases)
        elif store is not None:
            captured = _stored_capture(gm, example_inputs, store)
        else:
            captured = capture(gm, example_inputs)
    report.captured_nodes = len(captured.graph.nodes)
    dump.text("1-captured.txt", printer.print_graph, captured.graph)
    with report.stage("verify"):
        verify_graph(captured.graph)
    return captured


def store_of(place: Place, settings: Settings) -> Settings | None:
    """Settings for what is kept between processes. A dump has every stage made."""
    return settings if place.target.is_gpu and not settings.dump_dir else None


def _stored_capture(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> "Captured":
    from . import proven
    from .capture import capture

    folder = settings.cache_dir or None
    key = proven.key_of_capture(gm, example_inputs)
    captured = proven.load_capture(key, folder) if key else None
    if captured is None:
        captured = capture(gm, example_inputs)
        if key:
            proven.save_capture(captured, key, folder)
    return captured


@without_collector
def lower(graph: "Graph", workers: int, target: "Target", report: Report, dump: Dump) -> "Schedule":
    """A captured Graph as a verified Schedule for `workers` workers of `target`."""
    from .passes.graph import PASSES
    from .passes.schedule import schedule as make_schedule
    from .passes.tasks import choose_flagged, derive_events, tile
    from .verify import verify_graph, verify_schedule, verify_tasks

    with report.stage("fuse"):
        for graph_pass in PASSES:
            graph = graph_pass(graph)
    dump.text("2-graph.txt", printer.print_graph, graph)
    with report.stage("verify"):
        verify_graph(graph)
    with report.stage("tile"):
        tasks = tile(graph, workers)
    with report.stage("events"):
        tasks = choose_flagged(tasks)
        tasks = derive_events(tasks)
    dump.text("3-tasks.txt", printer.print_tasks, tasks)
    with report.stage("verify"):
        verify_tasks(tasks)
    with report.stage("schedule"):
        schedule = make_schedule(tasks, workers)
    dump.text("4-schedule.txt", printer.print_schedule, schedule)
    with report.stage("verify"):
        verify_schedule(schedule, target)
    _describe(report, graph, schedule)
    return schedule


@without_collector
def emit(
    schedule: "Schedule",
    target: "Target",
    report: Report,
    dump: Dump,
    profiled: bool = False,
    ahead: "Ahead | None" = None,
) -> "Program":
    """A Schedule as a verified Program for `target`. `profiled`: with the code that records the clocks of tasks.
    `ahead` is given the program before its tables are verified, to compile its source meanwhile."""
    from .codegen import generate
    from .verify import verify_program

    report.target = target.name
    with report.stage("codegen"):
        program = generate(schedule, target, profiled)
    dump.text("5-program.cu", lambda p: p.source, program)
    dump.text("5-program.txt", printer.print_program, program)
    if ahead is not None:
        ahead(program)
    with report.stage("verify"):
        verify_program(program, target)
    return program


@without_collector
def proven_program(
    graph: "Graph",
    workers: int,
    target: "Target",
    settings: Settings,
    report: Report,
    dump: Dump,
    profiled: bool = False,
    ahead: "Ahead | None" = None,
) -> "Program":
    """`lower` and `emit`, or their result of an earlier time, which was verified then. A dump has every stage made, and
    what records clocks is not kept. `ahead`: see `emit`."""
    from . import proven
    from .ir.program import Program

    with report.stage("stored"):
        key = None if settings.dump_dir or profiled else proven.key_of(graph, workers, target)
        program = proven.load(Program, key, settings.cache_dir or None) if key else None
    if program is not None:
        report.target = target.name
        _describe(report, program.schedule.tasks.graph, program.schedule)
        return program
    program = emit(lower(graph, workers, target, report, dump), target, report, dump, profiled, ahead)
    if key:
        with report.stage("stored"):
            proven.save(program, key, settings.cache_dir or None)
    return program


def build(program: "Program", target: "Target", settings: Settings, report: Report) -> Any:
    """A Program as a cubin, from the cache or from NVRTC. Needs no GPU."""
    from .runtime import build as build_program
    from .runtime.cache import Cache

    folder = settings.cache_dir or None
    artifact = build_program(program, target, cache_dir=folder, dump_dir=report.dump or None)
    Cache(folder).keep_to(settings.cache_mb << 20)
    report.resources = str(getattr(artifact, "resources", ""))
    return artifact


def with_aliases(compiled: Callable[..., Any], aliases: "Mapping[int, Alias]") -> Callable[..., Any]:
    """`compiled`, with results that share memory with arguments or other results made as views of them."""

    def call(*args: Any) -> tuple[Any, ...]:
        out = list(compiled(*args))
        for k, a in aliases.items():
            base = out[a.result] if a.argument is None else args[a.argument]
            out[k] = base.as_strided(a.shape, a.strides, base.storage_offset() + a.offset)
        return tuple(out)

    return call


def _interpret(captured: "Captured", schedule: "Schedule", report: Report) -> Callable[..., Any]:
    from .reference_callable import ReferenceCallable

    return ReferenceCallable(captured, schedule, report)


def _load(
    captured: "Captured",
    program: "Program",
    artifact: Any,
    target: "Target",
    device: torch.device,
    settings: Settings,
    report: Report,
    observe: "Observe | None",
    recorded: int,
) -> Callable[..., Any]:
    from .runtime import DeviceCallable, Executable

    with report.stage("load"):
        executable = Executable(
            artifact,
            program,
            target,
            device,
            timeout_ns=int(settings.timeout_s * 1e9),
            flight=settings.flight,
            flight_waiting=settings.flight_waiting,
        )
    made = DeviceCallable(executable, program.schedule.tasks.graph, captured.arguments, captured.constants)
    if not settings.profile and observe is None:
        return made
    from .runtime import ProfiledCallable

    write = observe or _profile_writer(target, settings, report)
    return ProfiledCallable(made, settings.profile_call, recorded, write)


def _profile_writer(target: "Target", settings: Settings, report: Report) -> "Observe":
    """What writes a kernel's timeline, beside what was predicted, to the folder of the settings."""
    from .passes.schedule.simulate import simulate
    from .profiler import Profile, write_profile
    from .targets import machine_of

    def write(timeline: "Timeline") -> None:
        machine = machine_of(target)
        predicted = simulate(timeline.schedule, machine)
        title = f"{report.graph_nodes} nodes on {target.name}"
        source = f"what a stream reaches on {target.name}"
        path = write_profile(settings.profile, Profile(timeline, title, machine.bandwidth, source, predicted))
        _log.info("profile written to %s", path)

    return write


def _describe(report: Report, graph: "Graph", schedule: "Schedule") -> None:
    tasks = schedule.tasks
    report.graph_nodes = len(graph.nodes)
    report.node_kinds = dict(Counter(type(n).__name__ for n in graph.nodes))
    report.tasks, report.task_kinds = len(tasks.tasks), dict(Counter(t.op for t in tasks.tasks))
    report.events, report.flagged = len(tasks.events), len(tasks.flagged)
    report.edges = sum(len(e.producers) + len(e.waiters) for e in tasks.events)
    report.workers, report.arena_bytes = schedule.workers, schedule.arena_bytes
    report.bytes, report.flops = sum(t.bytes for t in tasks.tasks), sum(t.flops for t in tasks.tasks)


def _device_of(example_inputs: Sequence[Any]) -> torch.device:
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    devices = sorted({x.device for x in tensors}, key=str)
    others = {x.device for x in tensors if x.dim() or x.device.type != "cpu"}
    if len(devices) == 2 and len(others) == 1:
        raise Unsupported(
            f"inputs are on {', '.join(map(str, devices))}: a single number on the cpu, such as an empty cache's count",
            remedy="the first call with a new cache is not for a program; move other such numbers to the device",
            passing=True,
        )
    if len(devices) != 1 or devices[0].type not in ("cpu", "cuda"):
        found = ", ".join(map(str, devices)) or "no tensors"
        raise Unsupported(f"inputs are on {found}", remedy="put model, cache and inputs on one CUDA or CPU device")
    return devices[0]


def _runs_on_gpu(device: torch.device, settings: Settings) -> bool:
    if settings.device == "cuda" and device.type != "cuda":
        raise OptionError(f"option 'device' is 'cuda', but the inputs are on {device}", remedy="move the model to CUDA")
    return device.type == "cuda" and settings.device != "reference"


def _reference_target(settings: Settings) -> "Target":
    from .targets import reference_target

    return reference_target(settings.workers or REFERENCE_WORKERS)


def _target_of(device: torch.device, settings: Settings) -> "Target":
    from .targets import detect, known

    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise Unsupported(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}",
            remedy="a GPU of compute capability 8.0 (Ampere) or newer is needed",
        )
    return known(settings.target) if settings.target else detect(device.index or 0)
