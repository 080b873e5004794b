"""The device traits of an Attention and of the combination of its splits (tasks/attention*.cuh)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ..errors import Unsupported
from ..ir.expr import Expr, Load, Var, cast, linear_terms
from ..ir.graph import Attention
from ..ir.types import Buffer, DType
from ..ops.attention import MIN_KEYS
from .body import TEMPLATE, Body
from .expressions import MEMORY_TYPE, Emitter, Operands, row_function


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


def attention_body(node: Attention, buffers: Mapping[str, Buffer], split: bool, flagged: frozenset[str]) -> Body:
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


def combine_body(node: Attention, buffers: Mapping[str, Buffer], flagged: frozenset[str]) -> Body:
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
