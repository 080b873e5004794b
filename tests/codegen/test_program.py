"""Code generation of whole programs: what is shared, what is refused, and that NVRTC takes it for every target."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from functools import lru_cache

import graphs
import pytest
from device_forms import REFUSED, SAMPLES

from mpk_dynamo import abi, pipeline
from mpk_dynamo.codegen import generate, geometry, isolated
from mpk_dynamo.codegen.bodies import bodies
from mpk_dynamo.dump import Dump
from mpk_dynamo.errors import Unsupported, VerificationError
from mpk_dynamo.ir.graph import Attention, Graph, Linear, writes
from mpk_dynamo.ir.program import Program
from mpk_dynamo.ir.schedule import Schedule
from mpk_dynamo.ir.types import BufferKind, DType, buffer
from mpk_dynamo.ops import attention, linear
from mpk_dynamo.passes import graph as passes
from mpk_dynamo.report import Report
from mpk_dynamo.runtime import build
from mpk_dynamo.runtime.disassembly import describe, instructions, nvdisasm
from mpk_dynamo.targets import Target, known
from mpk_dynamo.verify import verify_program
from mpk_dynamo.verify.tables import decode

TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")
ONE = graphs.Model(layers=1)
SPLIT = graphs.Model(layers=1, capacity=300)
SEVERAL = graphs.Model(layers=1, batch=3, bias=True, qk_norm=False, mask="arithmetic")
WORKERS = 8


def lowered(graph: Graph, target: Target, workers: int = WORKERS, fuse: bool = True) -> Schedule:
    report = Report()
    with pytest.MonkeyPatch.context() as patch:
        if not fuse:
            patch.setattr(passes, "PASSES", ())
        return pipeline.lower(graph, workers, target, report, Dump("", None, report))


@lru_cache
def program(model: graphs.Model = ONE, target: str = "sm_90a") -> Program:
    return generate(lowered(graphs.decoder(model), known(target)), known(target))


def of_sample(name: str, graph: Graph | None = None, arch: str = "sm_90a") -> Program:
    target = known(arch)
    return generate(lowered(graph or SAMPLES[name][1], target, fuse=False), target)


USUAL_TARGETS = ("sm_80", "sm_90a")


@pytest.mark.parametrize(
    "name", [n if n in USUAL_TARGETS else pytest.param(n, marks=pytest.mark.slow) for n in TARGETS]
)
def test_nvrtc_compiles_a_decoder_step(name: str) -> None:
    made, target = program(SPLIT, name), known(name)
    verify_program(made, target)
    assert any(kind.startswith("attention_combine") for kind in made.kinds)
    artifact = build(made, target, cache=False)
    assert artifact.cubin[:4] == b"\x7fELF" and artifact.arch == name


def test_nvrtc_compiles_several_tokens() -> None:
    """Tensor cores, biases, the mask made in the graph."""
    assert "linear_mma<" in program(SEVERAL).source
    build(program(SEVERAL), known("sm_90a"), cache=False)


REAL = {
    "7b-16": graphs.Model(1, 16, 3584, 28, 4, 128, 18944, capacity=1024),
    "1b-16": graphs.Model(1, 16, 2048, 32, 8, 64, 8192, capacity=1024),
    "8b-1": graphs.Model(1, 1, 4096, 32, 8, 128, 12288, capacity=1024),
    "heads-of-256-8": graphs.Model(1, 8, 2048, 16, 8, 256, 8192, capacity=1024),
}


@pytest.mark.parametrize("name", ["7b-16", *(pytest.param(n, marks=pytest.mark.slow) for n in list(REAL)[1:])])
def test_nothing_spills_at_real_sizes(name: str) -> None:
    target = known("h200")
    made = generate(lowered(graphs.decoder(REAL[name]), target, target.sm_count), target)
    resources = build(made, target, cache=False).report
    assert (resources.spill_store_bytes, resources.spill_load_bytes) == (0, 0), resources


@pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm here: Triton or the CUDA toolkit brings it")
def test_instructions_of_bodies() -> None:
    """Tensor cores for several tokens and not for one, whole vectors of weights, bulk copies in no body."""
    kinds = {}
    for model in (ONE, SEVERAL):
        made, target = program(model), known("sm_90a")
        alone = {kind: instructions(build(p, target, cache=False).cubin) for kind, p in isolated(made).items()}
        assert any(opcode.startswith("UBLKCP") for opcode in alone[""])
        for kind, found in alone.items():
            found.subtract(alone[""])
            assert "x UBLKCP" not in describe(found)
            kinds.setdefault(kind.split(":")[0], []).append((model is SEVERAL, describe(found)))
    mma = "HMMA.16816.F32.BF16"
    assert {(several, mma in text) for several, text in kinds["linear"]} == {(False, False), (True, True)}
    assert all(mma in text and "x 128 bit" in text for _, text in kinds["attention"])
    assert describe(Counter({"LDG.E.128": 2, "LDG.E.U16": 1, "LDS": 3, "FADD": 4})) == (
        "0.2 KiB of code; global loads 2 x 128 bit, 1 x 16 bit; shared loads 3 x 32 bit"
    )


def test_code_does_not_grow_with_depth() -> None:
    shallow, deep = (program(graphs.Model(layers=n)) for n in (2, 9))
    assert len(deep.kinds) == len(shallow.kinds)
    bindings = re.compile(r"pointers\[\d+\]|sizeof\(Launch\) == \d+")  # the launch parameter does
    assert bindings.sub("", deep.source) == bindings.sub("", shallow.source)
    assert len(deep.schedule.tasks.tasks) > 3 * len(shallow.schedule.tasks.tasks)


def test_two_builds_are_identical() -> None:
    again = generate(lowered(graphs.decoder(ONE), known("sm_90a")), known("sm_90a"))
    first = program()
    assert again.source == first.source and again.tables == first.tables and again.bindings == first.bindings


def test_names_of_buffers_are_not_in_the_code() -> None:
    """Nor addresses: layers, models and processes with equal shapes share a cubin."""
    made = program()
    names = [n for n in made.schedule.tasks.buffers if "." in n or "_" in n]
    assert len(names) > 10 and not [n for n in names if n in made.source]
    assert not re.search(r"0x[0-9a-f]{9,}|\b\d{12,}\b", made.source)


def test_code_depends_on_shapes_not_on_workers() -> None:
    target = known("sm_90a")
    few, many = (generate(lowered(graphs.decoder(ONE), target, workers), target) for workers in (4, 16))
    assert few.source == many.source


def test_tables_say_what_the_schedule_says() -> None:
    made = program()
    schedule, tables = made.schedule, decode(made)
    assert len(tables["queues"]) == schedule.workers and set(tables) == {name for name, _ in abi.TABLES}
    ids = tables["tasks"]["id"].tolist()
    for queue, row in zip(schedule.queues, tables["queues"], strict=True):
        assert tuple(ids[row["task"] : row["task"] + row["task_count"]]) == queue
    tasks = schedule.tasks.tasks
    for row in tables["tasks"]:
        assert made.kinds[row["op"]].split(":")[0] == tasks[row["id"]].op
        if tasks[row["id"]].op != "linear":
            assert tuple(row["arg"][: len(tasks[row["id"]].tile)]) == tasks[row["id"]].tile
    slots = {schedule.slots[e.id]: len(e.producers) for e in schedule.tasks.events}
    assert all(slots[w["slot"]] == w["count"] for w in tables["waits"])
    assert sum(slots.values()) == len(tables["signals"])


def test_the_loader_streams_each_weight_once() -> None:
    """Rows of all runs, by the weight they belong to: every row exactly once."""
    made = program()
    buffers, seen = made.schedule.tasks.buffers, {}
    for run in decode(made)["runs"]:
        for base in (run["base0"], run["base1"]):
            if int(base) == abi.NO_REF:
                continue
            name, offset = made.bindings[int(base) >> 40], int(base) & ((1 << 40) - 1)
            first, rest = divmod(offset, int(run["row_bytes"]))
            assert rest == 0 and buffers[name].shape[1] * 2 == run["row_bytes"]
            assert run["row_bytes"] % run["copy"] == 0 or run["copy"] % run["row_bytes"] == 0 or run["tiled"]
            seen.setdefault(name, []).extend(range(first, first + int(run["rows"])))
    weights = {w for n in made.schedule.tasks.graph.nodes if isinstance(n, Linear) for p in n.parts for w in p.weights}
    assert set(seen) == weights
    assert all(sorted(rows) == list(range(buffers[name].shape[0])) for name, rows in seen.items())


def test_every_writer_has_its_buffers_among_the_operands() -> None:
    made = program()
    tables, graph = decode(made), made.schedule.tasks.graph
    for row in tables["tasks"]:
        refs = tables["operands"]["ref"][row["operands"] : row["operands"] + row["operand_count"]]
        task = made.schedule.tasks.tasks[row["id"]]
        if task.op == "attention" and any(t.op == "attention_combine" for t in made.schedule.tasks.tasks):
            continue  # its result goes to partial results
        for name in writes(graph.nodes[task.node]):
            storage = made.schedule.tasks.buffers[name].storage
            if storage in made.bindings and task.op != "attention_combine":
                assert made.bindings.index(storage) << 40 in [int(r) for r in refs], name


def test_transposed_weights_are_operands_cut_at_vectors_and_have_no_runs() -> None:
    made = of_sample("linear-18-transposed")
    verify_program(made, known("sm_90a"))
    tables, (node,) = decode(made), made.schedule.tasks.graph.nodes
    assert len(tables["runs"]) == 0
    seen: dict[int, list[int]] = {}
    for part, row, rows in zip(*(tables["segments"][f].tolist() for f in ("part", "row", "rows")), strict=True):
        assert row * 2 % 16 == rows * 2 % 16 == 0
        seen.setdefault(part, []).extend(range(row, row + rows))
    assert {k: sorted(v) for k, v in seen.items()} == {k: list(range(p.rows)) for k, p in enumerate(node.parts)}
    assert {w for p in node.parts for w in p.weights} <= set(made.calls[0, "linear"].operands)


def test_wide_bodies_get_registers_or_are_functions() -> None:
    """Several tokens in 16-bit types: consumers get registers where the target can, else bodies are functions."""
    found = {}
    for name, (node, _) in SAMPLES.items():
        if isinstance(node, Linear) and node.parts[0].weights and node.x.dtype is not DType.F32:
            for target in ("sm_90a", "sm_80"):
                made = of_sample(name, arch=target)
                moved = "CONSUMER_REGISTERS = 0," not in made.source
                assert (
                    made.threads == (384 if moved else 320) and f"__launch_bounds__({made.threads}, 1)" in made.source
                )
                found.setdefault((node.t.size > 1, target), set()).add((moved, "__noinline__" in made.source))
    assert found == {
        (False, "sm_90a"): {(False, False)}, (False, "sm_80"): {(False, False)},
        (True, "sm_90a"): {(True, False)}, (True, "sm_80"): {(False, True)},
    }  # fmt: skip


def test_segments_of_transposed_weights_are_verified() -> None:
    made = of_sample("linear-18-transposed")
    segments = decode(made)["segments"].copy()
    segments["row"][0] += 8
    broken = dataclasses.replace(made, tables={**made.tables, "segments": segments.tobytes()})
    with pytest.raises(VerificationError, match="P[13]"):
        verify_program(broken, known("sm_90a"))
    _, uneven = linear._transposed(DType.BF16, 1, 64, (12,))
    with pytest.raises(VerificationError, match="P3.*no whole 16-byte vectors"):
        verify_program(of_sample("", uneven), known("sm_90a"))


# --- refusals ---


@pytest.mark.parametrize("name", list(SAMPLES))
def test_samples_have_a_device_form_or_are_known_not_to(name: str) -> None:
    if name not in REFUSED:
        verify_program(of_sample(name), known("sm_90a"))
        return
    with pytest.raises(Unsupported, match=REFUSED[name]):
        of_sample(name)


@pytest.mark.parametrize(
    ("tokens", "depths", "slots", "flight"),
    [
        (1, (2048, 8192), (16384, 16384), 4),
        (1, (2048, 6144), (16384, 12288), 5),
        (1, (4096, 12288), (16384, 24576), 3),  # rows of 24 KiB make all slots so large
        (1, (2560, 9728), (20480, 19456), 3),
        (8, (2048, 8192), (32768, 32768), 2),  # of the longer rows a piece of 2048 columns at a time
        (8, (1024, 3072), (16384, 24576), 3),  # two pieces of one length
        (8, (2560, 9728), (20480, 32768), 2),  # whole; four pieces and a shorter one
    ],
)
def test_slots_and_how_many_are_under_way(
    tokens: int, depths: tuple[int, ...], slots: tuple[int, ...], flight: int
) -> None:
    """Sizes of slots by depth of the Linears, and about 64 KiB in flight."""
    g = graphs.Builder()
    made = []
    for i, depth in enumerate(depths):
        x = g.caller(f"x{i}", (tokens, depth), DType.BF16, BufferKind.INPUT)
        made.append(g.linear(x, g.caller(f"w{i}", (1024, depth), DType.BF16)))
    graph = g.graph(*made)
    most = geometry.token_slot_bytes(graph)
    assert tuple(geometry.linear_geometry(n, graph.buffers, most).slot_bytes for n in graph.nodes) == slots
    assert geometry.flight(graph, most) == flight


def first_linear(graph: Graph) -> Linear:
    return next(n for n in graph.nodes if isinstance(n, Linear))


def test_a_weight_that_is_not_contiguous() -> None:
    _, graph = SAMPLES["linear-0-plain"]
    node = first_linear(graph)
    (name,) = node.parts[0].weights
    old = graph.buffers[name]
    strided = buffer(name, old.dtype, old.shape, BufferKind.PARAM, strides=(old.shape[1] * 2, 1))
    with pytest.raises(Unsupported, match="is not a contiguous bf16 matrix"):
        of_sample("", dataclasses.replace(graph, buffers={**graph.buffers, name: strided}))


@pytest.mark.parametrize(
    ("dtype", "depth", "fits"), [(DType.BF16, 60, False), (DType.BF16, 64, True), (DType.F32, 60, True)]
)
def test_rows_must_be_whole_vectors(dtype: DType, depth: int, fits: bool) -> None:
    _, graph = linear._plain(dtype, 1, depth, 24)
    if fits:
        of_sample("", graph)
        return
    with pytest.raises(Unsupported, match="60 bf16 elements is not a multiple of 16 bytes"):
        of_sample("", graph)


@pytest.mark.parametrize(("size", "fits"), [(256, True), (264, False), (20, False)])
def test_head_sizes(size: int, fits: bool) -> None:
    node, graph = attention._sample(DType.BF16, 1, 1, 2, 16, size, append=True)
    assert isinstance(node, Attention)
    if fits:
        of_sample("", graph)
        return
    with pytest.raises(Unsupported, match=f"head size {size}"):
        of_sample("", graph)


def test_more_buffers_than_a_launch_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "MAX_BINDINGS", 5)
    with pytest.raises(Unsupported, match="one launch carries 5 pointers"):
        generate(lowered(graphs.decoder(ONE), known("sm_90a")), known("sm_90a"))


def test_a_body_by_itself_is_the_same_unit_with_one_case() -> None:
    made = program()
    alone = isolated(made)
    assert list(alone) == [*made.kinds, ""]
    assert not re.findall(r"      case (\d+): return run", alone[""].source)
    for i, kind in enumerate(made.kinds):
        left = re.findall(r"      case (\d+): return run", alone[kind].source)
        assert left == [str(i)]


def test_a_weight_that_the_step_writes_is_refused() -> None:
    graph = graphs.decoder(ONE)
    node = next(n for n in graph.nodes if isinstance(n, Linear))
    name = node.parts[0].weights[0]
    written = dataclasses.replace(graph.buffers[name], kind=BufferKind.STATE)
    with pytest.raises(Unsupported, match="written within the step"):
        bodies(node, {**graph.buffers, name: written})


def test_more_joint_weights_than_the_loader_takes_are_refused() -> None:
    graph = graphs.decoder(ONE)
    node = next(n for n in graph.nodes if isinstance(n, Linear))
    part = node.parts[0]
    three = dataclasses.replace(node, parts=(dataclasses.replace(part, weights=part.weights[:1] * 3),))
    with pytest.raises(Unsupported, match="share one epilogue"):
        bodies(three, graph.buffers)
