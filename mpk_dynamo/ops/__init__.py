"""Operators: what each kind of node means and how it is cut into tasks. One file per operator."""

from __future__ import annotations

from ..ir.graph import Attention, ExtensionNode, Linear, Node, RowMap
from .argmax import Argmax, ArgmaxOperator
from .attention import AttentionOperator
from .choice import Choice, ChoiceOperator
from .linear import LinearOperator
from .row_map import RowMapOperator
from .spec import Operator

OPERATORS: dict[type, Operator] = {
    RowMap: RowMapOperator(),
    Linear: LinearOperator(),
    Attention: AttentionOperator(),
    Argmax: ArgmaxOperator(),
    Choice: ChoiceOperator(),
}


def register(node_type: type[ExtensionNode], operator: Operator) -> None:
    """Add an operator for a node type of your own. Raises TypeError when the type is no ExtensionNode, ValueError
    when it has an operator already."""
    if not (isinstance(node_type, type) and issubclass(node_type, ExtensionNode)):
        raise TypeError(f"{node_type!r} is no subclass of ir.graph.ExtensionNode")
    if node_type in OPERATORS:
        raise ValueError(f"{node_type.__name__} already has the operator {OPERATORS[node_type].name!r}")
    OPERATORS[node_type] = operator


def operator_of(node: Node) -> Operator:
    """The operator of a node, by its type. Raises KeyError for a type nobody registered."""
    return OPERATORS[type(node)]
