"""Small programs for compute-sanitizer, without Hugging Face and Dynamo: every operator's samples that have a device
form, and decoder steps.

    python3 tests/gpu/sanitize.py --build                                  compiles them into the kernel cache
    compute-sanitizer --tool memcheck python3 tests/gpu/sanitize.py        runs them

Tools: memcheck, initcheck, synccheck, racecheck (which sees shared memory alone). Compares with the reference
executor, so that it also says whether a step was right. Exits with 0 when all were. Words given as arguments choose
programs whose names hold one of them. `--each-lane`, which racecheck needs, makes kernels in which every lane arrives
for itself where otherwise one does so for its warp: it does not know that __syncwarp orders the others' accesses.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

# torch's caching allocator would hide accesses past the end of a tensor
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "passes")]

import graphs  # noqa: E402
import interpreter  # noqa: E402
import torch  # noqa: E402
from device_forms import REFUSED, SAMPLES  # noqa: E402
from gpu.harness import DEVICE, ON_GPU, Step, build_all, emit, lower, on_device  # noqa: E402

from mpk_dynamo.ir.graph import Graph  # noqa: E402
from mpk_dynamo.ir.schedule import Schedule  # noqa: E402
from mpk_dynamo.ir.types import BufferKind, DType  # noqa: E402
from mpk_dynamo.ops.sampling import sample_tensors  # noqa: E402
from mpk_dynamo.passes.graph import PASSES  # noqa: E402
from mpk_dynamo.reference import Executor  # noqa: E402
from mpk_dynamo.runtime.cache import default_dir  # noqa: E402

WORKERS, STEPS, CAPACITY = 5, 3, 40
"""Steps: both sets of flagged memory are used, and one of them twice."""
SLOW_NS = 60_000_000_000
"""A sanitizer makes the kernel slow, and its waits long."""
MODELS = {
    "decoder, one sequence": graphs.Model(layers=1, capacity=CAPACITY),
    "decoder, three sequences": graphs.Model(layers=1, batch=3, capacity=CAPACITY, bias=True, qk_norm=False),
}


def long_linear() -> Graph:
    """Weights of so many slots that every worker's ring goes around several times."""
    builder = graphs.Builder()
    x = builder.caller("x", (1, 4096), DType.BF16, BufferKind.INPUT)
    return builder.graph(builder.linear(x, builder.caller("weight", (512, 4096), DType.BF16)))


def programs(words: list[str]) -> dict[str, tuple[Graph, dict[str, torch.Tensor]]]:
    """Graph and tensors of the caller, by name."""
    out = {}
    for name, (node, graph) in SAMPLES.items():
        if name not in REFUSED:
            out[name] = graph, sample_tensors(node, graph, 1)
    for name, model in MODELS.items():
        graph = graphs.decoder(model)
        for graph_pass in PASSES:
            graph = graph_pass(graph)
        out[name] = graph, interpreter.random_memory(graph, 0)
    out["long linear"] = long_linear(), interpreter.random_memory(long_linear(), 0)
    return {name: made for name, made in out.items() if not words or any(w in name for w in words)}


def check(name: str, made: Schedule, given: dict[str, torch.Tensor], step: Step) -> bool:
    """Whether a few steps agree with the reference executor. A sum in another order may differ by a rounding."""
    ours, theirs = on_device(given), {n: t.clone() for n, t in given.items()}
    reference, worst = Executor(made), 0.0
    for _ in range(STEPS):
        wanted = reference(theirs)
        pairs = [(tensor, wanted[n]) for n, tensor in step(ours).items()]
        pairs += [(ours[n], theirs[n]) for n in given]
        for a, b in pairs:
            a, b = a.cpu().double(), b.double()
            worst = max(worst, ((a - b).norm() / b.norm().clamp(min=1e-30)).item())
    fine = worst < 1e-2  # not so for nan
    print(f"{name}: {STEPS} steps on {DEVICE}, relative difference {worst:.1e}{'' if fine else ': WRONG'}", flush=True)
    return fine


def main(arguments: list[str]) -> int:
    chosen = programs([a for a in arguments if not a.startswith("--")])
    if not chosen:
        print("no program has such a name", file=sys.stderr)
        return 2
    schedules = {name: lower(graph, WORKERS) for name, (graph, _) in chosen.items()}
    emitted = {name: emit(made) for name, made in schedules.items()} if ON_GPU else {}
    if "--each-lane" in arguments:
        emitted = {n: replace(p, source=f"#define MPK_EACH_LANE_ARRIVES\n{p.source}") for n, p in emitted.items()}
    start = time.perf_counter()
    artifacts = build_all(emitted, default_dir(), lineinfo=True)
    seconds = time.perf_counter() - start
    print(f"{len(emitted)} programs compiled or taken from the cache in {seconds:.1f} s", flush=True)
    if "--build" in arguments:
        return 0
    fine = 0
    for name, made in schedules.items():
        step = Step(made, artifacts.get(name), emitted.get(name), timeout_ns=SLOW_NS)
        fine += check(name, made, chosen[name][1], step)
    print(f"{fine} of {len(schedules)} programs are right")
    return 0 if fine == len(schedules) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
