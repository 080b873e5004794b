"""What fusing costs and saves: every number of the fusion passes, with its reason.

A node of its own costs one signal and one wait across the device, about two microseconds in which a worker of 256
lanes could do a few hundred thousand operations, and one trip of the result through L2. Doing the work again in each
reader costs operations and registers. So results with one reader are nearly always folded into it, and results
with many readers only when they are almost free.
"""

from __future__ import annotations

import math

from ...ir.expr import Const, Expr, Load, Op, Reduce, Var, loads, reductions, walk
from ...ir.types import DType

SLOW = frozenset("exp exp2 log log2 log1p expm1 sin cos tanh sigmoid erf pow".split())
MEDIUM = frozenset("div sqrt rsqrt reciprocal mod floordiv".split())

SLOW_WEIGHT = 16
"""Operations that one exp, sin or pow is worth (f32, including range reduction)."""
MEDIUM_WEIGHT = 4
"""Operations that one division or root is worth."""
GATHER_WEIGHT = 16
"""A load whose address is itself loaded waits for memory twice, and its rows are far apart."""

CHEAP = 8
"""Weight up to which a result is computed again by each of several readers: a cast and some adds, a comparison of
positions. Rotary tables (sin, cos) and norms weigh more and are stored once."""

CHEAP_LOADS = 1
"""Loads up to which a result counts as cheap. With one load, computing it again moves no more bytes than reading it.
With two (a residual sum) each reader would fetch both, and over the layers the chain would grow."""

FEW_READERS = 3
"""Readers up to which light results are computed again in each although they are not cheap, when the extra work is
below RECOMPUTE: the angles of which one RowMap takes the sine and another the cosine; mean and variance of a row that
two norms share, where reading them would put two more waits before each."""

PROLOGUE_WEIGHT = 128
"""Weight per element of x up to which a Linear of one token carries a prologue. Each of its tasks computes all of x,
K elements; an RMSNorm weighs about 20, so that K = 4096 costs a worker of 256 lanes some 300 instructions each."""

PROLOGUE_DEPTH = ((4, 3072), (8, 2048), (16, 1024))
"""With several tokens, up to so many of them: the depth up to which a Linear carries a prologue. Every worker computes
all rows of x then and holds them in registers, 32 per thread for 8 rows of 2048 in a 16-bit type. Deeper rows, or more
than one operand, are computed once, by a RowMap: beyond these depths that took less time, with its edge
(docs/benchmarks.md)."""

RECOMPUTE = 1 << 16
"""Operations that a fused node may do in excess of its two halves, per row: 256 per lane of one worker, about a
tenth of the wait that it saves. Slow functions are not done again at all: a sine that every head would compute costs
registers as well."""

SIZE_LIMIT = 512
"""Distinct sub-expressions of one expression, at most, so that generated code and its registers stay bounded when
a result is read at several offsets (a shift, a rotation). Norm and rotary embedding of a query take about 80."""

DEPTH_LIMIT = 160
"""Nesting of one expression, at most, so that recursive functions over it stay far from Python's limit (1000 frames,
two or three per level). Norm and rotary embedding of a query take about 30."""


def weight(x: Expr) -> int:
    """Operations for one element of x, each common sub-expression once; the body of a reduction counts once."""
    return sum(map(_weight, walk(x)))


def is_slow(x: Expr) -> bool:
    """Whether x computes an exponential, sine or the like."""
    return any(_weight(e) >= SLOW_WEIGHT for e in walk(x) if isinstance(e, Op))


def _weight(e: Expr) -> int:
    if isinstance(e, Load):
        return GATHER_WEIGHT if is_gather(e) else 1
    if isinstance(e, Reduce):
        return 1
    if not isinstance(e, Op):
        return 0
    if e.name in SLOW:
        # x ** 2 is a multiplication
        return 1 if e.name == "pow" and isinstance(e.children[1], Const) and e.children[1].value == 2 else SLOW_WEIGHT
    if e.dtype is DType.I64 and e.name in ("add", "mul", "sub", "neg"):
        return 0  # addresses: folded into pointer increments
    return MEDIUM_WEIGHT if e.name in MEDIUM and e.dtype.is_float else 1


def is_gather(x: Load) -> bool:
    """Whether the address of a load depends on loaded data."""
    return any(i.buffers for i in x.index)


def is_cheap(x: Expr) -> bool:
    """Whether computing x again is as good as reading it."""
    return not x.reduces and len(loads(x)) <= CHEAP_LOADS and weight(x) <= CHEAP


def is_gathering(x: Expr) -> bool:
    """Whether x loads from an address that depends on loaded data."""
    return any(map(is_gather, loads(x)))


def work(x: Expr, dims: tuple[Var, ...]) -> int:
    """Operations to compute x for all `dims`, the way device code does: elements one by one, and reductions once per
    row, where a row is the shortest prefix of `dims` that all of them depend on."""
    sizes = [v.size for v in dims]
    position = {v: k + 1 for k, v in enumerate(dims)}
    rows = math.prod(sizes[: max((position.get(v, 0) for r in reductions(x) for v in r.free), default=0)])
    done: dict[Expr, int] = {}
    total = 0
    stack = [(x, math.prod(sizes))]
    while stack:
        e, times = stack.pop()
        if done.get(e, 0) >= times:
            continue
        total += _weight(e) * (times - done.get(e, 0))
        done[e] = times
        if isinstance(e, Reduce):
            times = (rows if e.free <= position.keys() else times) * e.var.size
        stack.extend((c, times) for c in e.children)
    return total
