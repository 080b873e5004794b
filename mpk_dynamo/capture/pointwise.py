"""How the table of pointwise operators is applied: ATen name -> scalar expression.

Operands are converted to torch's common type, computed in its wide type (f32 for bf16 and f16) and rounded once to
the type of the result, as eager does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import elementwise_dtypes

from ..ir.expr import Expr
from ..ops.evaluate import TORCH_DTYPE
from . import arithmetic, logic, unary  # noqa: F401  (they fill the table)
from .registry import LOWERINGS, Call, lowers
from .rules import RULES, SAME, TRUTH, Kind
from .values import DTYPES, View, broadcast, constant, convert, points, wide

if TYPE_CHECKING:
    from .importer import Importer


@lru_cache(maxsize=4096)
def _promoted(kind: Kind, signature: tuple[Any, ...]) -> torch.dtype:
    """Common type of operands given as (dtype, is 0-d) for tensors and a Python type for numbers."""
    numbers = {bool: True, int: 1, float: 1.0}
    fakes = [numbers[s] if isinstance(s, type) else torch.empty(() if s[1] else (1,), dtype=s[0]) for s in signature]
    return elementwise_dtypes(*fakes, type_promotion_kind=SAME if kind is TRUTH else kind)[1]


def evaluated(call: Call, shape: tuple[int, ...], arguments: dict[str, Any] | None = None) -> Expr:
    """The element of a pointwise call at the variables of `shape`, in its wide type, not yet rounded."""
    name = call.op if call.op in RULES else call.op.rstrip("_")
    found = RULES[name]
    values = [(arguments or call.arguments).get(x) for x in found.operands]
    signature = tuple(
        (TORCH_DTYPE[v.dtype], not v.shape) if isinstance(v, View) else type(v) for v in values if v is not None
    )
    if any(isinstance(s, type) and s not in (bool, int, float) for s in signature):
        raise call.refuse(f"operands {[getattr(s, '__name__', s) for s in signature]}")
    common = DTYPES.get(_promoted(found.kind, signature))
    if common is None:
        raise call.refuse("complex arithmetic")
    at = points(shape)
    operands: list[Expr | None] = []
    for v in values:
        if isinstance(v, View):
            element = convert(v.load(broadcast(v.shape, shape, at)), common)
            operands.append(convert(element, wide(common)))
        elif v is not None:
            # comparisons look at numbers rounded to the tensor's type, arithmetic keeps them in the wide type
            exact = torch.tensor(v, dtype=TORCH_DTYPE[common]).item() if found.kind is TRUTH else v
            operands.append(constant(exact, wide(common)))
        else:
            operands.append(None)
    return found.body(call, *operands)


def lower(imp: "Importer", call: Call) -> View:
    """Import a pointwise call whose result is a new tensor."""
    kept = _unchanged(call)
    if kept is not None:
        return imp.copy(call, kept)
    return imp.emit(call, convert(evaluated(call, call.shape), call.dtype))


def _unchanged(call: Call) -> View | None:
    """The operand that the call only copies: x * 1, x / 1, integer x + 0, x ** 1."""
    if call.op not in ("mul", "div", "add", "sub", "pow") or call.get("rounding_mode") is not None:
        return None
    x, y = call.get("self"), call.get("exponent" if call.op == "pow" else "other")
    if not isinstance(x, View) or x.dtype is not call.dtype or x.shape != call.shape or isinstance(y, (View, bool)):
        return None
    neutral = 0 if call.op in ("add", "sub") else 1
    return x if y == neutral and (neutral or not x.dtype.is_float) else None


def _overloaded(imp: "Importer", call: Call) -> View:
    """`div` with a rounding mode is another rule than without."""
    if call.get("rounding_mode") is not None:
        call = Call(call.node, "div.rounding", call.arguments)
    return lower(imp, call)


@lowers("to", "_to_copy", "type_as", "float", "half", "bfloat16", "to_dense")
def _to(imp: "Importer", call: Call) -> View:
    source: View = call.get("self", call.get("input"))
    if call.value.device != call.fake(0).device and source.memory.body is None:
        raise call.refuse(f"moves a tensor from {call.fake(0).device} to {call.value.device}")
    if call.dtype is source.dtype:
        return source if call.aliases else imp.copy(call, source)
    return imp.emit(call, convert(source.load(points(source.shape)), call.dtype))


for _key in RULES:
    if "." not in _key:
        LOWERINGS[_key] = _overloaded if _key in ("div", "divide") else lower


@lru_cache(maxsize=1)
def names() -> frozenset[str]:
    """Every operator of the table."""
    return frozenset(RULES)
