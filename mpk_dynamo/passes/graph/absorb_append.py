"""Let an Attention append to its cache itself, so that it need not wait for the cache to be written."""

from __future__ import annotations

from dataclasses import replace

from ...ir import expr as E
from ...ir.expr import Expr
from ...ir.graph import Append, Attention, Graph, RowMap
from ...ir.types import BufferKind
from .flow import Flow


def absorb_append(graph: Graph) -> Graph:
    """Where keys and values were just written at one position (`index_copy_` of one token) and nothing else reads
    the new versions, the Attention takes over both writes and reads the versions before them. Rows other than the
    position are the same in both versions, so this is exact."""
    flow = Flow(graph)
    for i, node in flow:
        if not isinstance(node, Attention) or node.append is not None or node.keys == node.values:
            continue
        key_writer, value_writer = _appender(node.keys, i, flow), _appender(node.values, i, flow)
        if key_writer is None or value_writer is None:
            continue
        found_key = _appended_row(node, flow[key_writer], node.key_index, flow)
        found_value = _appended_row(node, flow[value_writer], node.value_index, flow)
        if found_key is None or found_value is None or found_key[0] is not found_value[0]:
            continue
        old_keys, old_values = flow.overwritten(node.keys), flow.overwritten(node.values)
        if old_keys is None or old_values is None:
            continue
        append = Append(found_key[0], found_key[1], found_value[1], node.keys, node.values)
        absorbed = replace(node, keys=old_keys, values=old_values, append=append)
        group = (key_writer, value_writer, i)
        if flow.can_join(group) and flow.overwrites_only_what_it_read(absorbed):
            flow.join(group, i, absorbed)
    return flow.graph("absorb_append")


def _appender(name: str, reader: int, flow: Flow) -> int | None:
    """The RowMap that wrote this version, when only `reader` reads it."""
    writer = flow.writer(name)
    if writer is None or flow.buffers[name].kind is not BufferKind.STATE or flow.readers(name) != [reader]:
        return None
    return writer if isinstance(flow[writer], RowMap) else None


def _appended_row(node: Attention, writer: object, index: tuple[Expr, ...], flow: Flow) -> tuple[Expr, Expr] | None:
    """(position(b), element(b, g, d)) when `writer` writes the row at s == position, in full, and nothing else."""
    assert isinstance(writer, RowMap)
    shape = flow.buffers[writer.out].shape
    dims: dict[E.Var, Expr] = {v: E.index(0) for v in writer.dims if v.size == 1}
    position: Expr | None = None
    for at, stored, size in zip(index, writer.store, shape, strict=True):
        if at is node.s:
            if position is not None:
                return None
            position = stored
        elif node.s in at.free:
            return None
        elif isinstance(stored, E.Var):
            if stored in dims or stored.size != size:
                return None  # a part of the row, or a diagonal
            dims[stored] = at
        elif not (size == 1 and isinstance(stored, E.Const)):
            return None
    if position is None or not dims.keys() >= set(writer.dims):
        return None
    position = E.substitute(position, dims)
    if not position.free <= {node.b}:
        return None
    return position, E.substitute(writer.body, dims)
