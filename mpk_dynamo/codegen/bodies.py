"""The device traits of a node as C++ text. Nodes of different layers with equal text share one task body."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import Unsupported
from ..ir.expr import Expr, Load, Var, acc, bounds, cast, linear_terms, loads, reductions, substitute
from ..ir.graph import Attention, ExtensionNode, Linear, Node, RowMap
from ..ir.types import Buffer, BufferKind, DType
from ..ops import operator_of
from ..ops.attention import MIN_KEYS
from ..ops.row_map import row_dims
from .expressions import (
    MEMORY_TYPE,
    REDUCERS,
    Emitter,
    Operands,
    aligned_loads,
    row_function,
    split_index,
    unconditional_loads,
)  # fmt: skip
from .geometry import SLOT_BYTES, Geometry, linear_geometry

TEMPLATE = "template <class Ctx>"


@dataclass(frozen=True)
class Body:
    """text: members of the traits struct. call: device function that takes it. operands: buffer names by slot.
    source: definition of `call` where it is no file of kernels_cuda; scratch: its bytes of shared memory."""

    op: str
    call: str
    text: str
    operands: tuple[str, ...]
    source: str = ""
    scratch: int = 0


def bodies(
    node: Node,
    buffers: Mapping[str, Buffer],
    *,
    split: bool = False,
    flagged: frozenset[str] = frozenset(),
    most: int = SLOT_BYTES,
) -> dict[str, Body]:
    """Task kind -> Body of a node. `split`: the attention's keys are cut, so it also combines. `flagged`: storages
    whose elements are their own flags. `most`: as for `linear_geometry`."""
    if isinstance(node, ExtensionNode):
        return _extension(node, buffers)
    if isinstance(node, RowMap):
        return {"row_map": _row_map(node, buffers, flagged)}
    if isinstance(node, Linear):
        return {"linear": _linear(node, buffers, flagged, most)}
    found = {"attention": _attention(node, buffers, split, flagged)}
    if split:
        found["attention_combine"] = _combine(node, buffers, flagged)
    return found


def _extension(node: ExtensionNode, buffers: Mapping[str, Buffer]) -> dict[str, Body]:
    """As its operator says. The verifier has shown that none of its buffers is flagged."""
    operator = operator_of(node)
    forms = getattr(operator, "device_forms", None)
    if forms is None:
        raise Unsupported(f"operator {operator.name!r} has no device form", origin=node.origin)
    return {
        kind: Body(kind, f.call, f"  {f.traits}\n", f.operands, f.source, f.scratch)
        for kind, f in forms(node, buffers).items()
    }


def _row_map(node: RowMap, buffers: Mapping[str, Buffer], flagged: frozenset[str]) -> Body:
    operands = Operands()
    rows = row_dims(node)
    if not reductions(node.body):
        flat = split_index("e", node.dims)
        emitter = Emitter(buffers, operands, {v: n for v, (n, _) in flat.items()}, flagged=flagged, origin=node.origin)
        value = emitter.emit(node.body)
        store = emitter.store(node.out, node.store, value)
        decode = " ".join(f"const int {n} = {text};" for n, text in flat.values())
        lines = "\n    ".join([decode, *emitter.lines, store])
        text = (
            f"  static constexpr int ROW_THREADS = 0;\n"
            f"  {TEMPLATE} MPK_DEVICE static void element(Ctx& c, int e) {{\n    {lines}\n  }}\n"
        )
        return Body("row_map", "row_map", text, tuple(operands.names))
    outer, inner = node.dims[:rows], node.dims[rows:]
    flat = split_index("row", outer)
    longest = max(r.var.size for r in reductions(node.body))
    threads = 32 if longest <= 512 else 256
    function = row_function(
        "row",
        tuple((n, v) for v, (n, _) in flat.items()),
        inner,
        node.body,
        lambda names: Emitter(buffers, operands, names, flagged=flagged, origin=node.origin),
        lambda emitter, value: emitter.store(node.out, node.store, value),
        threads,
    )
    decode = " ".join(f"const int {n} = {text};" for n, text in flat.values())
    text = (
        f"  static constexpr int ROW_THREADS = {threads};\n"
        f"  template <class Ctx, class G> MPK_DEVICE static void row(Ctx& c, const G& g, int row) {{\n"
        f"    {decode}\n    {function}\n  }}\n"
    )
    return Body("row_map", "row_map", text, tuple(operands.names))


def _linear(node: Linear, buffers: Mapping[str, Buffer], flagged: frozenset[str], most: int) -> Body:
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


def _contiguous_along(buffer: Buffer, idx: tuple[Expr, ...], d: Var, origin: str) -> None:
    for e, stride in zip(idx, buffer.strides, strict=True):
        terms, constant = linear_terms(e)
        for term, c in terms.items():
            step = c * stride
            if (term is d and step != 1) or (term is not d and (d in term.free or step % 8)):
                raise Unsupported(
                    f"cache {buffer.name} with strides {buffer.strides} is not 16-byte rows of {d.size}", origin=origin
                )
        if constant * stride % 8:
            raise Unsupported(f"cache {buffer.name}: rows do not start at 16-byte boundaries", origin=origin)


def _stride(buffer: Buffer, idx: tuple[Expr, ...], along: Var) -> int:
    """Elements from one value of `along` to the next; 0 where that is no constant."""
    step = 0
    for e, stride in zip(idx, buffer.strides, strict=True):
        for term, c in linear_terms(e)[0].items():
            if term is along:
                step += c * stride
            elif along in term.free:
                return 0
    return step


def _either(text: str, other: str, condition: str) -> str:
    """`text`, or `other` where `condition` holds, when they differ in nothing but the slots of operands; else "". Code
    that is there once takes half the instruction cache."""
    pattern = re.compile(r"(?<=>\()\d+(?=\))")
    if not other or pattern.sub("", text) != pattern.sub("", other):
        return ""
    slots = iter(zip(pattern.findall(text), pattern.findall(other), strict=True))

    def slot(_: re.Match[str]) -> str:
        mine, theirs = next(slots)
        return mine if mine == theirs else f"{condition} ? {theirs} : {mine}"

    return pattern.sub(slot, text)


WORDS = frozenset((DType.BOOL, DType.BF16, DType.F16, DType.F32))
"""Types of masks that are kept as they are in memory until they are used."""

MMA_KEYS = 16
"""Keys that attention_mma takes at a time: the fewest that a cache must hold for it."""

MAX_QUERY_BYTES = 64 << 10
"""Shared memory for the query rows of an attention task, which leaves room for the ring on every target."""


def _attention(node: Attention, buffers: Mapping[str, Buffer], split: bool, flagged: frozenset[str]) -> Body:
    operands = Operands()
    keys, values = buffers[node.keys], buffers[node.values]
    if keys.dtype is not values.dtype or not keys.dtype.is_float or keys.dtype is DType.F64:
        raise Unsupported(f"cache dtypes {keys.dtype.value}, {values.dtype.value}", origin=node.origin)
    if node.d.size % 8 or node.d.size > 256:
        raise Unsupported(f"head size {node.d.size} (a multiple of 8 up to 256 is supported)", origin=node.origin)
    group = node.h.size // node.g.size
    if group * node.d.size * 4 > MAX_QUERY_BYTES:
        raise Unsupported(
            f"{group} query rows of {node.d.size} share a KV head; {MAX_QUERY_BYTES >> 10} KiB of them fit in fp32",
            origin=node.origin,
            remedy="fewer query tokens at once",
        )
    _contiguous_along(keys, node.key_index, node.d, node.origin)
    _contiguous_along(values, node.value_index, node.d, node.origin)
    cache = MEMORY_TYPE[keys.dtype]
    mask = 0 if node.mask is None else 1 if node.mask.dtype is DType.BOOL else 2
    narrow = {keys.dtype, node.q.dtype, *((node.append.key.dtype, node.append.value.dtype) if node.append else ())}
    on_tensor_cores = len(narrow) == 1 and keys.dtype.is_narrow_float and node.s.size >= MMA_KEYS
    lines = [
        f"  using Cache = {cache};",
        f"  static constexpr int G = {node.h.size // node.g.size}, H = {node.h.size}, D = {node.d.size};",
        f"  static constexpr int S = {node.s.size}, CHUNK = {MIN_KEYS};",
        f"  static constexpr bool MMA = {'true' if on_tensor_cores else 'false'}, "
        f"HALF = {'true' if keys.dtype is DType.F16 else 'false'};",
        f"  static constexpr int KEY_STRIDE = {_stride(keys, node.key_index, node.s)}, "
        f"VALUE_STRIDE = {_stride(values, node.value_index, node.s)};",
        f"  static constexpr bool APPEND = {'true' if node.append else 'false'};",
        f"  static constexpr int MASK = {mask};",
        f"  static constexpr bool MASK_PER_HEAD = {'true' if mask and node.h in node.mask.free else 'false'};",
        f"  static constexpr float SCALE = {node.scale!r}f, SOFTCAP = {node.softcap or 0.0!r}f;",
    ]

    def make(names: Mapping[Expr, str]) -> Emitter:
        return Emitter(buffers, operands, names, flagged=flagged, origin=node.origin)

    def row(head: Var, body: Expr) -> str:
        index = (("b", node.b), ("h", head))
        f32 = cast(body, DType.F32)
        return row_function("row", index, (node.d,), f32, make, lambda _, value: f"store(x_{node.d.name}, {value});")

    def row_member(name: str, text: str, parameters: str = "") -> str:
        return (
            f"  template <class Ctx, class G_, class Store> MPK_DEVICE static void {name}(Ctx& c, const G_& g, int b, "
            f"int h, const Store& store{parameters}) {{\n    using G = G_;\n    {text}\n  }}"
        )

    def scalar(name: str, result: str, parameters: tuple[tuple[str, Var], ...], body: Expr) -> str:
        emitter = make({v: n for n, v in parameters})
        value = emitter.emit(body)
        args = "".join(f", int {n}" for n, _ in parameters)
        lines = f"{' '.join(emitter.lines)} return {value};"
        return f"  {TEMPLATE} MPK_DEVICE static {result} {name}(Ctx& c{args}) {{ {lines} }}"

    def address(name: str, buffer: str, idx: tuple[Expr, ...]) -> str:
        emitter = make({node.b: "b", node.g: "g", node.s: "s"})
        slot = operands.slot(buffer)
        offset = emitter.offset(buffers[buffer], idx, node.d)
        return (
            f"  {TEMPLATE} MPK_DEVICE static {cache}* {name}_base(Ctx& c) {{ "
            f"return c.template pointer<{cache}>({slot}); }}\n"
            f"  {TEMPLATE} MPK_DEVICE static {cache}* {name}(Ctx& c, int b, int g, int s, {cache}* base) {{ "
            f"{' '.join(emitter.lines)} return base + ({offset}); }}\n"
            f"  {TEMPLATE} MPK_DEVICE static {cache}* {name}(Ctx& c, int b, int g, int s) {{ "
            f"return {name}(c, b, g, s, {name}_base(c)); }}"
        )

    q_row, key_row = row(node.h, node.q), row(node.g, node.append.key) if node.append else ""
    both = _either(q_row, key_row, "key")
    lines.append(f"  static constexpr bool ALIKE = {'true' if both else 'false'};")
    lines.append(row_member("q_row", both or q_row, ", [[maybe_unused]] bool key"))
    lines.append(address("key_at", node.keys, node.key_index))
    lines.append(address("value_at", node.values, node.value_index))
    if node.append:
        if not both:
            lines.append(row_member("key_row", key_row))
        lines.append(row_member("value_row", row(node.g, node.append.value)))
        lines.append(scalar("position", "i64", (("b", node.b),), node.append.position))
        lines.append(address("new_key_at", node.append.keys, node.key_index))
        lines.append(address("new_value_at", node.append.values, node.value_index))
    head = (("b", node.b), ("h", node.h), ("s", node.s))
    if mask == 1:
        lines.append(scalar("mask_bool", "bool", head, node.mask))
    if mask == 2:
        lines.append(scalar("mask_add", "float", head, cast(node.mask, DType.F32)))
    if node.mask is not None:
        lines += _mask_word(node.mask, make({v: n for n, v in head}))
    lines += _limits(node, make)
    if split:
        # no store: partial results go to the two buffers that the task names by operand slot
        lines.append(f"  {TEMPLATE} MPK_DEVICE static void store(Ctx&, int, int, int, float) {{}}")
        operands.slot(f"{node.name}.partial")
        operands.slot(f"{node.name}.stats")
        call = "publish(p, v)" if f"{node.name}.partial" in flagged else "*p = v"
        lines.append(f"  MPK_DEVICE static void partial(float* p, float v) {{ {call}; }}")
    else:
        lines.append("  MPK_DEVICE static void partial(float*, float) {}")
        lines.append(_attention_store(node, buffers, operands, flagged))
    return Body("attention", "attention", "\n".join(lines) + "\n", tuple(operands.names))


def _mask_word(mask: Expr, emitter: Emitter) -> list[str]:
    """mask_word(c, b, h, s): what is loaded of a mask, and mask_value(word): what it adds to the score. Apart, so that
    a load is not waited for where it is made."""
    parameters = "Ctx& c, int b, int h, int s"
    if isinstance(mask, Load) and mask.dtype in WORDS and not emitter.is_flagged(mask.buffer):
        word, stored = f"word_at({emitter.address(mask)})", MEMORY_TYPE[mask.dtype]
    else:
        value = emitter.emit(mask if mask.dtype is DType.BOOL else cast(mask, DType.F32))
        word, stored = (value, "bool") if mask.dtype is DType.BOOL else (f"__float_as_uint({value})", "float")
    value = "word ? 0.0f : -infinity()" if stored == "bool" else f"float_of<{stored}>(word)"
    return [
        f"  {TEMPLATE} MPK_DEVICE static u32 mask_word({parameters}) {{ {' '.join(emitter.lines)} return {word}; }}",
        f"  MPK_DEVICE static float mask_value(u32 word) {{ return {value}; }}",
    ]


def _limits(node: Attention, make: Callable[[Mapping[Expr, str]], Emitter]) -> list[str]:
    """first(c, b) and last(c, b): the live keys of a sequence."""
    lines = []
    for name, e, default in (("first", node.first, "0"), ("last", node.last, str(node.s.size))):
        emitter = make({node.b: "b"})
        value = default if e is None else emitter.emit(e)
        lines.append(
            f"  {TEMPLATE} MPK_DEVICE static int {name}([[maybe_unused]] Ctx& c, [[maybe_unused]] int b) "
            f"{{ {' '.join(emitter.lines)} return {value}; }}"
        )
    return lines


def _attention_store(
    node: Attention, buffers: Mapping[str, Buffer], operands: Operands, flagged: frozenset[str]
) -> str:
    emitter = Emitter(buffers, operands, {node.b: "b", node.h: "h", node.d: "d"}, flagged=flagged, origin=node.origin)
    text = emitter.store(node.out, node.store, "value")
    lines = f"{' '.join(emitter.lines)} {text}"
    return f"  {TEMPLATE} MPK_DEVICE static void store(Ctx& c, int b, int h, int d, float value) {{ {lines} }}"


def _combine(node: Attention, buffers: Mapping[str, Buffer], flagged: frozenset[str]) -> Body:
    operands = Operands()
    operands.slot(f"{node.name}.partial")
    operands.slot(f"{node.name}.stats")
    lines = [
        f"  static constexpr int H = {node.h.size}, D = {node.d.size}, S = {node.s.size}, CHUNK = {MIN_KEYS};",
        f"  static constexpr bool FLAGGED = {'true' if f'{node.name}.partial' in flagged else 'false'};",
        *_limits(node, lambda names: Emitter(buffers, operands, names, flagged=flagged, origin=node.origin)),
        _attention_store(node, buffers, operands, flagged),
    ]
    return Body("attention_combine", "attention_combine", "\n".join(lines) + "\n", tuple(operands.names))
