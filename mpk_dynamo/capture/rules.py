"""What a rule of the pointwise table is. The table itself: unary.py, arithmetic.py, logic.py; how it is applied:
pointwise.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind

from ..ir.expr import Expr
from .values import constant

SAME, FLOAT, TRUTH, LONG = Kind.DEFAULT, Kind.INT_TO_FLOAT, Kind.ALWAYS_BOOL, Kind.BOOL_TO_LONG


@dataclass(frozen=True)
class Rule:
    """body(call, *operands) over the arguments named `operands`, promoted together by `kind`. An operand that is
    None stays None."""

    operands: tuple[str, ...]
    kind: Kind
    body: Callable[..., Expr]


RULES: dict[str, Rule] = {}


def rule(names: str, operands: str, kind: Kind = SAME) -> Callable[[Callable[..., Expr]], Callable[..., Expr]]:
    def register(body: Callable[..., Expr]) -> Callable[..., Expr]:
        for name in names.split():
            RULES[name] = Rule(tuple(operands.split()), kind, body)
        return body

    return register


def scalar(value: float, like: Expr) -> Expr:
    """A number of the type of `like`."""
    return constant(value, like.dtype)
