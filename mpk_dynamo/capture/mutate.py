"""In-place operators: on a caller's tensor they make its next version, on an internal one a new buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ir import expr as E
from ..ir.expr import Expr, op
from ..ir.graph import RowMap
from ..ops.evaluate import TORCH_DTYPE
from .create import fill_value
from .pointwise import evaluated
from .registry import LOWERINGS, Call, lowers
from .rules import RULES
from .values import View, bounded, broadcast, convert, points, variables

if TYPE_CHECKING:
    from .importer import Importer


def write(imp: Importer, call: Call, target: View, body: Expr) -> View:
    """Store body, over the variables of target.shape and in its dtype, into every element of a view."""
    memory = target.memory
    imp.before_write(memory, call.origin)
    if memory.caller:
        if _repeats(target):
            raise call.refuse("writes to an expanded tensor, whose elements share memory")
        imp.store(call, target, variables(target.shape), body, target.base(points(target.shape)))
        return target
    if not target.whole:
        body = _spread(call, target, body)
    _rebind(imp, call, target, body)
    return target


def _rebind(imp: Importer, call: Call, target: View, body: Expr) -> None:
    """Give an internal memory a new buffer with elements `body`, over the variables of the memory's shape."""
    memory = target.memory
    name = imp.fresh(call.name)
    imp.declare(name, memory.dtype, memory.shape, call.origin)
    imp.nodes.append(RowMap(name, variables(memory.shape), body, name, points(memory.shape), call.origin))
    memory.buffer = name


def _repeats(target: View) -> bool:
    """Whether some dimension of a view does not move in memory."""
    used = set().union(*(e.free for e in target.index)) if target.index else set()
    return any(v.size > 1 and v not in used for v in variables(target.shape))


def _spread(call: Call, target: View, body: Expr) -> Expr:
    """A body over a view as a body over its whole memory: the old element where the view does not reach. The view
    must be made of slices, selections and transpositions: each index a variable times a step plus a start."""
    memory, at = target.memory, points(target.memory.shape)
    inverse: dict[E.Var, Expr] = {v: E.index(0) for v in variables(target.shape)}
    conditions: list[Expr] = []
    for e, here, size in zip(target.index, at, memory.shape, strict=True):
        terms, start = E.linear_terms(e)
        if not terms:
            conditions.append(op("eq", here, E.index(start)))
            continue
        (v, step), *more = terms.items()
        if more or not isinstance(v, E.Var) or step <= 0:
            raise call.refuse("writes through a view that is not made of slices")
        offset = op("sub", here, E.index(start))
        if (start, step, v.size) != (0, 1, size):
            conditions += [op("ge", offset, E.index(0)), op("lt", offset, E.index(v.size * step))]
            if step != 1:
                conditions.append(op("eq", op("mod", offset, E.index(step)), E.index(0)))
        inverse[v] = bounded(op("floordiv", offset, E.index(step)), 0, v.size - 1)
    if _repeats(target):
        raise call.refuse("writes to an expanded tensor, whose elements share memory")
    new = E.substitute(body, inverse)
    old = View(memory, memory.shape, at).load(at)
    return _chosen(conditions, new, old)


def _chosen(conditions: list[Expr], new: Expr, old: Expr) -> Expr:
    condition: Expr | None = None
    for test in conditions:
        if isinstance(test, E.Const):
            if not test.value:
                return old
        else:
            condition = test if condition is None else op("and", condition, test)
    return new if condition is None else E.where(condition, new, old)


def in_place(imp: Importer, call: Call) -> View:
    """A pointwise operator whose result goes into its first operand."""
    target: View = call["self"]
    renamed = Call(call.node, "div.rounding", call.arguments) if call.get("rounding_mode") is not None else call
    value = evaluated(renamed, target.shape)
    if not torch.can_cast(TORCH_DTYPE[value.dtype], TORCH_DTYPE[target.dtype]):  # eager raises, when it comes to it
        raise call.refuse(f"its result is {value.dtype.value}, the tensor that it is written to {target.dtype.value}")
    return write(imp, call, target, convert(value, target.dtype))


for _name in tuple(RULES):
    if "." not in _name and not _name.endswith("_") and f"{_name}_" not in LOWERINGS:
        LOWERINGS[f"{_name}_"] = in_place


@lowers("copy_")
def copy(imp: Importer, call: Call) -> View:
    target, source = call["self"], call["src"]
    value = source.load(broadcast(source.shape, target.shape, points(target.shape)))
    return write(imp, call, target, convert(value, target.dtype))


@lowers("fill_", "zero_")
def fill(imp: Importer, call: Call) -> View:
    target: View = call["self"]
    return write(imp, call, target, fill_value(call.get("value", 0), target.dtype))


@lowers("index_copy_", "index_copy")
def index_copy(imp: Importer, call: Call) -> View:
    target, rows, source = call["self"], call["index"], call["source"]
    if source.dtype is not target.dtype:
        raise call.refuse(f"source is {source.dtype.value}, the tensor {target.dtype.value}")
    if call.op == "index_copy":
        target = imp.copy(call, target)
    if not target.shape:
        return write(imp, call, target, source.load(points(source.shape)))
    dim = call["dim"] % len(target.shape)
    dims = points(source.shape)
    row = convert(rows.load((dims[dim],) if rows.shape else ()), E.DType.I64)
    return scatter(imp, call, target, dim, row, source)


def scatter(imp: Importer, call: Call, target: View, dim: int, row: Expr, source: View) -> View:
    """target[.., row(i), ..] = source[.., i, ..] along `dim`; row is over the variables of source.shape."""
    dims, at = variables(source.shape), points(source.shape)
    imp.before_write(target.memory, call.origin)
    if target.memory.caller:
        store = target.base((*at[:dim], row, *at[dim + 1 :]))
        imp.store(call, target, dims, source.load(at), store)
        return target
    if source.shape[dim] != 1 or not target.whole:
        raise call.refuse("writes several computed rows of an internal tensor")
    here = points(target.shape)
    body = source.load((*here[:dim], E.index(0), *here[dim + 1 :]))
    _rebind(imp, call, target, _chosen([op("eq", here[dim], row)], body, target.load(here)))
    return target


@lowers("index_put_", "_index_put_impl_")
def index_put(imp: Importer, call: Call) -> View:
    """tensor[:, i] = values, with one integer index tensor of at most one dimension."""
    target, values = call["self"], call["values"]
    given = [(d, v) for d, v in enumerate(call["indices"]) if v is not None]
    if call.get("accumulate"):
        raise call.refuse("accumulates")
    if len(given) != 1 or given[0][1].dtype is E.DType.BOOL or len(given[0][1].shape) > 1:
        raise call.refuse("only one integer index of at most one dimension is captured")
    dim, index = given[0]
    size = target.shape[dim]
    count = index.shape[0] if index.shape else 1
    shape = (*target.shape[:dim], count, *target.shape[dim + 1 :])
    if index.shape:
        spread = values.through(shape, broadcast(values.shape, shape, points(shape)))
    else:
        without = (*target.shape[:dim], *target.shape[dim + 1 :])
        at = points(shape)
        spread = values.through(shape, broadcast(values.shape, without, (*at[:dim], *at[dim + 1 :])))
    at = points(shape)
    row = convert(index.load((at[dim],) if index.shape else ()), E.DType.I64)
    row = wrapped(row, size)
    if values.dtype is not target.dtype:
        raise call.refuse(f"values are {values.dtype.value}, the tensor {target.dtype.value}")
    return scatter(imp, call, target, dim, row, spread)


def wrapped(index: Expr, size: int) -> Expr:
    """A Python index: negative ones count from the end."""
    known = E.bounds(index)
    if known is not None and known[0] >= 0:
        return index
    return E.where(op("lt", index, E.index(0)), op("add", index, E.index(size)), index)


__all__ = ["write", "scatter", "wrapped"]
