"""The device traits of a Linear: how x is fetched and computed, and what becomes of the sums (tasks/linear*.cuh)."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import Unsupported
from ..ir.expr import Expr, Load, acc, bounds, loads, reductions, substitute
from ..ir.graph import Linear
from ..ir.types import Buffer, BufferKind, DType
from .body import TEMPLATE, Body
from .expressions import MEMORY_TYPE, REDUCERS, Emitter, Operands, aligned_loads, unconditional_loads
from .geometry import Geometry, linear_geometry


def linear_body(node: Linear, buffers: Mapping[str, Buffer], flagged: frozenset[str], most: int) -> Body:
    operands = Operands()
    weight = buffers[node.parts[0].weights[0]]
    joint = max(len(p.weights) for p in node.parts)
    if joint > 2:
        raise Unsupported(f"{joint} weights share one epilogue; the loader takes two at a time", origin=node.origin)
    for p in node.parts:
        for w in p.weights:
            if buffers[w].kind not in (BufferKind.PARAM, BufferKind.INPUT):
                # the loader runs ahead of every event
                why = f"weight {w} is written within the step; the kernel streams only what it never writes"
                raise Unsupported(why, origin=node.origin)
            inner = p.rows if node.transposed else node.k.size
            if buffers[w].strides != (inner, 1) or buffers[w].dtype is not weight.dtype:
                raise Unsupported(f"weight {w} is not a contiguous {weight.dtype.value} matrix", origin=node.origin)
    geometry = linear_geometry(node, buffers, most)
    element = MEMORY_TYPE[weight.dtype]
    lines = [
        f"  using Element = {element};",
        f"  static constexpr bool HALF = {'true' if weight.dtype is DType.F16 else 'false'};",
        f"  static constexpr int T = {node.t.size}, K = {node.k.size}, JOINT = {joint};",
    ]
    if node.transposed:
        lines += _columns(node, operands)
    elif geometry.slot_rows:
        shape = f"SLOT_ROWS = {geometry.slot_rows}, CHUNK = {geometry.chunk}, TILES = {geometry.tiles}"
        lines.append(f"  static constexpr int {shape};")
    else:
        lines.append(f"  static constexpr int COPY_BYTES = {geometry.copy_bytes}, WARPS = {geometry.warps};")
    lines += _prologue(node, buffers, flagged, operands, geometry, weight)
    counts = [len(p.weights) for p in node.parts]
    lines.append(f"  MPK_DEVICE static int joint(u32 part) {{ return {_choose([str(n) for n in counts])}; }}")
    # What the epilogue reads is loaded before the weights stream by, and held.
    cases, holds, most = [], [], 0
    for i, p in enumerate(node.parts):
        early = [
            ld
            for ld in unconditional_loads(p.epilogue)
            if ld.dtype.is_float and ld.dtype is not DType.F64 and all(bounds(e) is not None for e in ld.index)
        ]
        most = max(most, len(early))
        emitter = Emitter(buffers, operands, {node.t: "t", p.n: "n"}, flagged=flagged, origin=p.origin)
        fetched = [
            f"held[{j}] = load_bits({emitter.address(ld)});" if emitter.is_flagged(ld.buffer)
            else f"held[{j}] = __float_as_uint(load1({emitter.address(ld)}));"
            for j, ld in enumerate(early)
        ]  # fmt: skip
        holds.append(f"    if (part == {i}) {{ {' '.join(emitter.lines)} {' '.join(fetched)} }}")
        accumulators = {acc(j): f"y[{j}]" for j in range(len(p.weights))}
        known = {node.t: "t", p.n: "n", **accumulators}
        settling = Emitter(buffers, operands, known, flagged=flagged, origin=p.origin)
        for j, ld in enumerate(early):
            known[ld] = f"__uint_as_float(held[{j}])"
            if settling.is_flagged(ld.buffer):
                kind = MEMORY_TYPE[buffers[ld.buffer].dtype]
                known[ld] = f"float_of<{kind}>(settle(c, held[{j}], {settling.address(ld)}))"
        emitter = Emitter(buffers, operands, known, counter=settling.counter, flagged=flagged, origin=p.origin)
        value = emitter.emit(p.epilogue)
        store = emitter.store(p.out, p.store, value)
        cases.append(f"    if (part == {i}) {{ {' '.join((*settling.lines, *emitter.lines))} {store} return; }}")
    lines.append(f"  static constexpr int HOLD = {max(most, 1)};")
    lines.append(
        f"  {TEMPLATE} MPK_DEVICE static void hold(Ctx& c, u32 part, int t, int n, u32 (&held)[HOLD]) {{\n"
        + "\n".join(holds) + "\n  }"
    )  # fmt: skip
    lines.append(
        f"  {TEMPLATE} MPK_DEVICE static void epilogue(Ctx& c, u32 part, int t, int n, const float (&y)[{joint}], "
        "const u32 (&held)[HOLD]) {\n" + "\n".join(cases) + "\n  }"
    )
    return Body("linear", geometry.body, "\n".join(lines) + "\n", tuple(operands.names))


def _columns(node: Linear, operands: Operands) -> list[str]:
    """Members that say where transposed weights are."""
    slots = [_choose([str(operands.slot(w)) for w in p.weights], "j") for p in node.parts]
    return [
        f"  {TEMPLATE} MPK_DEVICE static const Element* weight(Ctx& c, u32 part, int j) "
        f"{{ return c.template pointer<const Element>({_choose(slots)}); }}",
        f"  MPK_DEVICE static int columns(u32 part) {{ return {_choose([str(p.rows) for p in node.parts])}; }}",
    ]


def _prologue(
    node: Linear,
    buffers: Mapping[str, Buffer],
    flagged: frozenset[str],
    operands: Operands,
    geometry: Geometry,
    weight: Buffer,
) -> list[str]:
    """Members that compute x, `width` consecutive k at a time. What they read along k is held in registers: operands
    that nothing writes (weights of norms) are loaded before the task's events have come, the rest once, right after.
    On tensor cores, what depends on the token is held apart from what all tokens share."""
    width, tensor_cores = 16 // weight.dtype.itemsize, geometry.body == "linear_mma"
    found = reductions(node.x)
    if found and node.t.size > 1 and not (tensor_cores or node.transposed):
        why = f"with several tokens the prologue of a {weight.dtype.value} linear may hold no reductions"
        raise Unsupported(why, origin=node.origin)
    for r in found:
        if r.var.size != node.k.size or not r.free <= {node.t}:
            raise Unsupported(
                f"the prologue reduces over something else than the depth: {r!r}"[:300], origin=node.origin
            )
    lines = [f"  static constexpr int REDUCTIONS = {len(found)};"]
    along_k = [substitute(r.body, {r.var: node.k}) for r in found]
    held = list(dict.fromkeys(ld for e in (*along_k, node.x) for ld in aligned_loads(e, buffers, node.k, width)))
    held = [ld for ld in held if buffers[ld.buffer].storage not in flagged or ld.dtype.itemsize * width % 16 == 0]
    packs = ["FlaggedPack" if buffers[ld.buffer].storage in flagged else "Pack" for ld in held]

    def early(ld: Load) -> bool:
        return buffers[ld.buffer].kind in (BufferKind.PARAM, BufferKind.INPUT) and not (
            tensor_cores and node.t in ld.free
        )

    # of each held load: whether it is early, and its place
    places = [("column" if early(ld) else "row") if tensor_cores else "held" for ld in held]
    fixed, moving, polled = [], [], []
    for i, ld in enumerate(held):
        emitter = Emitter(buffers, operands, {node.t: "t", node.k: "k0"}, flagged=flagged, origin=node.origin)
        address, at = emitter.address(ld, node.k), f"{places[i]}.v{i}"
        (fixed if early(ld) else moving).append(f"{{ {' '.join(emitter.lines)} {at}.load({address} + k0); }}")
        if packs[i] == "FlaggedPack":
            polled.append(f"{{ {' '.join(emitter.lines)} complete = {at}.poll({address} + k0) && complete; }}")
    poll = f"{{ bool complete = true; {' '.join(polled)} return complete; }}"

    def struct(name: str, place: str) -> str:
        members = " ".join(
            f"{packs[i]}<{MEMORY_TYPE[buffers[ld.buffer].dtype]}, {width}> v{i};"
            for i, ld in enumerate(held)
            if places[i] == place
        )
        return f"  struct {name} {{ {members} }};"

    place = "row" if tensor_cores else "held"
    plain = len(held) == 1 and node.x is held[0] and places == [place] and held[0].dtype is weight.dtype
    if tensor_cores:
        lines += [
            struct("Column", "column"),
            struct("Row", "row"),
            f"  static constexpr bool PLAIN = {'true' if plain else 'false'}, "
            f"FLAGGED = {'true' if polled else 'false'};",
            f"  {TEMPLATE} MPK_DEVICE static void load_column(Ctx& c, int k0, Column& column) {{ {' '.join(fixed)} }}",
            f"  {TEMPLATE} MPK_DEVICE static void load_row(Ctx& c, int t, int k0, Row& row) {{ {' '.join(moving)} }}",
            f"  {TEMPLATE} MPK_DEVICE static bool poll_row(Ctx& c, int t, int k0, Row& row) {poll}",
        ]
        if plain:
            return [*lines, "  MPK_DEVICE static ptx::Vec4 plain(const Row& row) { return row.v0.raw[0]; }"]
        parameters = "const Column& column, const Row& row"
    else:
        lines += [
            struct("Held", "held"),
            "  template <bool FIXED, class Ctx> MPK_DEVICE static void load(Ctx& c, int t, int k0, Held& held) {\n"
            f"    if constexpr (FIXED) {{ {' '.join(fixed)} }}\n    else {{ {' '.join(moving)} }}\n  }}",
            f"  {TEMPLATE} MPK_DEVICE static bool poll(Ctx& c, int t, int k0, Held& held) {poll}",
        ]
        if geometry.body == "linear_token":
            lines.append(f"  static constexpr bool PLAIN = {'true' if plain else 'false'};")
            if plain:
                lines.append("  MPK_DEVICE static ptx::Vec4 plain(const Held& held) { return held.v0.raw[0]; }")
        parameters = "const Held& held"
    names: dict[Expr, str] = {node.t: "t"}

    def vector(body: Expr) -> str:
        used = [i for i, ld in enumerate(held) if ld in set(loads(body))]
        arrays = " ".join(f"float a{i}[{width}]; {places[i]}.v{i}.unpack(a{i});" for i in used)
        inner = Emitter(
            buffers,
            operands,
            {**names, node.k: "k", **{held[i]: f"a{i}[i]" for i in used}},
            flagged=flagged,
            origin=node.origin,
        )
        value = inner.emit(body)
        return (
            f"{arrays}\n#pragma unroll\n    for (int i = 0; i < {width}; ++i) "
            f"{{ [[maybe_unused]] const int k = k0 + i; {' '.join(inner.lines)} out[i] = {value}; }}"
        )

    arguments = f"Ctx& c, int t, int k0, {parameters}, const float* red, float (&out)[{width}]"
    terms, combines = [], []
    for i, (r, body) in enumerate(zip(found, along_k, strict=True)):
        terms.append(f"    if constexpr (I == {i}) {{ {vector(body)} }}")
        combines.append(REDUCERS[r.name])
        names[r] = f"red[{i}]"
    if found:
        lines.append(
            f"  template <int I, class Ctx> MPK_DEVICE static void term({arguments}) {{\n" + "\n".join(terms) + "\n  }"
        )
        chain = combines[-1]
        for i in reversed(range(len(combines) - 1)):
            chain = f"Select<I == {i}, {combines[i]}, {chain}>"
        lines.append(f"  template <int I> using Combine = {chain};")
    lines.append(f"  {TEMPLATE} MPK_DEVICE static void x({arguments}) {{\n    {vector(node.x)}\n  }}")
    return lines


def _choose(values: list[str], by: str = "part") -> str:
    """The value at the index that the variable `by` holds."""
    if len(set(values)) == 1:
        return values[0]
    cases = "".join(f"{by} == {i} ? {v} : " for i, v in enumerate(values[:-1]))
    return f"({cases}{values[-1]})"
