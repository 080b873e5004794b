"""Rule G2 for buffers and nodes: shapes, types and sizes agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..ir.expr import Expr, Var, linear_terms, loads
from ..ir.graph import Attention, ExtensionNode, Linear, LinearPart, Node, RowMap, reads, writes
from ..ir.types import Buffer, BufferKind, DType, contiguous_strides
from .expr_rules import INTEGERS, Broken, Expressions
from .index_bounds import injective

FLOATS = (DType.BF16, DType.F16, DType.F32, DType.F64)


def check_buffer(b: Buffer, buffers: Mapping[str, Buffer]) -> None:
    """Sizes, layout and storage of one buffer."""
    if len(b.strides) != len(b.shape) or any(s < 0 for s in b.shape):
        raise Broken(f"buffer {b.name}: shape {list(b.shape)}, strides {list(b.strides)}")
    if b.kind in (BufferKind.SCRATCH, BufferKind.OUTPUT):
        if b.storage != b.name:
            raise Broken(f"{b.kind.value} {b.name} lies in the storage of {b.storage}")
        if b.numel and any(
            s != want for n, s, want in zip(b.shape, b.strides, contiguous_strides(b.shape), strict=True) if n > 1
        ):
            raise Broken(f"{b.kind.value} {b.name} of shape {list(b.shape)} has strides {list(b.strides)}")
    if b.storage == b.name:
        return
    first = buffers.get(b.storage)
    if b.kind is not BufferKind.STATE or first is None or first.kind is not BufferKind.STATE:
        raise Broken(f"{b.kind.value} {b.name} lies in the storage of {b.storage}, which is no state")
    if (b.shape, b.strides, b.dtype) != (first.shape, first.strides, first.dtype):
        raise Broken(f"state version {b.name} differs from {b.storage} in shape, strides or dtype")
    if not _separate(b):
        raise Broken(
            f"state {b.name} of shape {list(b.shape)}, strides {list(b.strides)} is written but overlaps itself"
        )


def _separate(b: Buffer) -> bool:
    """Whether different indices are different elements, by a sufficient condition: strides that nest."""
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(b.shape, b.strides, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def check_node(node: Node, buffers: Mapping[str, Buffer], ex: Expressions) -> None:
    """Raise Broken when a node does not fit its buffers."""
    kinds: dict[type, Callable[..., None]] = {RowMap: _row_map, Linear: _linear, Attention: _attention}
    if isinstance(node, ExtensionNode):
        return _extension(node, buffers, ex)
    if type(node) not in kinds:
        raise Broken(f"unknown node {type(node).__name__}")
    kinds[type(node)](node, buffers, ex)


def _distinct(variables: tuple[Var, ...]) -> None:
    if len(set(variables)) != len(variables) or len({v.name for v in variables}) != len(variables):
        raise Broken(f"loop variables {[v.name for v in variables]} are not distinct")


def _stores(
    store: tuple[Expr, ...],
    out: str,
    scope: tuple[Var, ...],
    buffers: Mapping[str, Buffer],
    ex: Expressions,
    count: int | None = None,
) -> None:
    """A store index; all of `out` is written unless it is a state. count: elements of `out` that all its stores
    together reach, where that is more than this one."""
    b = buffers[out]
    ex.index(store, b, scope, "store to")
    size = math.prod(v.size for v in scope)
    if not _one_to_one(store, b, scope):
        raise Broken(f"store to {out}: several values of {[v.name for v in scope]} give the same element")
    if b.kind is not BufferKind.STATE and any(loads(e) for e in store):
        raise Broken(f"only the device knows which elements of {out} are stored, so the rest may stay unset")
    if b.kind is not BufferKind.STATE and b.numel != (size if count is None else count):
        raise Broken(f"{size if count is None else count} elements are stored to {out}, which has {b.numel}")


def _one_to_one(store: tuple[Expr, ...], b: Buffer, scope: tuple[Var, ...]) -> bool:
    """False when two values of `scope` provably store to one element. Data-dependent positions are trusted."""
    terms: dict[Expr, int] = {}
    for e, step in zip(store, contiguous_strides(b.shape), strict=True):
        for term, factor in linear_terms(e)[0].items():
            terms[term] = terms.get(term, 0) + factor * step
    reach = 0
    wide = {v for v in scope if v.size > 1}
    if {t for t in terms if not isinstance(t, Var) or t.size > 1} == wide:
        # the flat position is a sum of variables whose steps nest, as digits do
        for factor, v in sorted(((abs(terms[v]), v) for v in wide), key=lambda x: (x[0], x[1].name)):
            if factor <= reach:
                break
            reach += factor * (v.size - 1)
        else:
            return True
    return injective(store, scope) is not False


def _row_map(node: RowMap, buffers: Mapping[str, Buffer], ex: Expressions) -> None:
    _distinct(node.dims)
    ex.check(node.body, buffers[node.out].dtype, node.dims)
    _stores(node.store, node.out, node.dims, buffers, ex)


def _linear(node: Linear, buffers: Mapping[str, Buffer], ex: Expressions) -> None:
    _distinct((node.t, node.k))
    if not node.parts:
        raise Broken("a linear without parts")
    ex.check(node.x, FLOATS, (node.t, node.k))
    total: dict[str, int] = {}
    for p in node.parts:
        total[p.out] = total.get(p.out, 0) + node.t.size * p.rows
    for p in node.parts:
        for name in p.weights:
            _weight(buffers[name], p, node)
        if not p.weights:
            raise Broken(f"the part for {p.out} has no weight")
        _distinct((node.t, p.n))
        ex.check(p.epilogue, buffers[p.out].dtype, (node.t, p.n), accs=len(p.weights))
        _stores(p.store, p.out, (node.t, p.n), buffers, ex, total[p.out])


def _weight(w: Buffer, p: LinearPart, node: Linear) -> None:
    wanted = (node.k.size, p.rows) if node.transposed else (p.rows, node.k.size)
    if w.shape != wanted:
        raise Broken(f"weight {w.name} of shape {list(w.shape)} is not {list(wanted)}")
    if w.dtype is not node.x.dtype:
        raise Broken(f"weight {w.name} is {w.dtype.value}, its input {node.x.dtype.value}")
    if wanted[1] > 1 and w.strides[1] != 1:
        raise Broken(f"weight {w.name} has strides {list(w.strides)}; the inner one must be 1")


def _attention(node: Attention, buffers: Mapping[str, Buffer], ex: Expressions) -> None:
    b, h, g, s, d = node.b, node.h, node.g, node.s, node.d
    _distinct((b, h, g, s, d))
    if h.size % g.size:
        raise Broken(f"{h.size} query heads are no multiple of {g.size} key heads")
    if not math.isfinite(node.scale):
        raise Broken(f"scale {node.scale}")
    if node.softcap is not None and not 0 < node.softcap < math.inf:
        raise Broken(f"softcap {node.softcap}")
    ex.check(node.q, FLOATS, (b, h, d))
    for name, index in ((node.keys, node.key_index), (node.values, node.value_index)):
        if buffers[name].dtype not in FLOATS:
            raise Broken(f"cache {name} is {buffers[name].dtype.value}")
        ex.index(index, buffers[name], (b, g, s, d), "index of")
    if buffers[node.out].dtype not in FLOATS:
        raise Broken(f"output {node.out} is {buffers[node.out].dtype.value}")
    _stores(node.store, node.out, (b, h, d), buffers, ex)
    if node.mask is not None:
        ex.check(node.mask, (DType.BOOL, *FLOATS), (b, h, s))
    for limit in (node.first, node.last):
        if limit is not None:
            ex.check(limit, INTEGERS, (b,))
    if node.append is not None:
        a = node.append
        ex.check(a.position, INTEGERS, (b,))
        for value, old, new in ((a.key, node.keys, a.keys), (a.value, node.values, a.values)):
            ex.check(value, buffers[new].dtype, (b, g, d))
            if buffers[new].storage != buffers[old].storage:
                raise Broken(f"the append writes {new}, which is no version of {old}")


def _extension(node: ExtensionNode, buffers: Mapping[str, Buffer], ex: Expressions) -> None:
    """What can be said without knowing what the node does: its expressions are sound, over variables of their own,
    and it does not read memory that it overwrites, which would ask for an order between its elements."""
    for e in node.expressions():
        ex.check(e, None, tuple(e.free))
    stored = {buffers[name].storage for name in writes(node)}
    both = sorted(name for name in reads(node) if buffers[name].storage in stored)
    if not stored:
        raise Broken("it writes nothing")
    if both:
        raise Broken(f"it reads {both} and writes the same memory")
