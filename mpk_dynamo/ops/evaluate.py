"""The torch renderer of scalar expressions: an Expr over ranges of its variables becomes a few torch calls."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..ir.expr import Expr, Var, loads
from ..ir.types import Buffer
from .access import Ranges
from .plan import TORCH_DTYPE, Compiler, Indexed, Layout, Plan, Strided, flat_of, view_of

__all__ = ["TORCH_DTYPE", "Assignment", "compile_assignment", "compile_exprs", "evaluate"]


def compile_exprs(exprs: Sequence[Expr], ranges: Ranges, buffers: Mapping[str, Buffer], accumulators: int = 0) -> Plan:
    """A plan for several expressions over the same ranges; common sub-expressions are computed once."""
    names = dict.fromkeys(n for e in exprs for n in _loaded(e))
    layouts = tuple((n, (buffers[n].shape, buffers[n].strides)) for n in names)
    return _compiled(tuple(exprs), tuple(ranges.items()), layouts, accumulators)


@functools.lru_cache(maxsize=8192)
def _compiled(
    exprs: tuple[Expr, ...],
    ranges: tuple[tuple[Var, tuple[int, int]], ...],
    layouts: tuple[tuple[str, Layout], ...],
    accumulators: int,
) -> Plan:
    compiler = Compiler(dict(ranges), dict(layouts), accumulators)
    return compiler.plan([compiler.value(e) for e in exprs])


@functools.lru_cache(maxsize=8192)
def _loaded(expr: Expr) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ld.buffer for ld in loads(expr)))


@dataclass(frozen=True)
class Assignment:
    """`out[store] = body` over ranges, in two phases so that a task can read everything before it writes."""

    plan: Plan
    out: str
    address: Strided | Indexed
    expanded: tuple[int, ...]

    def compute(
        self, memory: Mapping[str, torch.Tensor], accumulators: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        """[value, index tensors ...]; the value may be a view of memory."""
        return self.plan(memory, accumulators, memory[self.out].device)

    def commit(self, memory: Mapping[str, torch.Tensor], computed: list[torch.Tensor]) -> None:
        value = computed[0]
        if isinstance(self.address, Strided):
            view_of(memory[self.out], self.address).copy_(value)
            return
        target = memory[self.out]
        if self.address.extent is not None:
            target = flat_of(target, self.address.extent)
        target[tuple(computed[1:])] = value.expand(self.expanded)

    def __call__(self, memory: Mapping[str, torch.Tensor], accumulators: Sequence[torch.Tensor] = ()) -> None:
        self.commit(memory, self.compute(memory, accumulators))


def compile_assignment(
    body: Expr,
    out: str,
    store: tuple[Expr, ...],
    ranges: Ranges,
    buffers: Mapping[str, Buffer],
    accumulators: int = 0,
) -> Assignment:
    """Compile `out[store] = body` over ranges."""
    names = {out, *_loaded(body), *(n for e in store for n in _loaded(e))}
    layouts = {n: (buffers[n].shape, buffers[n].strides) for n in names}
    compiler = Compiler(ranges, layouts, accumulators)
    value = compiler.value(body)
    address = compiler.address(out, store)
    full = compiler.full
    if isinstance(address, Strided):
        # broadcasting of copy_ needs every dimension that the value has
        address = Strided(
            (*(1,) * (len(full) - len(address.size)), *address.size),
            (*(0,) * (len(full) - len(address.stride)), *address.stride),
            address.offset,
        )
        return Assignment(compiler.plan([value]), out, address, full)
    return Assignment(compiler.plan([value, *address.parts]), out, address, full)


def evaluate(
    expr: Expr,
    ranges: Ranges,
    memory: Mapping[str, torch.Tensor],
    accumulators: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """The values of `expr` for all points of `ranges` (an ordered mapping of variables to half-open ranges).

    Returns a tensor with one dimension per variable, of size 1 where `expr` does not depend on it, in the dtype of
    `expr`. It may be a view of memory. `accumulators[j]` is Acc(j), shaped like the ranges.
    Raises IndexError for an index outside its buffer, KeyError for a free variable without a range.
    """
    layouts = tuple((n, (tuple(memory[n].shape), tuple(memory[n].stride()))) for n in _loaded(expr))
    return _compiled((expr,), tuple(ranges.items()), layouts, len(accumulators))(memory, accumulators)[0]
