"""Operators: what each kind of node means and how it is cut into tasks. One file per operator."""

from __future__ import annotations

from ..ir.graph import Attention, Linear, Node, RowMap
from .attention import AttentionOperator
from .linear import LinearOperator
from .row_map import RowMapOperator
from .spec import Operator

OPERATORS: dict[type, Operator] = {
    RowMap: RowMapOperator(),
    Linear: LinearOperator(),
    Attention: AttentionOperator(),
}


def operator_of(node: Node) -> Operator:
    """The operator of a node, by its type. Raises KeyError for a type nobody registered."""
    return OPERATORS[type(node)]
