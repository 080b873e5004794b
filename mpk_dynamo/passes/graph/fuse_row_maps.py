"""Join chains of pointwise and row-reduction nodes."""

from __future__ import annotations

from ...ir.graph import Graph, RowMap
from .flow import Flow
from .inline_prologues import inline_single_readers


def fuse_row_maps(graph: Graph) -> Graph:
    """A RowMap that only one other RowMap reads becomes part of it. Runs before prologues are formed, so that an
    activation written in many steps is one node that `fuse_epilogues` can take."""
    flow = Flow(graph)
    inline_single_readers(flow, RowMap)
    return flow.graph("fuse_row_maps")
