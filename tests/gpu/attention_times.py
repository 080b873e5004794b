"""Times of attention in decode steps of a few layers, without Hugging Face and Dynamo:

    PYTHONPATH=. python3 tests/gpu/attention_times.py [--models 1b 0.6b 8b] [--batches 1 8] [--contexts 512 4096]

Per shape: us of a step and of an attention with its combination (from the worker that finished the projection last to
the one that finished attention last, by the kernel's own clocks), the keys and values they read, and what a longer
context adds to the step, as a share of the ceiling. Checks that repeats give the same bits and, with --check, the
result against the reference executor. Layers have their real widths, the output layer a small one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "passes")]

import graphs  # noqa: E402
import interpreter  # noqa: E402

from mpk_dynamo import abi, codegen, pipeline  # noqa: E402
from mpk_dynamo.dump import Dump  # noqa: E402
from mpk_dynamo.ir.types import BufferKind  # noqa: E402
from mpk_dynamo.reference import Executor  # noqa: E402
from mpk_dynamo.report import Report  # noqa: E402
from mpk_dynamo.runtime import Executable, build  # noqa: E402
from mpk_dynamo.targets import known  # noqa: E402

CEILING = 4.5e12
"""Bytes/s that a streaming read reaches on the H200: what the shares in the output refer to."""

SHORT = 1024
"""Capacity for contexts below it; one large capacity serves all others."""

SHAPES = {
    "1b": dict(hidden=2048, heads=32, kv_heads=8, size=64, ff=8192, qk_norm=False),
    "0.6b": dict(hidden=1024, heads=16, kv_heads=8, size=128, ff=3072, qk_norm=True),
    "8b": dict(hidden=4096, heads=32, kv_heads=8, size=128, ff=12288, qk_norm=True),
    "wide": dict(hidden=2048, heads=8, kv_heads=4, size=256, ff=4096, qk_norm=True),
    "odd": dict(hidden=1280, heads=15, kv_heads=5, size=80, ff=2560, qk_norm=False),
}


def lowered(key: tuple[str, int, int, int]) -> tuple:
    """(graph, schedule) of (shape, batch, capacity, layers)."""
    shape, batch, capacity, layers = key
    graph = graphs.decoder(graphs.Model(layers=layers, batch=batch, capacity=capacity, vocab=1024, **SHAPES[shape]))
    report = Report()
    return graph, pipeline.lower(graph, known("h200").sm_count, known("h200"), report, Dump("", None, report))


def make(key: tuple[str, int, int, int]) -> tuple:
    """(graph, schedule, program, artifact, seconds), for another process."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    graph, made = lowered(key)
    program = codegen.generate(made, known("h200"), profiled=True)
    return graph, made, program, build(program, known("h200")), time.perf_counter() - start


def inputs(graph, capacity: int) -> dict[str, torch.Tensor]:
    """Random tensors on the device, small enough that activations stay of the order of one."""
    made, kinds = {}, {BufferKind.SCRATCH, BufferKind.OUTPUT}
    torch.manual_seed(7)
    for b in graph.buffers.values():
        if b.kind in kinds or b.storage in made:
            continue
        dtype = interpreter.TORCH[b.dtype]
        if dtype.is_floating_point:
            scale = b.shape[-1] ** -0.5 if b.kind is BufferKind.PARAM and len(b.shape) > 1 else 1.0
            t = torch.empty(b.shape, dtype=dtype, device="cuda").normal_(0, scale)
        else:
            t = torch.zeros(b.shape, dtype=dtype, device="cuda")
        made[b.storage] = t
    return made


def set_context(graph, memory, context: int) -> None:
    for b in graph.buffers.values():
        t = memory.get(b.storage)
        if t is None or t.is_floating_point():
            continue
        if t.dtype is torch.bool:
            t.zero_()
            t[..., : context + 1] = True
        elif b.name.startswith("positions") or not b.shape:
            t.fill_(context)


class Run:
    def __init__(self, made, profiled: bool) -> None:
        self.graph, self.schedule, self.program, artifact, _ = made
        tasks = self.schedule.tasks
        self.workers = self.schedule.workers
        self.width = abi.PROFILE.dtype.itemsize
        self.records = torch.zeros((self.workers + len(tasks.tasks)) * self.width, dtype=torch.uint8, device="cuda")
        options = {"profile": self.records.data_ptr()} if profiled else {}
        self.executable = Executable(artifact, self.program, known("h200"), 0, timeout_ns=2_000_000_000, **options)
        self.outputs = {
            b.storage: torch.zeros(b.shape, dtype=interpreter.TORCH[b.dtype], device="cuda")
            for b in tasks.buffers.values() if b.kind is BufferKind.OUTPUT
        }  # fmt: skip

    def launch(self, memory, times: int = 1) -> None:
        everything = {**memory, **self.outputs}
        pointers = [everything[name].data_ptr() for name in self.program.bindings]
        for _ in range(times):
            self.executable.launch(pointers)

    def attention_us(self) -> tuple[float, float]:
        """(attention, combination) of one launch, medians over the layers."""
        raw = np.frombuffer(self.records.cpu().numpy().tobytes(), abi.PROFILE.dtype)["clock"].astype(np.float64)
        worker, task = raw[: self.workers], raw[self.workers :]
        rate = (worker[:, 3] - worker[:, 1]) / (worker[:, 2] - worker[:, 0])
        nodes: dict[tuple[int, str], float] = {}
        for w, queue in enumerate(self.schedule.queues):
            for i in queue:
                t = self.schedule.tasks.tasks[i]
                end = (task[i].max() - worker[w, 0]) * rate[w] + worker[w, 1]
                nodes[t.node, t.op] = max(nodes.get((t.node, t.op), 0.0), end)
        ends = sorted(nodes.items(), key=lambda item: item[1])
        self.phases = self._phases(task)
        found = {"attention": [], "attention_combine": []}
        before = 0.0
        for (_, op), end in ends:
            if op in found and before:
                found[op].append((end - before) / 1e3)
            if op != "row_map":
                before = end
        return tuple(statistics.median(v) if v else 0.0 for v in found.values())


    def _phases(self, task: np.ndarray) -> str:
        """Mean clocks of a task from its events to its inputs, to its results, and to its signals."""
        text = []
        for kind in ("attention", "attention_combine"):
            clocks = np.array([task[t.id] for t in self.schedule.tasks.tasks if t.op == kind])
            if len(clocks) and clocks.shape[1] == 6:
                steps = np.diff(clocks[clocks[:, 2] > 0][:, [1, 2, 4, 5]], axis=1).mean(0)
                text.append("/".join(f"{x:.0f}" for x in steps))
        return " ".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["1b", "0.6b", "8b"], choices=list(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--contexts", nargs="*", type=int, default=[512, 4096, 16384, 32768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--check", action="store_true", help="compare with the reference executor (context 512)")
    parser.add_argument("--compile", action="store_true", help="compile and report resources; needs no GPU")
    args = parser.parse_args()
    keys: dict[tuple[str, int, int, int], list[int]] = {}
    for model in args.models:
        for batch in args.batches:
            for context in args.contexts:
                capacity = SHORT if context < SHORT - 200 else max(args.contexts) + 256
                keys.setdefault((model, batch, capacity, args.layers), []).append(context)
    with ProcessPoolExecutor(min(len(keys), max(1, (os.cpu_count() or 2) - 1))) as pool:
        built = dict(zip(keys, pool.map(make, keys), strict=True))
    if args.compile:
        for key, made in built.items():
            print(key, f"{made[4]:.1f} s", made[3].report)
        return
    print(torch.cuda.get_device_name(0))
    print("model batch context    step us  attention combine us     KV MB  TB/s there   added, of ceiling  bits")
    for model in args.models:
        for batch in args.batches:
            first = None
            for key, contexts in keys.items():
                if key[:2] != (model, batch):
                    continue
                graph = built[key][0]
                memory = inputs(graph, key[2])
                plain, profiled = Run(built[key], False), Run(built[key], True)
                for context in contexts:
                    row = measure(graph, memory, plain, profiled, context, args.layers, SHAPES[model], batch)
                    step, att, comb, kv, same = row
                    line = f"{model:5} {batch:5} {context:7} {step:10.1f} {att:10.2f} {comb:7.2f} {kv / 1e6:9.2f}"
                    line += f" {kv / ((att + comb) * 1e6):11.2f}"
                    if first is not None:
                        added = (kv - first[1]) * args.layers / ((step - first[0]) * 1e-6) / CEILING
                        line += f" {added:15.2f}"
                    else:
                        first, line = (step, kv), line + " " * 16
                    print(line + f"  {'same' if same else 'DIFFERENT BITS'}  {profiled.phases}", flush=True)
                if args.check and 512 in contexts:
                    check(key, graph, plain, memory)
                del memory, plain, profiled
                torch.cuda.empty_cache()


def measure(graph, memory, plain: Run, profiled: Run, context: int, layers: int, shape, batch: int):
    spans = []
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    launches = 20
    for _ in range(8):
        set_context(graph, memory, context)
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000)
        start.record()
        plain.launch(memory, launches)
        stop.record()
        torch.cuda.synchronize()
        plain.executable.check_fault()
        spans.append(start.elapsed_time(stop) / launches * 1e3)
    clocks = []
    for _ in range(9):
        set_context(graph, memory, context)
        profiled.launch(memory, 2)
        torch.cuda.synchronize()
        clocks.append(profiled.attention_us())
    kv = 2 * batch * shape["kv_heads"] * shape["size"] * 2 * (context + 1)
    results = []
    for _ in range(3):
        set_context(graph, memory, context)
        plain.launch(memory)
        torch.cuda.synchronize()
        results.append([t.clone() for t in plain.outputs.values()])
    same = all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
    att, comb = (statistics.median(c[i] for c in clocks) for i in (0, 1))
    return statistics.median(spans[1:]), att, comb, kv, same


def check(key, graph, plain: Run, memory) -> None:
    set_context(graph, memory, 512)
    theirs = {name: t.cpu() for name, t in memory.items()}
    plain.launch(memory)
    torch.cuda.synchronize()
    plain.executable.check_fault()
    wanted = Executor(lowered(key)[1])(theirs)  # expressions have an identity, which pickling loses
    for name, t in plain.outputs.items():
        a, b = t.cpu().double(), wanted[name].double()
        error = ((a - b).norm() / b.norm()).item()
        print(f"      {name}: relative difference to the reference {error:.2e}", flush=True)
    for name, t in theirs.items():
        if not torch.equal(t.isnan(), memory[name].cpu().isnan()) or t.shape and not t.is_floating_point():
            continue
        a, b = memory[name].cpu().double(), t.double()
        worst = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
        if worst > 1e-3:
            print(f"      state {name}: relative difference {worst:.2e}", flush=True)


if __name__ == "__main__":
    main()
