"""The CUDA renderer of ir.expr: statements that compute an expression, values rounded exactly as the graph says.

Generated code is compiled without contraction (-fmad=false), so that an addition and a multiplication of the graph
stay two roundings, as in eager; only dot products use explicit fused multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..errors import Unsupported
from ..ir.expr import (
    Acc,
    Const,
    Expr,
    Load,
    Op,
    Reduce,
    Var,
    bounds,
    from_terms,
    index,
    linear_terms,
    loads,
    op,
    substitute,
    walk,
)  # fmt: skip
from ..ir.types import Buffer, DType

MEMORY_TYPE = {
    DType.BF16: "bf16", DType.F16: "f16", DType.F32: "float", DType.F64: "double",
    DType.I64: "i64", DType.I32: "int", DType.U8: "u8", DType.BOOL: "bool",
}  # fmt: skip

_UNARY_FLOAT = {
    "neg": "-{0}", "abs": "fabsf({0})", "sqrt": "sqrtf({0})", "rsqrt": "rsqrtf({0})", "exp": "expf({0})",
    "exp2": "exp2f({0})", "log": "logf({0})", "log2": "log2f({0})", "log1p": "log1pf({0})", "expm1": "expm1f({0})",
    "sin": "sinf({0})", "cos": "cosf({0})", "tanh": "tanhf({0})", "sigmoid": "1.0f / (1.0f + expf(-{0}))",
    "erf": "erff({0})", "floor": "floorf({0})", "ceil": "ceilf({0})", "trunc": "truncf({0})", "round": "rintf({0})",
    "reciprocal": "1.0f / {0}", "relu": "Max::apply({0}, 0.0f)", "isnan": "({0} != {0})", "not": "!{0}",
}  # fmt: skip
_BINARY_FLOAT = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "pow": "powf({0}, {1})",
    "max": "Max::apply({0}, {1})", "min": "Min::apply({0}, {1})", "floordiv": "floorf({0} / {1})",
    "mod": "float_mod({0}, {1})",
}  # fmt: skip
_DOUBLE = {
    "max": "({0} < {1} || {1} != {1} ? {1} : {0})", "min": "({0} > {1} || {1} != {1} ? {1} : {0})",
    "relu": "({0} < 0.0 ? 0.0 : {0})",
}  # fmt: skip
"""Where the form is not that of float with another suffix."""
_INT = {
    "neg": "-{0}", "abs": "({0} < 0 ? -{0} : {0})", "not": "~{0}", "add": "{0} + {1}", "sub": "{0} - {1}",
    "mul": "{0} * {1}", "max": "max({0}, {1})", "min": "min({0}, {1})", "and": "{0} & {1}", "or": "{0} | {1}",
    "floordiv": "floor_div({0}, {1})", "mod": "floor_mod({0}, {1})",
}  # fmt: skip
_WRAPPING = {
    "neg": "{1}({0}(0) - {0}(A))", "abs": "{1}(A < 0 ? {0}(0) - {0}(A) : {0}(A))", "add": "{1}({0}(A) + {0}(B))",
    "sub": "{1}({0}(A) - {0}(B))", "mul": "{1}({0}(A) * {0}(B))",
}  # fmt: skip
"""Operators on data A and B, whose range is not known: torch's integers wrap, where signed ones of C++ are undefined.
{0} is the unsigned type, {1} the signed one."""
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INT32 = (-(2**31), 2**31 - 1)
HELD = 16
"""Elements of a row that a thread may hold in registers."""

REDUCERS = {"sum": "Sum", "max": "Max", "min": "Min"}


class Operands:
    """Buffers a task body refers to, numbered by first use: the canonical form under which equal bodies of
    different layers share code."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def slot(self, buffer: str) -> int:
        if buffer not in self.names:
            self.names.append(buffer)
        return self.names.index(buffer)


class Emitter:
    """Emits statements of one block. `names` maps Vars, and already computed expressions, to C++ identifiers."""

    def __init__(
        self,
        buffers: Mapping[str, Buffer],
        operands: Operands,
        names: Mapping[Expr, str],
        *,
        flagged: frozenset[str] = frozenset(),
        counter: list[int] | None = None,
        origin: str = "",
    ) -> None:
        self.buffers, self.operands, self.flagged, self.origin = buffers, operands, flagged, origin
        self.names: dict[Expr, str] = dict(names)
        self.lines: list[str] = []
        self.counter = counter if counter is not None else [0]

    def child(self, names: Mapping[Expr, str] = {}) -> "Emitter":
        """A nested block: sees this block's values, its own stay inside."""
        return Emitter(
            self.buffers,
            self.operands,
            {**self.names, **names},
            flagged=self.flagged,
            counter=self.counter,
            origin=self.origin,
        )

    def emit(self, e: Expr) -> str:
        """Identifier or literal that holds the value of e in this block."""
        if isinstance(e, Const):
            return literal(e)
        found = self.names.get(e)
        if found is None:
            if isinstance(e, (Var, Reduce, Acc)):
                raise Unsupported(f"the value of {e!r} is not available here", origin=self.origin)
            name = f"v{self.counter[0]}"
            self.counter[0] += 1
            if isinstance(e, Op) and e.name == "where" and any(loads(c) for c in e.children[1:]):
                self._branch(e, name)
            else:
                self.lines.append(f"const {ctype(e)} {name} = {self._value(e)};")
            found = self.names[e] = name
        return found

    def _branch(self, e: Op, name: str) -> None:
        # a load under `where` may be outside its buffer on the other side: never hoist it
        condition = self.emit(e.children[0])
        self.lines.append(f"{ctype(e)} {name};")
        for head, side in ((f"if ({condition})", e.children[1]), ("else", e.children[2])):
            block = self.child()
            value = block.emit(side)
            self.lines.append(f"{head} {{ {' '.join(block.lines)} {name} = {value}; }}")

    def _value(self, e: Expr) -> str:
        if isinstance(e, Load):
            return f"load_flagged(c, {self.address(e)})" if self.is_flagged(e.buffer) else f"load1({self.address(e)})"
        assert isinstance(e, Op)
        args = [self.emit(c) for c in e.children]
        if e.name == "cast":
            return _cast(args[0], e.children[0].dtype, e.dtype)
        if e.name == "where":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        kind = e.children[0].dtype
        if e.name in _COMPARE:
            return f"{args[0]} {_COMPARE[e.name]} {args[1]}"
        if kind is DType.F32 or kind is DType.F64:
            text = _UNARY_FLOAT.get(e.name) or _BINARY_FLOAT.get(e.name)
            if text and kind is DType.F64:
                text = _DOUBLE[e.name] if e.name in _DOUBLE else text.replace("f(", "(").replace(".0f", ".0")
        elif kind is DType.BOOL:
            text = {"not": "!{0}", "and": "{0} && {1}", "or": "{0} || {1}"}.get(e.name)
        else:
            text = self._integer(e)
        if text is None:
            raise Unsupported(f"no CUDA form of {e.name} on {kind.value}", origin=self.origin)
        return text.format(*args)

    @staticmethod
    def _integer(e: Op) -> str | None:
        """The form of an operator on integers, computed in 64 bits where any operand or the result needs them."""
        wide = "i64" in map(ctype, (e, *e.children))
        limits = [bounds(c) for c in e.children]
        if e.name in ("floordiv", "mod") and all(x is not None and x[0] >= 0 for x in limits):
            return "{0} / {1}" if e.name == "floordiv" else "{0} % {1}"
        if e.name in _WRAPPING and bounds(e) is None:
            text = _WRAPPING[e.name].format(*(("u64", "i64") if wide else ("u32", "int")))
            return text.replace("A", "{0}").replace("B", "{1}")
        text, kind = _INT.get(e.name), "i64" if wide else "int"
        same = all(ctype(c) == kind and not isinstance(c, Const) for c in e.children)
        return text if text is None or same else text.replace("{0}", f"{kind}({{0}})").replace("{1}", f"{kind}({{1}})")

    def offset(self, buffer: Buffer, idx: tuple[Expr, ...], skip: Var | None = None) -> str:
        """Element offset of an index; with `skip`, of the index at skip == 0. Indices from data are checked."""
        affine: Expr = index(0)
        dynamic: list[str] = []
        for i, (e, stride) in enumerate(zip(idx, buffer.strides, strict=True)):
            if bounds(e) is None:
                dynamic.append(f"c.checked({self.emit(e)}, {buffer.shape[i]}) * {stride}ll")
            else:
                affine = op("add", affine, op("mul", e, index(stride)))
        if skip is not None:
            terms, constant = linear_terms(affine)
            if terms.pop(skip, 0) != 1 or any(skip in t.free for t in terms):
                raise Unsupported(f"{buffer.name} is not contiguous along {skip.name}", origin=self.origin)
            affine = from_terms(terms, constant)
        limits = bounds(affine)
        if limits is not None and (limits[0] < _INT32[0] or limits[1] > _INT32[1]):
            raise Unsupported(f"{buffer.name} has more than 2**31 elements", origin=self.origin)
        parts = ([] if affine is index(0) and dynamic else [self.emit(affine)]) + dynamic
        return " + ".join(parts)

    def is_flagged(self, buffer: str) -> bool:
        """Whether reads of a buffer poll and writes to it publish."""
        return self.buffers[buffer].storage in self.flagged

    def store(self, out: str, idx: tuple[Expr, ...], value: str) -> str:
        """The statement that stores a value."""
        buffer = self.buffers[out]
        slot = self.operands.slot(out)
        offset = self.offset(buffer, idx)
        call = "publish" if self.is_flagged(out) else "store1"
        return f"{call}(c.template pointer<{MEMORY_TYPE[buffer.dtype]}>({slot}) + ({offset}), {value});"

    def address(self, e: Load, skip: Var | None = None) -> str:
        buffer = self.buffers[e.buffer]
        slot = self.operands.slot(e.buffer)
        offset = self.offset(buffer, e.index, skip)
        return f"c.template pointer<{MEMORY_TYPE[buffer.dtype]}>({slot}) + ({offset})"


def aligned_loads(e: Expr, buffers: Mapping[str, Buffer], along: Var, width: int) -> list[Load]:
    """Loads that are `width` consecutive, aligned floats for consecutive values of `along`. Those under a `where`
    are left out: they may be outside their buffer."""
    found = []
    for ld in unconditional_loads(e):
        dtype = buffers[ld.buffer].dtype
        if (
            along in ld.free
            and dtype.is_float
            and dtype is not DType.F64
            and _aligned(ld, buffers[ld.buffer], along, width)
        ):
            found.append(ld)
    return found


def unconditional_loads(e: Expr) -> list[Load]:
    """Loads that are evaluated whatever the data: not under a `where`, not inside a reduction."""
    out: list[Load] = []
    seen: set[Expr] = set()

    def visit(x: Expr) -> None:
        if x in seen:
            return
        seen.add(x)
        if isinstance(x, Load):
            out.append(x)
        if isinstance(x, Reduce):
            return
        children = x.children[:1] if isinstance(x, Op) and x.name == "where" else x.children
        for child in children:
            visit(child)

    visit(e)
    return out


def _aligned(ld: Load, buffer: Buffer, along: Var, width: int) -> bool:
    affine: Expr = index(0)
    for e, stride in zip(ld.index, buffer.strides, strict=True):
        if bounds(e) is None:
            if along in e.free or stride % width:
                return False
        else:
            affine = op("add", affine, op("mul", e, index(stride)))
    terms, constant = linear_terms(affine)
    if terms.pop(along, 0) != 1 or constant % width:
        return False
    return all(c % width == 0 and along not in t.free for t, c in terms.items())


def literal(e: Const) -> str:
    value = e.value
    if e.dtype is DType.BOOL:
        return "true" if value else "false"
    if e.dtype.is_float:
        if value != value:
            return "__int_as_float(0x7fc00000)"
        if value in (float("inf"), float("-inf")):
            return ("-" if value < 0 else "") + "infinity()"
        text = f"{value!r}" + ("" if e.dtype is DType.F64 else "f")
        return f"({text})" if value < 0 else text
    if value == -(2**63):  # no literal of C++ has this value
        return f"({value + 1}ll - 1)"
    text = str(value) if _INT32[0] < value <= _INT32[1] else f"{value}ll"
    return f"({text})" if value < 0 else text


def ctype(e: Expr) -> str:
    """C++ type that holds a value: narrow floats live as rounded fp32, integers as int where the range allows."""
    if e.dtype in (DType.F32, DType.BF16, DType.F16):
        return "float"
    if e.dtype is DType.I64:
        limits = bounds(e)
        return "int" if limits is not None and _INT32[0] <= limits[0] and limits[1] <= _INT32[1] else "i64"
    return {DType.F64: "double", DType.I32: "int", DType.U8: "int", DType.BOOL: "bool"}[e.dtype]


def _cast(text: str, source: DType, to: DType) -> str:
    if to.is_narrow_float:
        return f"round_to<{MEMORY_TYPE[to]}>(static_cast<float>({text}))"
    if to is DType.BOOL:
        return f"({text} != 0)"
    target = {DType.F32: "float", DType.F64: "double", DType.I64: "i64", DType.I32: "int", DType.U8: "u8"}[to]
    return f"static_cast<{target}>({text})"


def row_function(
    name: str,
    parameters: tuple[tuple[str, Var], ...],
    elements: tuple[Var, ...],
    body: Expr,
    make: Callable[[Mapping[Expr, str]], Emitter],
    store: Callable[[Emitter, str], str],
    group: int = 32,
) -> str:
    """A device function over a cooperating group: reductions first (each over the group), then every element.

    parameters: (C++ name, Var) that are arguments. elements: Vars looped over, flattened. store(emitter, value)
    returns the statement that stores the value, after emitting what it needs. group: threads of the group.
    """
    names: dict[Expr, str] = {v: n for n, v in parameters}
    count = math.prod(v.size for v in elements)
    flat = split_index("e", elements)
    decode = " ".join(f"[[maybe_unused]] const int {n} = {text};" for n, text in flat.values())
    inner: dict[Expr, str] = {v: n for v, (n, _) in flat.items()}
    each = f"for (int u = 0; u < BATCH; ++u) {{ const int e = first + u * G::SIZE; if (e < COUNT) {{ {decode}"
    lines = [f"constexpr int COUNT = {count}, ROUNDS = (COUNT + G::SIZE - 1) / G::SIZE;",
             f"constexpr int BATCH = ROUNDS < {HELD} ? ROUNDS : {HELD};"]  # fmt: skip
    # One element of a thread after the other would wait for memory each time. A row that fits in registers is loaded
    # first, by its reductions and its elements alike; otherwise values are at least computed before any is stored,
    # since a store may alias the next element's loads.
    along = elements[0] if len(elements) == 1 and count <= HELD * group else None
    if along is not None:
        reduced = [
            (r, substitute(r.body, {r.var: along}))
            for r in walk(body)
            if isinstance(r, Reduce) and r.var.size == count and not any(isinstance(x, Reduce) for x in walk(r.body))
        ]
        lines.append("const int first = g.rank;")
        emitter = make({**names, **inner})
        early: dict[Expr, str] = {}
        settling = make({**names, **inner})
        for root in [*(b for _, b in reduced), body]:
            for ld, conditions in guarded_loads(root):
                if ld in early or not ld.dtype.is_float or ld.dtype is DType.F64:
                    continue
                guard = " && ".join(emitter.emit(x) for x in conditions) or "true"
                name = f"early{len(early)}[u]"
                if emitter.is_flagged(ld.buffer):
                    kind = MEMORY_TYPE[emitter.buffers[ld.buffer].dtype]
                    emitter.lines.append(f"if ({guard}) {name} = load_bits({emitter.address(ld)});")
                    again = " && ".join(settling.emit(x) for x in conditions) or "true"
                    settling.lines.append(f"if ({again}) complete = poll({name}, {settling.address(ld)}) && complete;")
                    early[ld] = f"float_of<{kind}>({name})"
                else:
                    emitter.lines.append(f"if ({guard}) {name} = __float_as_uint(load1({emitter.address(ld)}));")
                    early[ld] = f"__uint_as_float({name})"
        if early:
            lines.append(" ".join(f"u32 early{i}[BATCH];" for i in range(len(early))))
            lines += ["#pragma unroll", f"{each} {' '.join(emitter.lines)} }} }}"]
            if settling.lines:
                lines += [
                    "poll_until(c, [&] { bool complete = true;",
                    "#pragma unroll",
                    f"{each} {' '.join(settling.lines)} }} }}",
                    "return complete; });",
                ]
            inner |= early
    else:
        reduced = []
    for i, r in enumerate(x for x in walk(body) if isinstance(x, Reduce)):
        if not r.free <= {v for _, v in parameters}:
            raise Unsupported(f"a reduction inside another depends on its variable: {r!r}"[:300])
        integer = not r.dtype.is_float
        combine = REDUCERS[r.name] + ("Int" if integer else "")
        lines.append(f"{'i64' if integer else 'float'} total{i} = {combine}::identity();")
        here = dict(reduced).get(r)
        if here is not None:
            emitter = make({**names, **inner})
            value = emitter.emit(here)
            step = f"total{i} = {combine}::apply(total{i}, {value});"
            lines += ["#pragma unroll", f"{each} {' '.join(emitter.lines)} {step} }} }}"]
        else:
            emitter = make({**names, r.var: "r"})
            value = emitter.emit(r.body)
            step = f"total{i} = {combine}::apply(total{i}, {value});"
            loop = f"for (int r = g.rank; r < {r.var.size}; r += G::SIZE)"
            lines += ["#pragma unroll 8", f"{loop} {{ {' '.join(emitter.lines)} {step} }}"]
        lines.append(f"total{i} = g.template reduce<{combine}>(total{i});")
        names[r] = f"static_cast<{ctype(r)}>(total{i})" if integer else f"total{i}"
    emitter = make({**names, **inner})
    value = emitter.emit(body)
    storing = make({**names, **inner})
    statement = store(storing, "out[u]")
    kind = "float" if body.dtype.is_float and body.dtype is not DType.F64 else ctype(body)
    passes = [
        f"{kind} out[BATCH];",
        "#pragma unroll",
        f"{each} {' '.join(emitter.lines)} out[u] = {value}; }} }}",
        "#pragma unroll",
        f"{each} {' '.join(storing.lines)} {statement} }} }}",
    ]
    if along is not None:
        lines += passes
    else:
        lines += ["for (int first = g.rank; first < COUNT; first += BATCH * G::SIZE) {", *passes, "}"]
    return "\n    ".join(lines)


def guarded_loads(e: Expr) -> list[tuple[Load, tuple[Expr, ...]]]:
    """Loads outside reductions, each with the conditions under which it is evaluated. Left out: loads under a
    condition that itself loads."""
    out: list[tuple[Load, tuple[Expr, ...]]] = []
    seen: set[tuple[Expr, tuple[Expr, ...]]] = set()

    def visit(x: Expr, path: tuple[Expr, ...]) -> None:
        if (x, path) in seen or isinstance(x, Reduce):
            return
        seen.add((x, path))
        if isinstance(x, Load):
            out.append((x, path))
        if isinstance(x, Op) and x.name == "where":
            condition, then, otherwise = x.children
            visit(condition, path)
            if not loads(condition):
                visit(then, (*path, condition))
                visit(otherwise, (*path, op("not", condition)))
        else:
            for child in x.children:
                visit(child, path)

    visit(e, ())
    return sorted(out, key=lambda found: len(found[1]))


def split_index(flat: str, variables: tuple[Var, ...]) -> dict[Var, tuple[str, str]]:
    """Var -> (C++ name, expression of it from a flattened index)."""
    out: dict[Var, tuple[str, str]] = {}
    step = 1
    for position, v in reversed(list(enumerate(variables))):
        text = flat if step == 1 else f"{flat} / {step}"
        if position > 0:
            text = f"({text}) % {v.size}"
        out[v] = (f"x_{v.name}", text if v.size > 1 else "0")
        step *= v.size
    return out
