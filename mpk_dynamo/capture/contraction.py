"""Products of two computed tensors, and attention that is written out with them.

Such a product is a plain reduction, right and slow. It is there for small ones; a large one is refused unless it
turns out to be half of an attention: `softmax(q @ k.T * scale + mask) @ v`, with scores that may be capped,
`cap * tanh(scores / cap)`. That is recognised when the second product is met, by following its left operand back
through roundings, so that names and order of the model's own steps do not matter. Scores are then kept in f32
where the model rounds each step of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import Unsupported
from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.graph import Node, RowMap
from ..ir.types import DType
from .attention import MAX_QUERIES, Stored, attend, head_and_token
from .registry import Call
from .values import Index, Shape, View, broadcast, convert, point, points, variables, wide

if TYPE_CHECKING:
    from .importer import Importer

LARGE = 1 << 20
"""Multiplications from which a product of two computed tensors is refused: a plain reduction reads both operands
again for every element."""

IGNORED = -1e30
"""A number at most this that stands in place of a score takes all weight from it, whatever the other scores are."""


@dataclass(frozen=True)
class Product:
    """left @ right: their elements over the variables of their own shapes, as they were at that point."""

    call: Call
    left: Expr
    right: Expr
    left_shape: Shape
    right_shape: Shape

    @property
    def multiplications(self) -> int:
        return math.prod(self.call.shape) * self.left_shape[-1]


def contraction(imp: Importer, call: Call, left: View, right: View) -> View:
    """left @ right, for tensors with at least two dimensions."""
    if len(left.shape) < 2 or len(right.shape) < 2 or left.dtype is not right.dtype or not left.dtype.is_float:
        kinds = f"{left.dtype.value}{list(left.shape)} x {right.dtype.value}{list(right.shape)}"
        raise call.refuse(f"a product of two computed tensors {kinds}")
    found = _attention(imp, call, left, right)
    if found is not None:
        return found
    at, kind, r = points(call.shape), wide(call.dtype), E.var("r0", left.shape[-1])
    batch = call.shape[:-2]
    row = (*broadcast(left.shape[:-2], batch, at[:-2]), at[-2], point(r))
    column = (*broadcast(right.shape[:-2], batch, at[:-2]), point(r), at[-1])
    body = E.reduce("sum", r, op("mul", convert(left.load(row), kind), convert(right.load(column), kind)))
    out = imp.emit(call, convert(body, call.dtype))
    elements = left.load(points(left.shape)), right.load(points(right.shape))
    imp.products[out.memory.name] = Product(call, *elements, left.shape, right.shape)
    return out


def too_large(products: dict[str, Product], nodes: Iterable[Node]) -> Iterator[tuple[Call, Unsupported]]:
    """The large products that are left among the nodes, and why they are refused."""
    for node in nodes:
        product = products.get(node.name)
        if product is not None and product.multiplications > LARGE:
            shapes = f"{list(product.left_shape)} x {list(product.right_shape)}"
            yield product.call, product.call.refuse(
                f"a product of two computed tensors {shapes}, no part of a decode step's attention",
                "load the model with attn_implementation='sdpa', where it has one",
            )


# --- attention ---


@dataclass(frozen=True)
class _Scores:
    """factor * cap(inner * product) + mask, where cap is tanh when `inner` is given, else nothing."""

    load: E.Load
    factor: float = 1.0
    inner: float | None = None
    mask: Expr | None = None


def _attention(imp: Importer, call: Call, weights: View, values: View) -> View | None:
    """The product as an Attention, or None when it is something else."""
    if len(call.shape) != 4 or len(weights.shape) != 4 or len(values.shape) != 4:
        return None
    if call.dtype is DType.F64:
        return None
    batch, heads, tokens, width = call.shape
    if tokens != 1 and batch * tokens > MAX_QUERIES:
        return None
    b, h, s, d = E.var("b", batch), E.var("h", heads * tokens), E.var("s", weights.shape[3]), E.var("d", width)
    row = (point(b), *head_and_token(h, tokens), point(s))
    reader = _Reader(imp)
    weight = reader.unrounded(weights.load(broadcast(weights.shape, (batch, heads, tokens, s.size), row)))
    softmax = imp.softmaxes.get(weight.buffer) if isinstance(weight, E.Load) else None
    if softmax is None or softmax.dim != len(softmax.shape) - 1 or softmax.shape[-1] != s.size:
        return None
    if weight.index[-1] is not row[-1] or any(s in e.free for e in weight.index[:-1]):
        return None
    scores = reader.scores(E.substitute(softmax.element, dict(zip(variables(softmax.shape), weight.index))))
    if scores is None or scores.load.index != row:
        return None
    product = imp.products[scores.load.buffer]
    if product.left_shape[-1] != width or product.call.shape != (batch, heads, tokens, s.size):
        return None
    query = _element(product.left, product.left_shape, (batch, heads, tokens, width), (*row[:3], point(d)))
    key_at = _stored(product.right, product.right_shape, (batch, heads, width, s.size), (0, 1, 3, 2))
    value_at = _stored(values.load(points(values.shape)), values.shape, (batch, heads, s.size, width), (0, 1, 2, 3))
    if key_at is None or value_at is None:
        return None
    at = (point(b), point(h), point(s), point(d))
    loads = [*E.loads(query), *(E.loads(scores.mask) if scores.mask is not None else ())]
    read = {key_at(at)[0], value_at(at)[0], *(x.buffer for x in loads)}
    if not reader.are_newest(read):
        return None  # written since: what was computed from them cannot be computed here again
    cap = None if scores.inner is None else scores.factor
    scale = scores.factor * (1.0 if scores.inner is None else scores.inner)
    if cap is not None and cap <= 0:
        return None
    return attend(
        imp, call, (b, h, s, d), tokens, heads, query, key_at, value_at, scale=scale, mask=scores.mask, softcap=cap
    )  # fmt: skip


def _element(e: Expr, shape: Shape, to: Shape, at: Index) -> Expr:
    """e, over the variables of `shape`, at a point of the shape that it is broadcast to."""
    return E.substitute(e, dict(zip(variables(shape), broadcast(shape, to, at))))


def _stored(e: Expr, shape: Shape, to: Shape, order: tuple[int, ...]) -> Stored | None:
    """Where element (batch, head, token, width) of a stored tensor lies, its dimensions being in another order."""
    if not isinstance(e, E.Load):
        return None

    def at(index: Index) -> tuple[str, Index]:
        found = _element(e, shape, to, tuple(index[k] for k in order))
        assert isinstance(found, E.Load)
        return found.buffer, found.index

    return at


class _Reader:
    """Follows expressions back through the nodes that were imported so far."""

    def __init__(self, imp: Importer) -> None:
        self.imp = imp
        self.made = {n.out: n for n in imp.nodes if isinstance(n, RowMap)}
        self.known: dict[Expr, _Scores | None] = {}

    def unrounded(self, e: Expr) -> Expr:
        """e without casts between floats on top of it, computed from what its buffers were computed from, up to
        products and softmaxes."""
        while True:
            if isinstance(e, E.Op) and e.name == "cast" and e.dtype.is_float and e.children[0].dtype.is_float:
                e = e.children[0]
                continue
            if not isinstance(e, E.Load) or e.buffer in self.imp.products or e.buffer in self.imp.softmaxes:
                return e
            node = self.made.get(e.buffer)
            if node is None or node.store != points(self.imp.buffers[e.buffer].shape) or E.reductions(node.body):
                return e
            e = E.substitute(node.body, dict(zip(node.dims, e.index)))

    def scores(self, e: Expr) -> _Scores | None:
        """e as scaled, capped and masked elements of one product."""
        if e not in self.known:
            self.known[e] = self._scores(self.unrounded(e))
        return self.known[e]

    def _scores(self, e: Expr) -> _Scores | None:
        if isinstance(e, E.Load):
            return _Scores(e) if e.buffer in self.imp.products else None
        if not isinstance(e, E.Op):
            return None
        if e.name in ("mul", "div"):
            x, c = e.children if isinstance(e.children[1], E.Const) else reversed(e.children)
            found = self.scores(x) if isinstance(c, E.Const) and (e.name == "mul" or c is e.children[1]) else None
            if found is None or found.mask is not None:
                return None
            return replace(found, factor=found.factor * c.value if e.name == "mul" else found.factor / c.value)
        if e.name == "tanh":
            found = self.scores(e.children[0])
            if found is None or found.mask is not None or found.inner is not None:
                return None
            return replace(found, inner=found.factor, factor=1.0)
        if e.name == "add":
            left, right = map(self.scores, e.children)
            if (left is None) == (right is None):
                return None
            return self._masked(left or right, e.children[1] if left else e.children[0])
        if e.name == "where":
            condition, kept, other = e.children
            if isinstance(kept, E.Const):
                condition, kept, other = op("not", condition), other, kept
            other, found = self.unrounded(other), self.scores(kept)
            if found is None or not isinstance(other, E.Const) or other.value > IGNORED:
                return None
            return self._masked(found, E.where(condition, E.const(0.0, DType.F32), E.const(other.value, DType.F32)))
        return None

    @staticmethod
    def _masked(scores: _Scores | None, mask: Expr) -> _Scores:
        assert scores is not None
        mask = convert(mask, DType.F32)
        return replace(scores, mask=mask if scores.mask is None else op("add", scores.mask, mask))

    def are_newest(self, names: Iterable[str]) -> bool:
        """Whether no buffer among these has been overwritten by a later version."""
        newest = {b.storage: name for name, b in self.imp.buffers.items()}
        return all(newest[self.imp.buffers[name].storage] == name for name in names)
