"""`profile`: the timeline of one decode step, recorded on a GPU or predicted without one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..dump import Dump
from ..errors import OptionError, Unsupported
from ..passes.schedule.simulate import simulate
from ..pipeline import Place, capture_graph, compile_captured, lower
from ..profiler import Profile, write_trace
from ..report import Report
from ..settings import Settings
from ..specialize import returned_numbers
from ..targets import known, machine_of
from .ceiling import measure as measure_ceiling
from .decoder import Decoder
from .models import load

if TYPE_CHECKING:
    from ..capture import Captured
    from ..passes.schedule.timeline import Timeline

WARM_UP = 10
"""Steps before the first that is recorded."""
DEFAULT_TARGET = "h200"
"""What is predicted for where no GPU is and none is named."""


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    if arguments.steps < 1:
        raise OptionError(f"{arguments.steps} steps: at least one must be recorded")
    measured = torch.cuda.is_available() and not arguments.predict
    if measured and arguments.target:
        raise OptionError("a recorded step runs on the GPU that is here", remedy="--predict for another target")
    found = _measured(arguments) if measured else _predicted(arguments)
    if arguments.json == "-":
        print(json.dumps(found.figures(), indent=1))
    else:
        print(found)
    if arguments.json not in ("", "-"):
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found.figures(), file, indent=1)
    if arguments.out:
        write_trace(arguments.out, found.timeline, found.title)
        _say(f"trace: {arguments.out} (open it at ui.perfetto.dev)")
    return 0


def _predicted(arguments: argparse.Namespace) -> Profile:
    target = known(arguments.target or DEFAULT_TARGET)
    why = "as asked" if arguments.predict else "no GPU here"
    _say(f"{why}: the times are PREDICTED for {target.name} by the simulator, nothing is measured")
    timelines: list[Timeline] = []

    def compile_it(captured: "Captured", report: Report, dump: Dump) -> None:
        schedule = lower(captured.graph, arguments.workers or target.sm_count, target, report, dump)
        timelines.append(simulate(schedule, machine_of(target), arguments.prompt))

    # sizes are all that lowering needs: nothing is allocated
    decoder = _decoder(arguments, torch.device("meta"), steps=1)
    _through(decoder, compile_it, arguments)
    machine = machine_of(target)
    source = f"what a stream should reach on {target.name}"
    return Profile(timelines[0], _title(arguments, target.name), machine.bandwidth, source)


def _measured(arguments: argparse.Namespace) -> Profile:
    device = torch.device("cuda")
    decoder = _decoder(arguments, device, steps=WARM_UP + arguments.steps)
    options = {"profile_call": WARM_UP, **({"workers": arguments.workers} if arguments.workers else {})}
    settings = Settings.from_options({**options, "fallback": "error"})
    place = Place.of([torch.empty(0, device=device)], settings)
    timelines: list[Timeline] = []

    def compile_it(captured: "Captured", report: Report, dump: Dump) -> Callable[..., Any]:
        _say("compile, then record")
        return compile_captured(captured, place, settings, report, dump, timelines.append, arguments.steps)

    _through(decoder, compile_it, arguments)
    ceiling = measure_ceiling(device)
    predicted = simulate(timelines[0].schedule, machine_of(place.target), arguments.prompt)
    title = _title(arguments, torch.cuda.get_device_name(device))
    return Profile(timelines[0], title, ceiling.bandwidth, f"measured: {ceiling.method}", predicted)


def _decoder(arguments: argparse.Namespace, device: torch.device, steps: int) -> Decoder:
    cache = arguments.max_cache or arguments.prompt + 512
    if cache < arguments.prompt + steps:
        raise OptionError(f"a cache of {cache} tokens is too small for {arguments.prompt} and {steps} steps")
    _say(f"{arguments.model}: batch {arguments.batch}, prompt {arguments.prompt}, cache {cache}")
    model = load(arguments.model, device=device, layers=arguments.layers)
    return Decoder(model, batch=arguments.batch, prompt=arguments.prompt, max_cache=cache, steps=steps)


def _through(
    decoder: Decoder,
    compile_it: "Callable[[Captured, Report, Dump], Callable[..., Any] | None]",
    arguments: argparse.Namespace,
) -> None:
    """All the decoder's steps, compiled as one program. Raises OptionError when the model is not one."""
    graphs: list[Unsupported | None] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        report = Report()
        dump = Dump("", None, report)
        try:
            made = compile_it(capture_graph(gm, example_inputs, report, dump), report, dump)
        except Unsupported as why:
            graphs.append(why)
            return gm.forward
        graphs.append(None)
        return returned_numbers(gm, made) if made else gm.forward

    with torch.no_grad():
        step = torch.compile(decoder.model, backend=backend, dynamic=False)
        for inputs in decoder.steps:
            step(**inputs)
    if graphs != [None]:
        why = next((str(g) for g in graphs if g), f"Dynamo made {len(graphs)} graphs of it")
        remedy = f"python -m mpk_dynamo explain --model {arguments.model} says what is captured"
        raise OptionError(f"{arguments.model} does not become one program: {why}", remedy=remedy)


def _title(arguments: argparse.Namespace, where: str) -> str:
    return f"{arguments.model}, batch {arguments.batch}, prompt {arguments.prompt}, {where}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
