"""`bench`: a decode step through each alternative, its accuracy against fp32, and how far from the stream floor."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OptionError
from .accuracy import Accuracy, accuracy, reference_logits
from .ceiling import Ceiling
from .ceiling import measure as measure_ceiling
from .decoder import Decoder, step_bytes
from .models import load
from .timing import StepTimes, check_alternatives, device_memory, measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALTERNATIVES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor-reduce-overhead": {"backend": "inductor", "mode": "reduce-overhead"},
    "inductor-max-autotune": {"backend": "inductor", "mode": "max-autotune"},
    "mpk": {"backend": "mpk", "fullgraph": True, "options": {"fallback": "error"}},
}
"""Arguments of torch.compile. Each is given fixed shapes, as `generate()` does for a static cache."""


@dataclass(frozen=True)
class Result:
    """compile_s: from nothing to the first step done, caches empty. extra_bytes: device memory beyond weights and
    cache. failed: why the gate refuses the times, or ""."""

    name: str
    accuracy: Accuracy
    failed: str
    compile_s: float
    extra_bytes: int = 0
    times: StepTimes | None = None


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 when a result fails the accuracy gate."""
    _check(arguments)
    names = ["eager", *(n for n in arguments.against if n != "eager"), "mpk"]
    device = torch.device(arguments.device)
    model = load(arguments.model, device=device, layers=arguments.layers)
    shape = {
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "max_cache": arguments.max_cache or arguments.prompt + 512,
        "steps": arguments.steps,
    }
    _say(f"fp32 reference of {arguments.model}, batch {shape['batch']}, {shape['steps']} steps from {shape['prompt']}")
    reference = reference_logits(model, **shape)
    decoder = Decoder(model, **shape)
    results: dict[str, Result] = {}
    for name in dict.fromkeys(names):
        _say(f"{name}: compile, compare, time")
        results[name] = _one(name, model, decoder, reference, results.get("eager"), arguments)
    ceiling = measure_ceiling(device) if device.type == "cuda" else None
    middle = shape["prompt"] + shape["steps"] // 2
    needed = step_bytes(model, shape["batch"], middle)
    figures = _figures(arguments.model, shape, decoder, results, ceiling, needed)
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
    else:
        print(_table(arguments.model, shape, results, ceiling, needed))
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=1)
    return int(any(r.failed for r in results.values()))


def _check(arguments: argparse.Namespace) -> None:
    check_alternatives(arguments.against, ALTERNATIVES)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("no CUDA device, so there is nothing to time", remedy="--device cpu checks accuracy alone")
    if arguments.device == "cuda" and (arguments.steps < 20 or arguments.repeats < 5):
        raise OptionError(
            f"{arguments.steps} steps and {arguments.repeats} repeats say too little", remedy="at least 20 and 5"
        )
    if arguments.max_cache and arguments.max_cache < arguments.prompt + arguments.steps:
        raise OptionError(
            f"a cache of {arguments.max_cache} tokens is too small for {arguments.prompt} and {arguments.steps} steps"
        )


def _one(
    name: str,
    model: "PreTrainedModel",
    decoder: Decoder,
    reference: torch.Tensor,
    eager: Result | None,
    arguments: argparse.Namespace,
) -> Result:
    on_gpu = arguments.device == "cuda"
    torch._dynamo.reset()
    with _cold_caches() as folder, device_memory() if on_gpu else _no_memory() as extra:
        forward = _forward(name, model, folder)
        decoder.rewind()
        begin = time.perf_counter()
        with torch.no_grad():
            forward(**decoder.steps[0])
        if on_gpu:
            torch.cuda.synchronize()
        compile_s = time.perf_counter() - begin
        found = accuracy(reference, decoder.logits(forward))
        failed = found.excess(eager.accuracy) if eager else ""
        times = measure(decoder, forward, arguments.repeats) if on_gpu and not failed else None
        extra_bytes = extra()
    return Result(name, found, failed, compile_s, extra_bytes, times)


def _forward(name: str, model: "PreTrainedModel", folder: str) -> Callable[..., Any]:
    options = ALTERNATIVES[name]
    if options is None:
        return model
    if name == "mpk":
        options = {**options, "options": {**options["options"], "cache_dir": folder}}
    return torch.compile(model, dynamic=False, **options)


class _cold_caches:
    """An empty folder for our kernels, and Inductor's caches fresh: compile times are those of a first run."""

    def __enter__(self) -> str:
        from torch._inductor.utils import fresh_cache

        self._folder = tempfile.TemporaryDirectory(prefix="mpk-bench-")
        self._fresh = fresh_cache()
        self._fresh.__enter__()
        return self._folder.name

    def __exit__(self, *error: Any) -> None:
        self._fresh.__exit__(*error)
        self._folder.cleanup()


class _no_memory:
    def __enter__(self) -> Callable[[], int]:
        return lambda: 0

    def __exit__(self, *error: Any) -> None:
        pass


def _table(model: str, shape: dict[str, int], results: dict[str, Result], ceiling: Ceiling | None, needed: int) -> str:
    lines = [f"{model}: batch {shape['batch']}, prompt {shape['prompt']}, cache {shape['max_cache']}"]
    floor = needed / ceiling.bandwidth * 1e3 if ceiling else None
    if ceiling and floor:
        lines += [
            f"stream ceiling {ceiling.bandwidth / 1e12:.3f} TB/s ({ceiling.method}); "
            f"a step reads {needed / 1e9:.3f} GB: floor {floor:.3f} ms"
        ]
    header = (
        "",
        "step ms",
        "min..max",
        "queued ms",
        "of floor",
        "vs eager",
        "host us",
        "kernels",
        "compile s",
        "extra MB",
    )
    rows = [(*header, "KL", "error", "gate")]
    base = results["eager"].times
    for r in results.values():
        cells = ["-"] * 7
        if r.times and floor:
            t = r.times
            cells = [
                f"{t.step_ms:.3f}",
                f"{t.spread_ms[0]:.3f}..{t.spread_ms[1]:.3f}",
                f"{t.queued_ms:.3f}" if t.queued_ms is not None else "-",
                f"{floor / t.step_ms:.0%}",
                f"{base.step_ms / t.step_ms:.2f}x" if base else "-",
                f"{t.host_us:.0f}",
                f"{t.kernels}+{t.copies}" if t.copies else f"{t.kernels}",
            ]
        cost = [f"{r.compile_s:.1f}" if r.name != "eager" else "-", f"{r.extra_bytes / 1e6:.0f}" if r.times else "-"]
        gate = [f"{r.accuracy.kl:.2e}", f"{r.accuracy.error:.2e}", f"FAILED: {r.failed}" if r.failed else "passed"]
        rows.append((r.name, *cells, *cost, *gate))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        name, *numbers, gate = row
        cells = [name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(numbers, widths[1:-1])), gate]
        lines.append("  ".join(cells))
    lines += [
        "step: median of back-to-back calls; queued: the same with the host ahead of the device;",
        "kernels: device launches of one step (+ copies); extra MB: beyond weights and cache;",
        "gate: KL divergence and relative error of the logits against fp32, at most 1.25 times eager's own",
    ]
    return "\n".join(lines)


def _figures(
    model: str,
    shape: dict[str, int],
    decoder: Decoder,
    results: dict[str, Result],
    ceiling: Ceiling | None,
    needed: int,
) -> dict[str, Any]:
    import transformers

    from ..report import reports

    return {
        "model": model,
        **shape,
        "device": torch.cuda.get_device_name() if ceiling else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda},
        "cache_bytes": decoder.cache_bytes(),
        "step_bytes": needed,
        "ceiling": dataclasses.asdict(ceiling) if ceiling else None,
        "floor_ms": needed / ceiling.bandwidth * 1e3 if ceiling else None,
        "results": {name: _plain(r) for name, r in results.items()},
        "program": dataclasses.asdict(reports()[-1]) if reports() else None,
    }


def _plain(result: Result) -> dict[str, Any]:
    rest = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    times = dataclasses.asdict(result.times) if result.times else None
    return {**rest, "accuracy": result.accuracy.figures(), "times": times}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
