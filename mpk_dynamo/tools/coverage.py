"""Which model families run, and how well: decode steps of tiny models (families.py) through the backend, measured.

Each model decodes `STEPS` tokens after a prompt, with a static cache, the way `generate()` does: inputs from the
model's own `prepare_inputs_for_generation`, the first sequence of a batch padded. The tokens are those that eager
chooses, so that all runs see the same input. Results are compared with an fp32 copy of the model, whose distance to
eager in bf16 is what is allowed. Each program is generated for a GPU as well, which needs none.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..backend import mpk
from ..dump import Dump
from ..errors import Unsupported
from ..ir.expr import loads, reductions
from ..ir.graph import Graph, Linear, RowMap, expressions
from ..pipeline import capture_graph, emit, lower
from ..report import Report, reports
from ..specialize import changes_per_call, fix_numbers, has_symbols
from ..split import split
from .accuracy import ERROR_MARGIN, FACTOR
from .families import FAMILIES, PARTIAL, build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..capture import Captured
    from ..targets import Target

PROMPT, STEPS = 8, 8
"""With the windows of families.py: the window fills, is full, and moves."""

CLOSE = 0.02
"""Two tokens are as good as tied when their logits differ by at most this share of the greatest one."""


@dataclass
class ProgramCoverage:
    """One graph that Dynamo handed out. reason: why it was not captured, or "". device: why it has no device form,
    or "". programs: pieces of it that became programs. calls: of all steps. weights, reduced: bytes of parameters that
    they read, and of those that a plain reduction reads instead of a Linear. per_layer: nodes of the last layer."""

    report: Report
    programs: int = 1
    reason: str = ""
    device: str = ""
    calls: int = 0
    weights: int = 0
    reduced: int = 0
    per_layer: int = 0


@dataclass
class Coverage:
    """One family at one batch size. error, eager_error: relative error of all logits against fp32. same_tokens: share
    of equal greedy tokens; differing: of tokens that differ without being as good as tied. failure: an exception."""

    family: str
    batch: int
    programs: list[ProgramCoverage] = field(default_factory=list)
    weights_total: int = 0
    error: float = float("nan")
    eager_error: float = float("nan")
    same_tokens: float = 0.0
    differing: float = 0.0
    failure: str = ""

    @property
    def captured(self) -> list[ProgramCoverage]:
        return [p for p in self.programs if not p.reason]

    @property
    def captured_nodes(self) -> float:
        """Share of the nodes of Dynamo's graphs that are in captured ones."""
        total = sum(p.report.fx_nodes for p in self.programs)
        return sum(p.report.fx_nodes - p.report.outside for p in self.captured) / total if total else 0.0

    @property
    def weights(self) -> float:
        """Share of the bytes of all parameters that the task programs read, at the least of all steps."""
        return min((p.weights for p in self.programs), default=0) / self.weights_total if self.weights_total else 0.0

    @property
    def launches(self) -> float:
        """Calls of task programs per token: launches of a kernel, on a GPU."""
        return sum(p.calls * p.programs for p in self.captured) / max(sum(p.calls for p in self.programs), 1)

    @property
    def accurate(self) -> bool:
        return self.error <= FACTOR * self.eager_error + ERROR_MARGIN and self.differing == 0.0

    def notes(self) -> list[str]:
        """What falls short, and why; empty when all is well."""
        out = [self.failure] if self.failure else []
        out += [f"falls back: {p.reason}" for p in self.programs if p.reason]
        for p in self.captured:
            if p.report.left_out:
                reasons = ", ".join(f"{why} ({n})" for why, n in p.report.left_out.items())
                out.append(f"{p.calls} of {STEPS} steps run in pieces, without {p.report.outside} nodes: {reasons}")
            if p.device:
                out.append(f"{p.calls} of {STEPS} steps have no device form: {p.device}")
        if self.captured and self.captured[0].reduced:
            share = self.captured[0].reduced / self.weights_total
            out.append(f"{share:.0%} of the weight bytes are read by plain reductions, not streamed")
        if not self.failure and not self.accurate:
            out.append(f"inaccurate: {self.differing:.0%} of the tokens differ without a tie")
        return list(dict.fromkeys(out))


def measure(
    family: str,
    batch: int,
    *,
    target: "Target",
    steps: int = STEPS,
    device: str = "cpu",
    published: bool = False,
    **changes: Any,
) -> Coverage:
    """Decode `steps` tokens of a family's model, tiny or with published widths. `changes` are of its configuration;
    `target` is what programs are generated for. An exception becomes `failure`."""
    found = Coverage(family, batch)
    torch._dynamo.reset()
    try:
        _measure(build(family, published=published, device=device, **changes), found, target, steps)
    except Exception as error:  # a row of the table that says so: the others are of interest too
        found.failure = " ".join(f"{type(error).__name__}: {error}".split("\n")[:3])[:300]
    finally:
        torch._dynamo.reset()
    return found


def _measure(model: "PreTrainedModel", found: Coverage, target: "Target", steps: int) -> None:
    parameters = {p.data_ptr(): p for p in model.parameters()}
    found.weights_total = sum(p.numel() * p.element_size() for p in parameters.values())
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (found.batch, PROMPT), generator=generator).to(model.device)
    eager, ids = decode(model, model.forward, prompt, steps)
    wide = copy.deepcopy(model).float()
    exact, _ = decode(wide, wide.forward, ids, steps, forced=True)
    del wide
    compiled = torch.compile(model.forward, backend=_inspecting(found, target))
    ours, _ = decode(model, compiled, ids, steps, forced=True)
    found.error, found.eager_error = (((x - exact).norm() / exact.norm()).item() for x in (ours, eager))
    mine, theirs = ours.argmax(-1, keepdim=True), eager.argmax(-1, keepdim=True)
    gap = (eager.gather(-1, theirs) - eager.gather(-1, mine)) / eager.abs().amax(-1, keepdim=True)
    found.same_tokens = (mine == theirs).float().mean().item()
    found.differing = (gap > CLOSE).float().mean().item()


def decode(
    model: "PreTrainedModel", forward: Callable[..., Any], ids: torch.Tensor, steps: int, forced: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [steps, B, vocabulary] in fp32 of the steps after a prompt ids[:, :PROMPT], and all token ids. The tokens
    are the greedy ones, or those of `ids` [B, PROMPT + steps] when forced."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 8)
    mask = torch.ones((ids.shape[0], PROMPT + steps), dtype=torch.int64, device=ids.device)
    if ids.shape[0] > 1:
        mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = []
    with torch.no_grad():
        for i in range(PROMPT - 1, PROMPT + steps):
            new = PROMPT if i == PROMPT - 1 else 1
            inputs = model.prepare_inputs_for_generation(
                ids[:, : i + 1],
                next_sequence_length=new,
                past_key_values=cache,
                attention_mask=mask[:, : i + 1],
                position_ids=positions[:, i + 1 - new : i + 1],
                use_cache=True,
                is_first_iteration=new > 1,
            )
            logits = (model.forward if new > 1 else forward)(**inputs).logits[:, -1].float()
            if new == 1:
                out.append(logits)
            if not forced:
                ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return torch.stack(out), ids[:, : PROMPT + steps]


def _inspecting(found: Coverage, target: "Target") -> Callable[..., Any]:
    """The backend, which also keeps what it did with each graph."""

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        compiled = mpk(gm, example_inputs, options={"fallback": "eager"})
        program = ProgramCoverage(reports()[-1])
        found.programs.append(program)
        report = program.report
        program.reason = f"{report.reason} at {report.origin}" if report.reason else ""
        if not program.reason:
            _inspect(gm, example_inputs, program, target)

        def call(*args: Any) -> Any:
            program.calls += 1
            return compiled(*args)

        return call

    return backend


def _inspect(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], program: ProgramCoverage, target: "Target"
) -> None:
    report = Report()
    weights: dict[int, int] = {}
    reduced: dict[int, int] = {}
    layers: Counter[int] = Counter()
    programs = _programs(gm, example_inputs, report)
    for captured, inputs in programs:
        schedule = lower(captured.graph, target.sm_count, target, report, Dump("", gm, report))
        try:
            emit(schedule, target, report, Dump("", gm, report))
        except Unsupported as why:
            program.device = f"{why.message} at {why.origin}" if why.origin else why.message
        graph = schedule.tasks.graph
        given = {storage: inputs[k] for storage, k in captured.arguments.items()}
        sizes = {n: x.numel() * x.element_size() for n, x in given.items() if isinstance(x, torch.nn.Parameter)}
        weights.update({given[name].data_ptr(): size for name, size in sizes.items()})
        reduced.update({given[n].data_ptr(): sizes[n] for n in _reduced_matrices(graph) if n in sizes})
        layers.update(_nodes_of_layers(graph))
    program.programs = len(programs)
    program.weights, program.reduced = sum(weights.values()), sum(reduced.values())
    program.per_layer = layers[max(layers)] if layers else 0


def _programs(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], report: Report
) -> "list[tuple[Captured, Sequence[Any]]]":
    """What becomes programs of a graph, each with its inputs; those that another piece makes are None."""
    dump = Dump("", gm, report)
    symbols = has_symbols(gm, example_inputs) and changes_per_call(gm, example_inputs)
    if not symbols:
        try:
            return [(capture_graph(gm, example_inputs, report, dump), example_inputs)]
        except Unsupported:
            gm, example_inputs, _, _ = fix_numbers(gm, example_inputs)
    made = split(gm, example_inputs, report, dump, symbols=symbols)
    given = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), example_inputs))
    return [(p.captured, [given.get(n) for n in p.part.inputs]) for p in made.pieces if p.captured is not None]


def _reduced_matrices(graph: Graph) -> set[str]:
    """Storages of matrices that a RowMap reduces over and no Linear streams."""
    streamed = {w for n in graph.nodes if isinstance(n, Linear) for p in n.parts for w in p.weights}
    reduced = {
        load.buffer
        for n in graph.nodes
        if isinstance(n, RowMap)
        for e in expressions(n)
        for r in reductions(e)
        for load in loads(r)
        if len(graph.buffers[load.buffer].shape) == 2
    }
    return {graph.buffers[name].storage for name in reduced - streamed}


def _nodes_of_layers(graph: Graph) -> Counter[int]:
    numbers = [re.search(r"\.(\d+)(?:\.|$)", n.origin) for n in graph.nodes]
    return Counter(int(m[1]) for m in numbers if m)


# --- the table ---

HEADER = (
    "family", "batch", "nodes captured", "weights in programs", "launches per token", "programs", "nodes per layer",
    "device form", "same tokens", "error", "eager's error", "passes",
)  # fmt: skip


def cells(c: Coverage) -> tuple[str, ...]:
    """The row of a family, one text per column of HEADER."""
    lacking = [p for p in c.captured if p.device]
    forms = "no" if len(lacking) == len(c.captured) else f"{len(c.captured) - len(lacking)} of {len(c.captured)}"
    return (
        c.family, str(c.batch), f"{c.captured_nodes:.0%}", f"{c.weights:.0%}", f"{c.launches:.3g}",
        str(len(c.programs)), str(max((p.per_layer for p in c.captured), default=0)),
        "yes" if c.captured and not lacking else forms, f"{c.same_tokens:.0%}", f"{c.error:.2%}",
        f"{c.eager_error:.2%}", "yes" if c.accurate and not c.failure else "NO",
    )  # fmt: skip


def table(rows: Iterable[Coverage], markdown: bool = False) -> str:
    """All rows as text, or as Markdown with the notes under the table."""
    rows = list(rows)
    lines = [HEADER, *map(cells, rows)]
    notes = [(c.family, c.batch, note) for c in rows for note in c.notes()]
    merged: dict[tuple[str, str], list[int]] = {}
    for family, batch, note in notes:
        merged.setdefault((family, note), []).append(batch)
    said = [f"{family}, batch {', '.join(map(str, b))}: {note}" for (family, note), b in merged.items()]
    if markdown:
        text = ["| " + " | ".join(line) + " |" for line in lines]
        text.insert(1, "|" + "---|" * len(HEADER))
        return "\n".join([*text, "", "## What falls short", "", *(f"- {s}" for s in said or ["nothing"])]) + "\n"
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*text, *said]) + "\n"


def run(arguments: Any) -> int:
    """The command. Exit status 1 when a row is inaccurate or failed."""
    families = arguments.family or [*FAMILIES, *([] if arguments.published else PARTIAL)]
    found: dict[tuple[str, int], Coverage] = {}
    workers = arguments.jobs or max(1, (os.cpu_count() or 1) // 2)
    # one process imports torch once for all sizes; with CPUs to spare, sizes are measured beside each other
    sizes = [[b] for b in arguments.batch] if workers > len(families) else [arguments.batch]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_measured_apart, family, each, arguments) for family in families for each in sizes]
        for job in as_completed(jobs):
            for c in job.result():
                found[c.family, c.batch] = c
                print(" ".join(cells(c)), *c.notes(), sep="\n  ", file=sys.stderr, flush=True)
    rows = [found[family, batch] for family in families for batch in arguments.batch]
    print(_preface(arguments) + table(rows, markdown=True) if arguments.markdown else table(rows), end="")
    return 0 if all(c.accurate and not c.failure for c in rows) else 1


def _measured_apart(family: str, batches: Sequence[int], arguments: Any) -> list[Coverage]:
    """A family's rows, from processes of their own: what kills one, or breaks its CUDA context, costs one row."""
    out: list[Coverage] = []
    while left := batches[len(out) :]:
        words = [sys.executable, "-W", "ignore", "-m", __name__, family, *map(str, left)]
        words += ["--target", arguments.target, "--device", arguments.device]
        words += ["--published"] if arguments.published else []
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=arguments.timeout)
            said, errors, end = done.stdout, done.stderr, f"exit status {done.returncode}"
        except subprocess.TimeoutExpired as late:
            said, errors = ((x or b"").decode(errors="replace") for x in (late.stdout, late.stderr))
            end = f"not done after {arguments.timeout} s"
        rows = [_restored(json.loads(line)) for line in said.splitlines() if line.startswith("{")]
        out += rows
        if not rows:
            last = (errors.strip().splitlines() or [""])[-1]
            out.append(Coverage(family, left[0], failure=f"{end}: {last}"[:300]))
    return out


def _restored(row: dict[str, Any]) -> Coverage:
    programs = [ProgramCoverage(**{**p, "report": Report(**p["report"])}) for p in row.pop("programs")]
    return Coverage(**row, programs=programs)


def _child(words: list[str] | None = None) -> None:
    """Measure the batch sizes of one family, a line of JSON for each, until one fails."""
    import argparse
    import logging

    from ..targets import known

    parser = argparse.ArgumentParser()
    parser.add_argument("family")
    parser.add_argument("batch", type=int, nargs="+")
    parser.add_argument("--target")
    parser.add_argument("--device")
    parser.add_argument("--published", action="store_true")
    a = parser.parse_args(words)
    logging.getLogger("mpk_dynamo").setLevel(logging.ERROR)  # what falls back is in the table
    if a.device == "cpu":
        torch.set_num_threads(1)
    for batch in a.batch:
        row = measure(a.family, batch, target=known(a.target), device=a.device, published=a.published)
        print(json.dumps(dataclasses.asdict(row)), flush=True)
        if row.failure:
            break


def _preface(arguments: Any) -> str:
    import datetime

    import transformers

    words = ["python -m mpk_dynamo coverage", *(["--family", *arguments.family] if arguments.family else [])]
    words += ["--batch", *map(str, arguments.batch), *(["--published"] if arguments.published else [])]
    words += ["--markdown", *(["--device", arguments.device] if arguments.device != "cpu" else [])]
    if arguments.device == "cpu":
        where = f"the reference executor (CPU); device forms are generated for {arguments.target}, not run"
    else:
        where = f"{torch.cuda.get_device_name()}, by the kernel"
    size = "widths of a published checkpoint and two layers" if arguments.published else "tiny widths"
    return f"""# Model families

Generated on {datetime.date.today()} by `{" ".join(words)}` with torch {torch.__version__}, transformers
{transformers.__version__}, on {where}.

Each family is a model of random weights with the structure of its published checkpoints and {size}
(`mpk_dynamo/tools/families.py`), in bf16, decoding {STEPS} tokens after a prompt of {PROMPT} with a static cache. A
result passes when its relative error against fp32 is at most {FACTOR} times that of eager bf16 plus {ERROR_MARGIN:g},
and greedy tokens differ from eager's only where two are as good as tied. *Nodes captured*: of Dynamo's graph.
*Weights in programs*: bytes of parameters that task programs read. *Programs*: graphs that Dynamo made on the way; a
model with sliding windows has three, as the window fills and moves. *Device form*: code generation accepts the program.

"""


if __name__ == "__main__":
    _child()
