"""What the decode loop adds to a step, on the device alone: the step by itself with the host ahead, and the loop with
one step and with many steps per launch. Few layers suffice: what is added does not depend on how many they are.

    python tests/gpu/loop_times.py [--model qwen3-0.6b] [--layers 4] [--batch 1] [--sampling greedy filtered ...]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StaticCache

from mpk_dynamo import pipeline
from mpk_dynamo.dump import Dump
from mpk_dynamo.loop import LoopState, Sampling
from mpk_dynamo.report import Report
from mpk_dynamo.settings import Settings
from mpk_dynamo.tools.models import load

SAMPLINGS = {
    "greedy": Sampling(),
    "filtered": Sampling(do_sample=True, temperature=0.8, top_k=50, top_p=0.95),
    "plain": Sampling(do_sample=True),
    "top-p": Sampling(do_sample=True, top_p=0.9),
}
PROMPT, CAPACITY, STEPS, REPEATS = 512, 1024, 128, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sampling", nargs="*", default=list(SAMPLINGS), choices=list(SAMPLINGS))
    arguments = parser.parse_args()
    model = load(arguments.model, device="cuda", layers=arguments.layers)
    for number, name in enumerate(arguments.sampling):
        times = measure(model, arguments.batch, SAMPLINGS[name], alone=number == 0)
        for what, us in times.items():
            print(f"batch {arguments.batch}, {name}, {what}: {us:.1f} us per step", flush=True)


def measure(model: Any, batch: int, sampling: Sampling, alone: bool) -> dict[str, float]:
    """Microseconds per step, medians; `alone`: of the step by itself too."""
    torch._dynamo.reset()
    vocabulary, found = model.config.vocab_size, {}
    cache = StaticCache(model.config, max_cache_len=CAPACITY)
    mask = torch.zeros(batch, 1, 1, CAPACITY, dtype=torch.bool, device="cuda")
    mask[..., : PROMPT + 1] = True
    positions = torch.full((batch, 1), PROMPT, device="cuda")
    fed = {"tokens": torch.zeros_like(positions), "positions": [positions], "masks": [mask]}
    state = LoopState.create(batch, STEPS * 3 * (REPEATS + 1), "cuda", vocabulary, sampling, seed=1)

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        settings, report = Settings(), Report()
        loop = pipeline.compile_loop(gm, inputs, fed, sampling, settings, report)
        ways = {
            "a launch per step": lambda args: [loop.start(args, state, 1) for _ in range(STEPS)],
            f"{STEPS} steps per launch": lambda args: loop.start(args, state, STEPS),
        }
        if alone:
            dump = Dump("", gm, report)
            captured = pipeline.capture_graph(gm, inputs, report, dump)
            step = pipeline.compile_captured(captured, pipeline.Place.of(inputs, settings), settings, report, dump)
            ways = {"the step alone": lambda args: [step(*args) for _ in range(STEPS)], **ways}

        def call(*args: Any) -> tuple[Any, ...]:
            counted = (positions, mask, *(layer.cumulative_length for layer in cache.layers))
            kept = [t.clone() for t in counted]
            for name, way in ways.items():
                times = []
                for _ in range(REPEATS + 1):
                    for tensor, value in zip(counted, kept, strict=True):
                        tensor.copy_(value)
                    times.append(timed(lambda way=way: way(args)))
                found[name] = statistics.median(times[1:])
            return (None,) * len(next(n for n in gm.graph.nodes if n.op == "output").args[0])

        return call

    with torch.no_grad():
        model(torch.randint(0, vocabulary, (batch, PROMPT), device="cuda"), past_key_values=cache, logits_to_keep=1)
        torch.compile(model.forward, backend=backend, fullgraph=True)(
            input_ids=fed["tokens"], position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
    return found


def timed(work: Callable[[], Any]) -> float:
    """Microseconds per step; the device sleeps until the host has launched all."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(40_000_000)
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / STEPS * 1e3


if __name__ == "__main__":
    main()
