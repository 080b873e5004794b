"""A small decoder step for compute-sanitizer, without Hugging Face and Dynamo:

    compute-sanitizer --tool memcheck python3 tests/gpu/sanitize.py

Tools: memcheck, initcheck, synccheck; racecheck sees shared memory alone. Compares with the reference executor, so that
it also says whether the step was right. Exits with 0 when it was.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# torch's caching allocator would hide accesses past the end of a tensor
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "passes")]

import graphs  # noqa: E402
import interpreter  # noqa: E402
from gpu.harness import DEVICE, ON_GPU, Step, emit, lower, target  # noqa: E402

from mpk_dynamo.passes.graph import PASSES  # noqa: E402
from mpk_dynamo.reference import Executor  # noqa: E402
from mpk_dynamo.runtime import build  # noqa: E402

WORKERS, STEPS, CAPACITY = 8, 3, 40
MODELS = {
    "one sequence": graphs.Model(layers=1, capacity=CAPACITY),
    "three sequences": graphs.Model(layers=1, batch=3, capacity=CAPACITY, bias=True, qk_norm=False),
}


def check(name: str, model: graphs.Model) -> bool:
    graph = graphs.decoder(model)
    for graph_pass in PASSES:
        graph = graph_pass(graph)
    made = lower(graph, WORKERS)
    if ON_GPU:
        program = emit(made)
        # a sanitizer makes the kernel slow, and its waits long
        step = Step(made, build(program, target()), program, timeout_ns=60_000_000_000)
    else:
        step = Step(made)
    given = interpreter.random_memory(graph, 0)
    ours, theirs = {n: t.to(DEVICE) for n, t in given.items()}, {n: t.clone() for n, t in given.items()}
    reference, worst = Executor(made), 0.0
    for _ in range(STEPS):
        pairs = list(zip(step(ours).values(), reference(theirs).values(), strict=True))
        pairs += [(ours[n], theirs[n]) for n in given]
        for a, b in pairs:
            a, b = a.cpu().double(), b.double()
            worst = max(worst, ((a - b).norm() / b.norm().clamp(min=1e-30)).item())
    print(f"{name}: {STEPS} steps on {DEVICE}, greatest relative difference to the reference {worst:.1e}")
    return worst < 1e-2  # not so for nan


if __name__ == "__main__":
    sys.exit(0 if all([check(name, model) for name, model in MODELS.items()]) else 1)
