"""The compiler behind `evaluate`: expressions over ranges of their variables become a list of torch calls.

A `Plan` is compiled once for (expressions, ranges) and then run on any memory of the declared layout: loads whose
index is affine (checked on the symbols, else on the numbers) become strided views, other data-independent indices
become constants, and everything that does not depend on memory is folded. Values are tensors with one dimension per
range variable, of size 1 where the value does not depend on it; variables of reductions are dimensions in front.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.expr import Acc, Const, Expr, Load, Op, Reduce, Var, bounds, linear_terms
from ..ir.types import DType
from .access import Ranges

TORCH_DTYPE = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
}

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""(shape, strides) of a buffer, in elements."""

Step = Callable[[list[Any], Mapping[str, torch.Tensor]], None]

_LOGICAL = {"and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not}
_BITWISE = {"and": torch.bitwise_and, "or": torch.bitwise_or, "not": torch.bitwise_not}
_NAMED = {"max": torch.maximum, "min": torch.minimum, "floordiv": torch.floor_divide, "mod": torch.remainder}
_REDUCE = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}


def torch_function(name: str, operand: DType) -> Callable[..., torch.Tensor]:
    """The torch function of an operator of ir.expr, for operands of that type."""
    if name in _LOGICAL:
        return (_LOGICAL if operand is DType.BOOL else _BITWISE)[name]
    if name == "div" and not operand.is_float:
        return functools.partial(torch.div, rounding_mode="trunc")
    return _NAMED.get(name) or getattr(torch, name)


@dataclass(frozen=True)
class Value:
    """A compiled sub-expression: its slot, static shape, and its tensor when it does not depend on memory."""

    slot: int
    shape: tuple[int, ...]
    constant: torch.Tensor | None = None


@dataclass(frozen=True)
class Strided:
    """An address that is a strided view of the buffer; `offset` in elements from its start."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Indexed:
    """An address by one index tensor per dimension, or by one flat index tensor into `extent` elements."""

    parts: tuple[Value, ...]
    shape: tuple[int, ...]
    extent: int | None = None


@dataclass(frozen=True)
class Plan:
    """Compiled expressions. Call with memory (and accumulators) to get one tensor per expression."""

    steps: tuple[Step, ...]
    initial: tuple[Any, ...]
    results: tuple[int, ...]
    probe: str | None  # a buffer that is read, to know the device
    shapes: tuple[tuple[int, ...], ...]
    _placed: dict[torch.device, list[Any]] = field(default_factory=dict, compare=False, repr=False)

    def __call__(
        self,
        memory: Mapping[str, torch.Tensor],
        accumulators: Sequence[torch.Tensor] = (),
        device: torch.device | None = None,
    ) -> list[torch.Tensor]:
        if device is None:
            anchor = memory[self.probe] if self.probe else accumulators[0] if accumulators else None
            device = torch.device("cpu") if anchor is None else anchor.device
        placed = self._placed.get(device)
        if placed is None:
            placed = [c.to(device) if isinstance(c, torch.Tensor) else c for c in self.initial]
            self._placed[device] = placed
        slots = placed.copy()
        slots[: len(accumulators)] = accumulators
        for step in self.steps:
            step(slots, memory)
        return [slots[r] for r in self.results]


class Compiler:
    """Compiles expressions over one set of ranges into the steps of a Plan.

    Raises IndexError when an index outside a `where` leaves its buffer, KeyError for a variable without a range.
    """

    def __init__(self, ranges: Ranges, layouts: Mapping[str, Layout], accumulators: int = 0) -> None:
        self.layouts = layouts
        self.rank = len(ranges)
        self.env = {v: (i - self.rank, start, stop) for i, (v, (start, stop)) in enumerate(ranges.items())}
        self.full = tuple(stop - start for start, stop in ranges.values())
        self.initial: list[Any] = [None] * accumulators
        self.steps: list[Step] = []
        self.probe: str | None = None
        self._memo: dict[tuple[Any, ...], Value] = {}

    def plan(self, results: Iterable[Value]) -> Plan:
        """The plan that computes these values, each brought to one dimension per range variable."""
        done = [self._pad(v) for v in results]
        return Plan(tuple(self.steps), tuple(self.initial), tuple(v.slot for v in done), self.probe,
                    tuple(v.shape for v in done))

    def value(self, e: Expr, guarded: bool = False, env: Mapping[Var, tuple[int, int, int]] | None = None) -> Value:
        """Compile `e`. `guarded`: it stands in a branch of a `where`, so an index may leave its buffer, in which
        case it is clamped and the element discarded."""
        env = self.env if env is None else env
        try:
            key = (e, *((v, env[v]) for v in sorted(e.free, key=lambda v: (v.name, v.size))))
        except KeyError as missing:
            raise KeyError(f"variable {missing.args[0]!r} of {e!r} has no range") from None
        for checked in (False, guarded):
            if (checked, key) in self._memo:
                return self._memo[checked, key]
        out = self._memo[guarded, key] = self._compile(e, guarded, env)
        return out

    def _compile(self, e: Expr, guarded: bool, env: Mapping[Var, tuple[int, int, int]]) -> Value:
        if isinstance(e, Const):
            return self._constant(torch.tensor(e.value, dtype=TORCH_DTYPE[e.dtype]))
        if isinstance(e, Var):
            dim, start, stop = env[e]
            return self._constant(torch.arange(start, stop).reshape(-1, *(1,) * (-dim - 1)))
        if isinstance(e, Acc):
            return Value(e.which, self.full)
        if isinstance(e, Load):
            return self._load(e, guarded, env)
        if isinstance(e, Reduce):
            return self._reduce(e, guarded, env)
        assert isinstance(e, Op)
        if e.name == "where":
            return self._where(e, guarded, env)
        args = [self.value(c, guarded, env) for c in e.children]
        if e.name == "cast":
            dtype = TORCH_DTYPE[e.dtype]
            return self._apply(lambda x: x.to(dtype), args)
        fn = torch_function(e.name, e.children[0].dtype)
        if e.name == "pow" and isinstance(e.children[1], Const):
            exponent = e.children[1].value  # torch multiplies for small integral exponents given as numbers
            return self._apply(lambda x: torch.pow(x, exponent), args[:1])
        return self._apply(fn, args)

    def _where(self, e: Op, guarded: bool, env: Mapping[Var, tuple[int, int, int]]) -> Value:
        condition = self.value(e.children[0], guarded, env)
        if condition.constant is not None:
            if condition.constant.all():
                return self.value(e.children[1], guarded, env)
            if not condition.constant.any():
                return self.value(e.children[2], guarded, env)
        return self._apply(torch.where, [condition, *(self.value(c, True, env) for c in e.children[1:])])

    def _reduce(self, e: Reduce, guarded: bool, env: Mapping[Var, tuple[int, int, int]]) -> Value:
        size = e.var.size
        outer = env.get(e.var)
        shared = outer is not None and outer[1:] == (0, size)
        # a reduction over a variable that also runs freely over its whole range shares that dimension and its loads
        dim = outer[0] if shared else min([-self.rank, *(d for d, _, _ in env.values())]) - 1
        body = self.value(e.body, guarded, env if shared else {**env, e.var: (dim, 0, size)})
        if len(body.shape) < -dim or body.shape[dim] == 1:  # the body does not vary: torch would reduce one element
            if not shared and len(body.shape) >= -dim:  # a reduction inside it has left the dimension behind
                body = self._apply(lambda x: x.squeeze(dim), [body], (dim, False))
            if e.name != "sum":
                return body
            count = self._constant(torch.tensor(size, dtype=TORCH_DTYPE[e.dtype]))
            return self._apply(torch.mul, [body, count])
        fn, dtype = _REDUCE[e.name], TORCH_DTYPE[e.dtype]
        if e.name == "sum":
            return self._apply(lambda x: torch.sum(x, dim, keepdim=shared, dtype=dtype), [body], (dim, shared))
        return self._apply(lambda x: fn(x, dim, keepdim=shared), [body], (dim, shared))

    def _load(self, e: Load, guarded: bool, env: Mapping[Var, tuple[int, int, int]]) -> Value:
        self.probe = self.probe or e.buffer
        address = self.address(e.buffer, e.index, guarded, env)
        name = e.buffer
        if isinstance(address, Strided):
            return self._emit(lambda out: strided_step(name, address, out), address.size)
        return self._emit(lambda out: indexed_step(name, address, out), address.shape)

    def address(
        self,
        buffer: str,
        index: tuple[Expr, ...],
        guarded: bool = False,
        env: Mapping[Var, tuple[int, int, int]] | None = None,
    ) -> Strided | Indexed:
        """Where `buffer[index]` lies, for loads and for stores."""
        env = self.env if env is None else env
        shape, strides = self.layouts[buffer]
        found = _affine(index, shape, strides, env)
        if found is not None:
            return found
        parts = [self.value(i, guarded, env) for i in index]
        if all(p.constant is not None for p in parts):
            return self._fixed(buffer, index, parts, guarded)
        if guarded:
            parts = [
                p if p.constant is not None and _inside(p.constant, size) else self._clamp(p, size)
                for p, size in zip(parts, shape, strict=True)
            ]
        parts = [p if i.dtype is DType.I64 else self._apply(torch.Tensor.long, [p])
                 for i, p in zip(index, parts, strict=True)]
        return Indexed(tuple(parts), tuple(torch.broadcast_shapes(*(p.shape for p in parts))))

    def _fixed(self, buffer: str, index: tuple[Expr, ...], parts: list[Value], guarded: bool) -> Strided | Indexed:
        """A data-independent index: one flat index tensor, or a view where its numbers turn out affine."""
        shape, strides = self.layouts[buffer]
        flat = torch.zeros((), dtype=torch.int64)
        for i, part, size, stride in zip(index, parts, shape, strides, strict=True):
            at = part.constant
            if not _inside(at, size):
                if not guarded:
                    raise IndexError(f"index {i!r} leaves dimension of size {size} of {buffer}")
                at = at.clamp(0, size - 1)
            flat = flat + at * stride
        origin = int(flat.reshape(-1)[0]) if flat.numel() else 0
        steps = [int(flat.select(d, 1).reshape(-1)[0]) - origin if flat.shape[d] > 1 else 0 for d in range(flat.dim())]
        guess = torch.tensor(origin)
        for d, step in enumerate(steps):
            guess = guess + (torch.arange(flat.shape[d]) * step).reshape(-1, *(1,) * (flat.dim() - 1 - d))
        if min(steps, default=0) >= 0 and torch.equal(guess, flat):
            return Strided(tuple(flat.shape), tuple(steps), origin)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return Indexed((self._constant(flat),), tuple(flat.shape), extent)

    def _clamp(self, part: Value, size: int) -> Value:
        return self._apply(lambda x: x.clamp(0, size - 1), [part])

    def _constant(self, tensor: torch.Tensor) -> Value:
        self.initial.append(tensor)
        return Value(len(self.initial) - 1, tuple(tensor.shape), tensor)

    def _apply(
        self, fn: Callable[..., torch.Tensor], args: list[Value], reduced: tuple[int, bool] | None = None
    ) -> Value:
        if all(a.constant is not None for a in args):
            return self._constant(fn(*(a.constant for a in args)))
        shape = list(torch.broadcast_shapes(*(a.shape for a in args)))
        if reduced:
            dim, keep = reduced
            shape[dim:dim + 1 or None] = [1] if keep else []
        slots = tuple(a.slot for a in args)
        return self._emit(lambda out: call_step(fn, slots, out), tuple(shape))

    def _emit(self, make: Callable[[int], Step], shape: tuple[int, ...]) -> Value:
        self.initial.append(None)
        out = len(self.initial) - 1
        self.steps.append(make(out))
        return Value(out, shape)

    def _pad(self, v: Value) -> Value:
        if len(v.shape) == self.rank:
            return v
        shape = (*(1,) * (self.rank - len(v.shape)), *v.shape)
        return self._apply(lambda x: x.reshape(shape), [v]) if v.constant is not None else self._emit(
            lambda out: call_step(lambda x: x.reshape(shape), (v.slot,), out), shape
        )


def _inside(index: torch.Tensor, size: int) -> bool:
    return index.numel() == 0 or (int(index.min()) >= 0 and int(index.max()) < size)


def _affine(
    index: tuple[Expr, ...],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    env: Mapping[Var, tuple[int, int, int]],
) -> Strided | None:
    ranges = {v: (start, stop) for v, (_, start, stop) in env.items()}
    steps: dict[Var, int] = {}
    offset = 0
    for e, size, stride in zip(index, shape, strides, strict=True):
        limits = bounds(e, ranges)
        if limits is None or limits[0] < 0 or limits[1] >= size:
            return None
        terms, constant = linear_terms(e)
        if not all(isinstance(t, Var) for t in terms):
            return None
        offset += constant * stride
        for v, c in terms.items():
            steps[v] = steps.get(v, 0) + c * stride
    if min(steps.values(), default=0) < 0:
        return None  # torch has no negative strides
    rank = max((-env[v][0] for v in steps), default=0)
    sizes, view = [1] * rank, [0] * rank
    for v, step in steps.items():
        dim, start, stop = env[v]
        sizes[dim], view[dim] = stop - start, step
        offset += start * step
    return Strided(tuple(sizes), tuple(view), offset)


def view_of(tensor: torch.Tensor, address: Strided) -> torch.Tensor:
    """The view of a tensor at a strided address."""
    return tensor.as_strided(address.size, address.stride, tensor.storage_offset() + address.offset)


def flat_of(tensor: torch.Tensor, extent: int) -> torch.Tensor:
    """The memory from a tensor's first to its last element, as one dimension."""
    return tensor.as_strided((extent,), (1,), tensor.storage_offset())


def strided_step(name: str, address: Strided, out: int) -> Step:
    size, stride, offset = address.size, address.stride, address.offset

    def step(slots: list[Any], memory: Mapping[str, torch.Tensor]) -> None:
        tensor = memory[name]
        slots[out] = tensor.as_strided(size, stride, tensor.storage_offset() + offset)

    return step


def indexed_step(name: str, address: Indexed, out: int) -> Step:
    slot_ids, extent = [p.slot for p in address.parts], address.extent
    if extent is not None:
        flat = slot_ids[0]

        def step(slots: list[Any], memory: Mapping[str, torch.Tensor]) -> None:
            slots[out] = flat_of(memory[name], extent)[slots[flat]]
    else:

        def step(slots: list[Any], memory: Mapping[str, torch.Tensor]) -> None:
            slots[out] = memory[name][tuple([slots[i] for i in slot_ids])]

    return step


def call_step(fn: Callable[..., torch.Tensor], args: tuple[int, ...], out: int) -> Step:
    if len(args) == 1:
        (a,) = args

        def step(slots: list[Any], memory: Mapping[str, torch.Tensor]) -> None:
            slots[out] = fn(slots[a])
    elif len(args) == 2:
        a, b = args

        def step(slots: list[Any], memory: Mapping[str, torch.Tensor]) -> None:
            slots[out] = fn(slots[a], slots[b])
    else:

        def step(slots: list[Any], memory: Mapping[str, torch.Tensor]) -> None:
            slots[out] = fn(*[slots[i] for i in args])

    return step
