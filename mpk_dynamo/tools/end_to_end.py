"""`bench --e2e`: what a token of `generate()` costs, all included, on the decode loop and on HF's own."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OptionError
from ..opt_in import disable, enable
from ..report import reports
from .decoder import Decoder
from .energy import EnergyMeter
from .models import load
from .timing import check_alternatives, measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALTERNATIVES = ("eager", "inductor", "mpk")
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
ENERGY_S = 20.0
LEAST_REPEATS = 3


@dataclass(frozen=True)
class EndToEnd:
    """token_ms: slope of generate()'s time over the number of new tokens, so that prefill and set-up are not in it;
    each step makes one token of every sequence. first_ms: time of a call for one new token. spread_ms: slopes of the
    fastest and slowest of `repeats` repeats. new: new tokens of the longer call, fewer than asked for where an
    alternative is slow. joules: energy per step, when asked for."""

    name: str
    token_ms: float
    spread_ms: tuple[float, float]
    first_ms: float
    compile_s: float
    repeats: int
    new: int
    joules: float | None = None
    watts: float | None = None


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0."""
    _check(arguments)
    say = _Clock()
    energy = EnergyMeter(arguments.device) if arguments.energy else None
    if energy is not None and energy.missing:
        say(f"no energy figures: {energy.missing}")
        energy = None
    say(f"{arguments.model}: load")
    model = load(arguments.model, device=arguments.device, layers=arguments.layers)
    model.generation_config.eos_token_id = None  # random weights end anywhere; every run makes all tokens
    model.generation_config.pad_token_id = 0
    capacity = arguments.max_cache or arguments.prompt + arguments.new
    kernel_ms = None
    if not arguments.no_kernel:
        kernel_ms = _kernel_ms(model, arguments, capacity, say)
    results: dict[str, EndToEnd] = {}
    for name in dict.fromkeys(("mpk", *arguments.against)):
        results[name] = _one(name, model, arguments, capacity, energy, say)
    say("done")
    figures = _figures(arguments, capacity, kernel_ms, results)
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
    else:
        print(_table(figures, results))
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=1)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    check_alternatives(arguments.against, ALTERNATIVES)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("no CUDA device, so there is nothing to time", remedy="run on a machine with a GPU")
    if arguments.device != "cuda":
        raise OptionError("times of the reference executor say nothing", remedy="--device cuda")
    if arguments.new < 64 or arguments.repeats < 1:
        raise OptionError(f"{arguments.new} new tokens, {arguments.repeats} repeats", remedy="at least 64 and 1")
    if arguments.max_cache and arguments.max_cache < arguments.prompt + arguments.new:
        raise OptionError(f"a cache of {arguments.max_cache} tokens cannot hold the prompt and the new tokens")


def _kernel_ms(
    model: "PreTrainedModel", arguments: argparse.Namespace, capacity: int, say: "_Clock"
) -> float | None:
    """Time of one step's kernel alone at the middle of the generation, the host being ahead: what the loop is
    measured against."""
    shape = {"batch": arguments.batch, "prompt": arguments.prompt + arguments.new // 2, "max_cache": capacity}
    decoder = Decoder(model, **shape, steps=24)
    torch._dynamo.reset()
    forward = torch.compile(model, dynamic=False, backend="mpk", fullgraph=True, options={"fallback": "error"})
    say("the step's kernel alone: compile")
    with torch.no_grad():
        forward(**decoder.steps[0])
    _say_compiled(say)
    return measure(decoder, forward, 5).queued_ms


def _one(
    name: str,
    model: "PreTrainedModel",
    arguments: argparse.Namespace,
    capacity: int,
    energy: "EnergyMeter | None",
    say: "_Clock",
) -> EndToEnd:
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.prompt)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)
    how: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    how |= SAMPLED if arguments.sample else {"do_sample": False}
    torch._dynamo.reset()
    with _prepared(name, model, capacity) as more:

        def generate(new: int) -> float:
            torch.manual_seed(0)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model.generate(**how, **more, max_new_tokens=new)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        say(f"{name}: compile")
        compile_s = generate(8)
        if name == "mpk":
            _say_compiled(say)
        generate(16)  # the first calls record CUDA graphs, say
        say(f"{name}: up to {arguments.repeats} x {arguments.new} tokens")
        first = statistics.median(generate(1) for _ in range(3))
        new = _affordable(arguments, (generate(16) - first) / 15)
        few = new // 8
        slopes: list[float] = []
        begin = time.perf_counter()
        while len(slopes) < arguments.repeats:
            if len(slopes) >= LEAST_REPEATS and time.perf_counter() - begin > arguments.seconds:
                break
            short, long = generate(few), generate(new)
            slopes.append((long - short) / (new - few) * 1e3)
        if energy is not None:
            say(f"{name}: energy, {ENERGY_S:.0f} s")
        joules, watts = _energy(energy, generate, arguments.new) if energy is not None else (None, None)
    spread = (min(slopes), max(slopes))
    return EndToEnd(name, statistics.median(slopes), spread, first * 1e3, compile_s, len(slopes), new, joules, watts)


def _affordable(arguments: argparse.Namespace, token_s: float) -> int:
    """How many new tokens the longer call makes: all, or so many that the least number of repeats takes about as long
    as it may. token_s: about what a token takes."""
    most = arguments.seconds / LEAST_REPEATS / max(token_s, 1e-6) * 8 / 9
    return max(32, min(arguments.new, int(most)))


@contextlib.contextmanager
def _prepared(name: str, model: "PreTrainedModel", capacity: int) -> Iterator[dict[str, Any]]:
    """The model set up for one alternative; yields further arguments of generate()."""
    static = {"cache_implementation": "static", "max_cache_len": capacity}
    if name == "mpk":
        enable(model, max_cache_len=capacity, fallback="error")
        try:
            yield {}
        finally:
            disable(model)
    elif name == "eager":
        yield {"disable_compile": True}  # its dynamic cache is the quicker one without compilation
    else:
        yield static  # generate() compiles the step with Inductor, reduce-overhead, by itself
    for attribute in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
        model.__dict__.pop(attribute, None)


def _energy(energy: "EnergyMeter", generate: Callable[[int], float], new: int) -> tuple[float, float]:
    """(joules per step, mean watts) over at least 20 s of back-to-back calls, prefill included."""
    start, begin, steps = energy.joules(), time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < ENERGY_S:
        generate(new)
        steps += new
    used = energy.joules() - start
    return used / steps, used / spent


def _figures(
    arguments: argparse.Namespace, capacity: int, kernel_ms: float | None, results: dict[str, EndToEnd]
) -> dict[str, Any]:
    import transformers

    return {
        "model": arguments.model,
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "max_cache": capacity,
        "sampling": SAMPLED if arguments.sample else None,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda},
        "kernel_ms": kernel_ms,
        "results": {name: dataclasses.asdict(r) for name, r in results.items()},
    }


def _table(figures: dict[str, Any], results: dict[str, EndToEnd]) -> str:
    kernel = figures["kernel_ms"]
    how = "sampling" if figures["sampling"] else "greedy"
    size = f"batch {figures['batch']}, {figures['prompt']} + {figures['new']} tokens"
    lines = [f"{figures['model']}: generate(), {how}, {size}"]
    if kernel:
        lines.append(f"the step's kernel alone: {kernel:.3f} ms")
    rows = [("", "ms/token", "min..max", "over", "tokens/s", "over kernel us", "first ms", "compile s", "J/token")]
    for r in results.values():
        times = [f"{r.token_ms:.3f}", f"{r.spread_ms[0]:.3f}..{r.spread_ms[1]:.3f}", f"{r.new - r.new // 8}"]
        rate = f"{figures['batch'] / r.token_ms * 1e3:.0f}"
        over = f"{(r.token_ms - kernel) * 1e3:.0f}" if kernel else "-"
        joules = f"{r.joules / figures['batch']:.4f}" if r.joules is not None else "-"
        rows.append((r.name, *times, rate, over, f"{r.first_ms:.1f}", f"{r.compile_s:.1f}", joules))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for name, *cells in rows:
        lines.append("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))]))
    lines.append("ms/token: slope of the total time over so many new tokens (over); one token of each sequence")
    return "\n".join(lines)


def _say_compiled(say: "_Clock") -> None:
    made = reports()[-1]
    say(f"compiled in {made.total_seconds:.1f} s: {', '.join(f'{k} {s:.1f}' for k, s in made.seconds.items())}")


class _Clock:
    """Says on stderr what is going on, and how many seconds into the command."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def __call__(self, text: str) -> None:
        print(f"{time.perf_counter() - self._begin:6.1f} s  {text}", file=sys.stderr, flush=True)
