"""From the graph of a decode step to that of a step of a loop: it chooses the next token and feeds the next step."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Graph
from .state import Sampling


@dataclass(frozen=True)
class Feed:
    """What of a captured step the loop feeds; storages by name.

    tokens: int64 [B, 1], the ids that the step embeds. positions: int64 tensors that grow by one with each step. masks:
    bool or float [B, ..., keys], True or 0 where a key is visible; the next key becomes visible with each step. logits:
    which of graph.outputs they are, [B, 1, V] or [B, V].
    """

    tokens: str
    positions: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    logits: int = 0


def append_loop(graph: Graph, feed: Feed, sampling: Sampling) -> Graph:
    """The step followed by the choice of the next token and the advance of what it is fed.

    Fed inputs become STATE and hold what the next step is fed afterwards; the graph returns nothing. Storages named
    `loop.*` are those of LoopState. Raises Unsupported for an input it does not know how to advance.
    """
    raise NotImplementedError
