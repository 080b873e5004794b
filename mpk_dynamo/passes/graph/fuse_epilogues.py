"""Move pointwise work on the result of a Linear into its epilogue: bias, activation, gate, residual, cast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...ir import expr as E
from ...ir.expr import Expr
from ...ir.graph import Graph, Linear, LinearPart, RowMap
from .flow import Flow
from .policy import DEPTH_LIMIT
from .rewrite import flat_index, replace_loads, solve_flat


def fuse_epilogues(graph: Graph) -> Graph:
    """A RowMap that reads each element of a part's output once, at the point where it computes one element, becomes
    part of the epilogue, when nothing else reads that output and nothing else that the RowMap reads waits for the
    Linear. When it reads several parts so, they become one part with joint weights (gate and up)."""
    flow = Flow(graph)
    for i, node in flow:
        while isinstance(node, Linear):
            fused = _fused_once(i, node, flow)
            if fused is None:
                break
            node = fused
    return flow.graph("fuse_epilogues")


def _fused_once(i: int, node: Linear, flow: Flow) -> Linear | None:
    for part in node.parts:
        readers = flow.readers(part.out)
        if len(readers) != 1 or not flow.is_internal(part.out):
            continue
        reader = flow[readers[0]]
        if not isinstance(reader, RowMap) or reader.body.reduces:
            continue
        joined = _joined(node, reader, flow)
        if joined is None or not flow.can_join((i, readers[0])) or not flow.overwrites_only_what_it_read(joined):
            continue
        flow.join((readers[0],), i, joined)
        return joined
    return None


def _joined(node: Linear, reader: RowMap, flow: Flow) -> Linear | None:
    """`node` with `reader` as the epilogue of the part or parts that it reads."""
    addresses = (*reader.store, *(i for ld in E.loads(reader.body) for i in ld.index))
    if any(not e.buffers.isdisjoint(p.out for p in node.parts) for e in addresses):
        return None
    if reader.body.depth + max(p.epilogue.depth for p in node.parts) > DEPTH_LIMIT:
        return None
    read = [p for p in node.parts if p.out in reader.body.buffers]
    rows, outs = read[0].rows, {p.out for p in read}
    t: Expr = E.index(0) if node.t.size == 1 else node.t
    n: Expr = E.index(0) if rows == 1 else read[0].n
    point = E.op("add", E.op("mul", t, E.index(rows)), n)
    elements = [ld for ld in E.loads(reader.body) if ld.buffer in outs]
    positions = {flat_index(ld.index, flow.buffers[ld.buffer].strides) for ld in elements}
    if len(positions) != 1 or any(not _is_row_major(p, point, flow) for p in read):
        return None
    if any(flow.readers(p.out) != flow.readers(read[0].out) or not flow.is_internal(p.out) for p in read):
        return None
    dims = solve_flat(positions.pop(), reader.dims, node.t.size * rows, point)
    if dims is None:
        return None
    values: dict[str, Callable[[tuple[Expr, ...]], Expr]] = {}
    weights: tuple[str, ...] = ()
    for p in read:
        values[p.out] = _constantly(_renumbered(p.epilogue, len(weights)))
        weights += p.weights
    fused = LinearPart(
        weights=weights,
        rows=rows,
        epilogue=replace_loads(E.substitute(reader.body, dims), values),
        out=reader.out,
        store=tuple(E.substitute(e, dims) for e in reader.store),
        origin=" & ".join(dict.fromkeys(p.origin for p in read if p.origin)),
    )
    parts = tuple(fused if p is read[0] else p for p in node.parts if p is read[0] or p not in read)
    return replace(node, parts=parts)


def _is_row_major(part: LinearPart, point: Expr, flow: Flow) -> bool:
    """Whether element (t, n) of the part lies at `point` = t * rows + n of its output. Not so for parts with another
    number of rows than `point` is for: their n is another variable."""
    return flat_index(part.store, flow.buffers[part.out].strides) is point


def _renumbered(epilogue: Expr, by: int) -> Expr:
    return E.transform(epilogue, lambda e: E.acc(e.which + by) if isinstance(e, E.Acc) else None)


def _constantly(value: Expr) -> Callable[[tuple[Expr, ...]], Expr]:
    return lambda index: value
