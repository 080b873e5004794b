"""Graph passes: from one node per operator of the model to the few fused nodes of a decode step."""

from __future__ import annotations

from collections.abc import Callable

from ...ir.graph import Graph
from .absorb_append import absorb_append
from .drop_dead import drop_dead
from .find_live_keys import find_live_keys
from .flatten_buffers import flatten_buffers
from .fuse_epilogues import fuse_epilogues
from .fuse_row_maps import fuse_row_maps
from .group_heads import group_heads
from .inline_prologues import inline_prologues
from .inline_views import inline_views
from .merge_duplicates import merge_duplicates
from .merge_linears import merge_linears
from .narrow_buffers import narrow_buffers
from .normalise_loops import normalise_loops
from .order import order

GraphPass = Callable[[Graph], Graph]

PASSES: tuple[GraphPass, ...] = (
    drop_dead,
    normalise_loops,
    inline_views,
    merge_duplicates,
    group_heads,
    merge_linears,
    absorb_append,
    fuse_epilogues,
    fuse_row_maps,
    fuse_epilogues,  # what was several steps before is one node now
    narrow_buffers,
    inline_prologues,
    flatten_buffers,
    normalise_loops,
    find_live_keys,
    order,
)

__all__ = ["PASSES", "GraphPass"]
