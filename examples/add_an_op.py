"""Add an operator to the compiler with two files, and take it through every stage.

The operator is `Margin` (add_an_op/margin.py, add_an_op/margin.cuh): by how much the best logit is ahead of the second,
which says how sure a model is of its next token. It follows an output head here, so that head and margin are one kernel
and the logits stay inside. The graph is written by hand; it is fused, tiled, scheduled and verified like any other, run
by the reference executor, and compiled for a GPU, which needs none. With a GPU of that kind the kernel runs too.

    python examples/add_an_op.py [--target sm_90a] [--tokens 4]
"""

from __future__ import annotations

import argparse

import torch
from add_an_op.margin import Margin, MarginOperator

from mpk_dynamo.codegen import generate
from mpk_dynamo.errors import MpkError
from mpk_dynamo.ir import printer
from mpk_dynamo.ir.expr import acc, cast, load, var
from mpk_dynamo.ir.graph import Graph, Linear, LinearPart, Output
from mpk_dynamo.ir.program import Program
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.ops.sampling import sample_tensors
from mpk_dynamo.passes.graph import PASSES
from mpk_dynamo.passes.schedule import schedule
from mpk_dynamo.passes.tasks import choose_flagged, derive_events, tile
from mpk_dynamo.reference import Executor
from mpk_dynamo.reference.guard import check_task
from mpk_dynamo.reference.memory import allocate
from mpk_dynamo.runtime import Artifact, Executable, build
from mpk_dynamo.targets import Target, detect, known
from mpk_dynamo.verify import verify_graph, verify_program, verify_schedule, verify_tasks

HIDDEN, VOCABULARY, WORKERS = 256, 4099, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90a", help="GPU to compile for")
    parser.add_argument("--tokens", type=int, default=4, help="rows of the batch")
    arguments = parser.parse_args()

    print(f"samples    {check_samples()} of the operator's own graphs: tasks equal the oracle, accesses as declared")
    graph = head_and_margin(arguments.tokens)
    print(f"graph      {printer.print_node(graph.nodes[-1])}")
    verify_graph(graph)
    target = known(arguments.target)
    made = lower(graph, target)
    kinds = [t.op for t in made.tasks.tasks]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"tasks      {counts}; {len(made.tasks.events)} events, {made.workers} workers")

    tensors = sample_tensors(graph.nodes[0], graph)
    compare("reference", Executor(made, poison=True)(tensors), tensors)
    program = generate(made, target)
    verify_program(program, target)
    print("verified   graph, tasks, schedule, program")
    artifact = build(program, target)
    print(f"compiled   for {artifact.arch}: {artifact.resources}")
    if not torch.cuda.is_available():
        print("kernel     not launched: no CUDA device")
    elif detect(0).compute_capability != target.compute_capability:
        print(f"kernel     not launched: the device is no {target.name}")
    else:
        launch(artifact, program, target, tensors)


def head_and_margin(tokens: int) -> Graph:
    """margin[t]: of the logits hidden[t, :] . weight[n, :] over n, rounded to bf16."""
    buffers = [
        buffer("hidden", DType.BF16, (tokens, HIDDEN), BufferKind.INPUT),
        buffer("weight", DType.BF16, (VOCABULARY, HIDDEN), BufferKind.PARAM),
        buffer("logits", DType.BF16, (tokens, VOCABULARY), BufferKind.SCRATCH),
        buffer("margin", DType.F32, (tokens,), BufferKind.OUTPUT),
    ]
    t, k, n = var("t", tokens), var("k", HIDDEN), var("n", VOCABULARY)
    part = LinearPart(("weight",), VOCABULARY, cast(acc(0), DType.BF16), "logits", (t, n))
    head = Linear("lm_head", t, k, load("hidden", (t, k), DType.BF16), (part,))
    nodes = head, Margin("margin", "logits", "margin")
    return Graph(nodes, {b.name: b for b in buffers}, (Output("margin"),), ("example",))


def lower(graph: Graph, target: Target) -> Schedule:
    """Fused nodes, tasks and events, queues, each verified."""
    for graph_pass in PASSES:
        graph = graph_pass(graph)
    verify_graph(graph)
    tasks = derive_events(choose_flagged(tile(graph, WORKERS)))
    verify_tasks(tasks)
    made = schedule(tasks, WORKERS)
    verify_schedule(made, target)
    return made


def check_samples() -> int:
    """What the package's conformance test does with the operators it comes with."""
    operator = MarginOperator()
    for node, graph in operator.samples():
        verify_graph(graph)
        tasks = tile(graph, WORKERS)
        verify_tasks(derive_events(tasks))
        tensors = sample_tensors(node, graph)
        tensors["x"][0, -1] = tensors["x"][0].max()  # two are equal
        tensors["x"][-1, tensors["x"].shape[1] // 2] = float("nan")
        got, want = (allocate(tasks.buffers, tensors, poison=True) for _ in range(2))
        for task in reversed(tasks.tasks):
            check_task(node, tasks.buffers, task, got)
        operator.oracle(node, graph.buffers, want)
        if not torch.equal(got["out"].nan_to_num(-1), want["out"].nan_to_num(-1)):
            raise SystemExit(f"{node}: {got['out'].tolist()}, oracle {want['out'].tolist()}")
    return len(operator.samples())


def compare(name: str, outputs: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Print whether the margins are those of torch's logits, computed in fp32 and rounded once."""
    logits = (tensors["hidden"].float() @ tensors["weight"].float().T).bfloat16().float()
    best, second = logits.topk(2).values.unbind(1)
    off = (outputs["margin"] - (best - second)).abs()
    # sums in another order may round either logit the other way, by one unit of its last place
    close = bool((off <= (best.abs() + second.abs()) * 2**-8).all())
    verdict = "equal to torch" if not off.any() else "equal but for rounding" if close else "WRONG"
    print(f"{name:<10} margins {[round(m, 4) for m in outputs['margin'].tolist()]}: {verdict}")
    if not close:
        raise SystemExit(1)


def launch(artifact: Artifact, program: Program, target: Target, tensors: dict[str, torch.Tensor]) -> None:
    """One launch on the first CUDA device, compared like the reference."""
    given = {name: t.cuda() for name, t in tensors.items()}
    given["margin"] = torch.full((tensors["hidden"].shape[0],), torch.nan, device="cuda")
    executable = Executable(artifact, program, target, 0)
    executable.launch([given[name].data_ptr() for name in program.bindings])
    torch.cuda.synchronize()
    executable.check_fault()
    compare("kernel", given, given)


if __name__ == "__main__":
    try:
        main()
    except MpkError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
