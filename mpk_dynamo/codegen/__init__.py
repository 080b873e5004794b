"""Schedule -> Program: one short translation unit that instantiates the task bodies, and the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import replace

from .. import abi
from ..errors import Unsupported
from ..ir.graph import Attention, ExtensionNode, Linear, Node, RowMap
from ..ir.program import Call, Program
from ..ir.schedule import Schedule
from ..ir.tasks import TaskGraph
from ..ops.attention import partial_names
from ..ops.row_map import shifts_in_place
from ..ops.structure import Structure, structure_of
from ..targets import Target
from .bodies import bodies
from .body import Body
from .geometry import flight, linear_geometry, token_slot_bytes
from .tables import References, build_tables, fixed_arguments

MAX_SLOTS = 16
"""Slots of the ring at most: past that a deeper ring measured no gain."""

THREADS = 320
"""8 consumer warps, the loader warp and the control warp."""

WIDE_BODIES = ("linear_columns", "linear_mma")
"""Bodies that want more registers than an even share, where there are several tokens."""

WIDE_THREADS, CONSUMER_REGISTERS, OTHER_REGISTERS = 384, 208, 88
"""With such bodies the warps are three whole warpgroups, two of consumers, and registers move between these
(setmaxnreg): of 65,536 each thread has 168 at launch."""

FIXED_SHARED = 3072
"""Bytes of shared memory for descriptors, barriers and alignment; the generated unit asserts that they fit."""


def generate(schedule: Schedule, target: Target, profiled: bool = False) -> Program:
    """`profiled`: with the code that records the clocks of tasks.

    Raises Unsupported when a node has no device form (the pipeline then falls back, reported)."""
    tg = schedule.tasks
    used = sorted({(t.node, t.op) for t in tg.tasks})
    most = token_slot_bytes(tg.graph)
    found = _bodies(tg, {node for node, op in used if op == "attention_combine"}, most)
    kinds: dict[tuple[str, str], int] = {}
    opcodes = {key: kinds.setdefault((found[key].call, found[key].text), len(kinds)) for key in used}
    linears = (n for n in tg.graph.nodes if isinstance(n, Linear))
    slot_bytes = max([1024, *(linear_geometry(n, tg.buffers, most).slot_bytes for n in linears)])
    references = References(schedule)
    narrow = all("using Element = float;" not in text for _, text in kinds)
    wide = any(call in WIDE_BODIES and " T = 1," not in text for call, text in kinds)
    moves = narrow and wide and "setmaxnreg" in target.features
    # Side by side, bodies for 16-bit types fit the register file, and 1 to 5 % of a step is saved; larger ones spill
    # unless each is a function.
    inline = narrow and (moves or not wide)
    chosen = [found[key] for key in used]
    source = _source(kinds, chosen, slot_bytes, target, len(references.bindings), profiled, inline, moves)
    op_of = {opcodes[key]: key[1] for key in used}
    return Program(
        schedule=schedule,
        source=source,
        kinds=tuple(f"{op_of[i]}:{i}" for i in range(len(kinds))),
        tables=build_tables(schedule, references, opcodes, found, most),
        bindings=references.bindings,
        threads=WIDE_THREADS if moves else THREADS,
        shared_bytes=target.shared_bytes_per_block,
        target=target.name,
        calls={key: _call(tg, key, opcodes[key], found[key], most) for key in used},
        flight=flight(tg.graph, most),
        profiled=profiled,
    )


def _call(tg: TaskGraph, key: tuple[int, str], opcode: int, body: Body, most: int) -> Call:
    node = tg.graph.nodes[key[0]]
    if not isinstance(node, Linear):
        return Call(opcode, body.operands, fixed_arguments(tg, key, body))
    geometry = linear_geometry(node, tg.buffers, most)
    return Call(opcode, body.operands, {}, geometry.copy_bytes, geometry.slot_rows)


def isolated(program: Program) -> dict[str, Program]:
    """Kind -> the program with that one task body: what registers it takes when it stands alone; "" -> with none. Not
    for launching."""
    case = "      case {}: return run{}(turn, position);\n"
    cases = {i: case.format(i, i) for i in range(len(program.kinds))}
    found = {}
    for i, kind in enumerate((*program.kinds, "")):
        source = program.source
        for j, text in cases.items():
            if text not in source:
                raise AssertionError(f"the dispatch has no case {j}")
            source = source if j == i else source.replace(text, "")
        found[kind] = dataclasses.replace(program, source=source)
    return found


def _bodies(tg: TaskGraph, split: set[int], most: int) -> dict[tuple[int, str], Body]:
    """By (node index, task kind). Written once per distinct structure; the nodes of other layers have the same text
    and other operands. `split`: attentions with several splits. `most`: `token_slot_bytes` of the graph."""
    found: dict[tuple[int, str], Body] = {}
    known: dict[Hashable, tuple[Structure, tuple[str, ...], dict[str, Body]]] = {}
    for index, node in enumerate(tg.graph.nodes):
        structure = structure_of(node, tg.buffers)
        extra = _partial_buffers(node, tg, index in split)
        flags = tuple(tg.buffers[name].storage in tg.flagged for name in (*structure.buffers, *extra))
        key = structure.key, index in split, flags
        if key not in known:
            if isinstance(node, RowMap) and shifts_in_place(node, tg.buffers):
                raise Unsupported("an in-place shift of a tensor has no device form yet", origin=node.origin)
            made = bodies(node, tg.buffers, split=index in split, flagged=tg.flagged, most=most)
            for body in made.values():
                if len(body.operands) > abi.MAX_OPERANDS:
                    text = f"{node.name} uses {len(body.operands)} buffers; {abi.MAX_OPERANDS} fit"
                    raise Unsupported(text, origin=node.origin)
            known[key] = structure, extra, made
        old, old_extra, made = known[key]
        names = dict(zip((*old.buffers, *old_extra), (*structure.buffers, *extra), strict=True))
        for op, body in made.items():
            found[index, op] = replace(body, operands=tuple(names[name] for name in body.operands))
    return found


def _partial_buffers(node: Node, tg: TaskGraph, split: bool) -> tuple[str, ...]:
    """Buffers that tiling added for the node, in an order that does not depend on its name."""
    if isinstance(node, ExtensionNode):
        prefix = f"{node.name}."
        return tuple(n for n in tg.buffers if n.startswith(prefix) and n not in tg.graph.buffers)
    return partial_names(node) if isinstance(node, Attention) and split else ()


def _source(
    kinds: dict[tuple[str, str], int],
    used: list[Body],
    slot_bytes: int,
    target: Target,
    bindings: int,
    profiled: bool,
    inline: bool,
    moves: bool,
) -> str:
    # the text of an operator from outside this package stands in the unit itself: it is part of the cubin's key
    sources = [s.replace("#pragma once\n", "") for s in dict.fromkeys(body.source for body in used) if s]
    structs = [f"struct Kind{i} {{\n{text}}};" for (_, text), i in kinds.items()]
    kind_of_call = "MPK_DEVICE" if inline else "__device__ __noinline__"
    runs = [
        f"{kind_of_call} u32 run{i}(u32 turn, u32 position) {{ Context<Config> c(turn, position); "
        f"{call}<Kind{i}>(c); return c.ring.at.pack(); }}"
        for (call, _), i in kinds.items()
    ]
    cases = [f"      case {i}: return run{i}(turn, position);" for i in kinds.values()]
    ahead = [
        f"    if (op == {i}) {{ Context<Config> c(turn, 0); attention_ahead<Kind{i}>(c); }}"
        for (call, _), i in kinds.items()
        if call == "attention"
    ]
    scratch = [str(max([256, *(body.scratch for body in used)]))] + [
        f"LinearShape<Kind{i}>::SCRATCH" if call == "linear" else
        f"TokenShape<Kind{i}>::SCRATCH" if call == "linear_token" else
        f"ColumnsShape<Kind{i}>::SCRATCH" if call == "linear_columns" else
        f"MmaShape<Kind{i}>::SCRATCH" if call == "linear_mma" else f"AttentionShape<Kind{i}>::SCRATCH"
        for (call, _), i in kinds.items()
        if call in ("linear", "linear_token", "linear_columns", "linear_mma", "attention")
    ]  # fmt: skip
    slot_bytes = -(-slot_bytes // 128) * 128
    return f"""// Generated by mpk_dynamo. One persistent kernel; everything else it needs is in tables.
#include "mpk/tasks/attention_combine.cuh"
#include "mpk/tasks/linear.cuh"
#include "mpk/tasks/linear_columns.cuh"
#include "mpk/tasks/linear_mma.cuh"
#include "mpk/tasks/linear_token.cuh"
#include "mpk/tasks/row_map.cuh"
{"".join(f"{chr(10)}{text}" for text in sources)}
namespace mpk {{

{chr(10).join(structs)}

struct Launch {{
  LaunchFixed fixed;
  u64 pointers[{max(bindings, 1)}];
}};
static_assert(sizeof(Launch) == {abi.LAUNCH_FIXED.dtype.itemsize + 8 * max(bindings, 1)}, "Launch");

struct Config {{
  static constexpr bool PROFILE = {str(profiled).lower()};
  static constexpr u32 SCRATCH = (largest({", ".join(scratch)}) + 127) / 128 * 128;
  static constexpr u32 SLOT_BYTES = {slot_bytes};
  static constexpr u32 CONSUMER_REGISTERS = {CONSUMER_REGISTERS if moves else 0}, OTHER_REGISTERS = {OTHER_REGISTERS};
  static constexpr u32 SHARED_BYTES = {target.shared_bytes_per_block};
  static constexpr u32 FIT = (SHARED_BYTES - {FIXED_SHARED} - SCRATCH) / (SLOT_BYTES + 16);
  static constexpr u32 SLOTS = FIT < {MAX_SLOTS} ? FIT : {MAX_SLOTS};
  static_assert(SLOTS >= 2, "the ring needs two slots");
}};
static_assert(sizeof(SharedState<Config>) <= Config::SHARED_BYTES, "shared memory");

{chr(10).join(runs)}

struct Dispatch {{
  MPK_DEVICE static u32 run(u32 op, u32 turn, u32 position) {{
    switch (op) {{
{chr(10).join(cases)}
    }}
    return position;
  }}
  MPK_DEVICE static void ahead([[maybe_unused]] u32 op, [[maybe_unused]] u32 turn) {{
{chr(10).join(ahead)}
  }}
}};

}}  // namespace mpk

extern "C" __global__ void __launch_bounds__({WIDE_THREADS if moves else THREADS}, 1)
{abi.KERNEL_NAME}(const __grid_constant__ mpk::Launch launch) {{
  mpk::megakernel<mpk::Config, mpk::Dispatch>(launch);
}}
"""
