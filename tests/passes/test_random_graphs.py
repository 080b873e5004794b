"""Random graphs of pointwise, view, reduction, matrix and in-place nodes: passes keep results and end states."""

from __future__ import annotations

import interpreter
import torch
from graphs import Builder, T, points
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpk_dynamo.ir import expr as E
from mpk_dynamo.ir.graph import Graph
from mpk_dynamo.ir.types import BufferKind, DType
from mpk_dynamo.passes.graph import PASSES

WIDTHS = (4, 8)
UNARY = ("neg", "tanh", "abs", "sin", "relu", "sigmoid")
BINARY = ("add", "sub", "mul", "max")


class Drawn:
    """A graph under random construction: a pool of tensors of shape [tokens, width] or [tokens, 1]."""

    def __init__(self, choose: object, tokens: int) -> None:
        self.choose, self.tokens, self.g = choose, tokens, Builder()
        self.pool = [self.g.caller(f"x{w}", (tokens, w), DType.BF16, BufferKind.INPUT) for w in WIDTHS]
        self.states = [self.g.caller(f"s{w}", (tokens, w), DType.BF16, BufferKind.STATE) for w in WIDTHS]
        self.newest = {x.name: x for x in self.states}

    def pick(self, options: object) -> object:
        return self.choose(st.sampled_from(list(options)))  # type: ignore[operator, call-overload]

    def tensor(self, width: int | None = None) -> T:
        pool = [x for x in (*self.pool, *self.newest.values()) if width is None or x.shape[-1] in (width, 1)]
        recent = pool[-4:] if self.pick((True, True, False)) else pool
        return self.pick(recent)  # type: ignore[return-value]

    def step(self) -> None:
        g, x = self.g, self.tensor()
        width = x.shape[-1]
        kind = self.pick("unary unary binary binary mean cast halves turn copy linear linear gate write shift".split())
        if kind == "unary":
            made = g.op(self.pick(UNARY), x)  # type: ignore[arg-type]
        elif kind == "binary":
            made = g.op(self.pick(BINARY), x, self.tensor(width if width > 1 else None))  # type: ignore[arg-type]
        elif kind == "mean":
            made = g.mean(g.to(x, DType.F32))
        elif kind == "cast":
            made = g.to(x, self.pick((DType.F32, DType.BF16)))  # type: ignore[arg-type]
        elif kind == "halves" and width > 1:
            made = g.cat(g.op("neg", g.slice(x, width // 2, width)), g.slice(x, 0, width // 2))
        elif kind == "turn" and width > 1:
            made = g.view(g.transpose(g.view(x, (self.tokens, 2, width // 2)), 1, 2), x.shape)
        elif kind == "linear" and width > 1 and x.dtype is DType.BF16:
            made = self.linear(x)
        elif kind == "gate" and width > 1 and x.dtype is DType.BF16:
            made = g.op("mul", g.silu(self.linear(x, 8)), self.linear(x, 8))
        elif kind in ("write", "shift"):
            return self.write(self.pick(self.states), shift=kind == "shift")  # type: ignore[arg-type]
        else:
            made = g.view(x, x.shape)
        self.pool.append(made)

    def linear(self, x: T, rows: int | None = None) -> T:
        rows = rows or self.pick(WIDTHS)  # type: ignore[assignment]
        weight = self.g.caller(f"w{len(self.g.buffers)}", (rows, x.shape[-1]), DType.BF16)
        return self.g.linear(x, weight)

    def write(self, state: T, shift: bool) -> None:
        """A new version of a state: from a tensor of its width, or from itself turned by one."""
        g, old = self.g, self.newest[state.name]
        at = points(old.shape)
        if shift:
            n = E.index(old.shape[-1])
            source = g.emit(old.shape, g.at(old, (*at[:-1], E.op("mod", E.op("add", at[-1], E.index(1)), n))))
        else:
            source = g.to(g.op("add", old, self.tensor(old.shape[-1])), DType.BF16)
        self.newest[state.name] = g.assign(old, g.at(source, at))

    def graph(self) -> Graph:
        made = {n.out for n in self.g.nodes if hasattr(n, "out")} | {
            p.out for n in self.g.nodes for p in getattr(n, "parts", ())
        }
        inner = [x for x in self.pool if x.name in made]
        outputs = {x.name: x for x in [*inner[-2:], *(v for v in self.newest.values() if "@" in v.name)]}
        return self.g.graph(*outputs.values())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_passes_keep_results(data: st.DataObject) -> None:
    drawn = Drawn(data.draw, data.draw(st.sampled_from((1, 1, 2))))
    for _ in range(data.draw(st.integers(3, 22))):
        drawn.step()
    graph = drawn.graph()
    inputs = interpreter.random_memory(graph)
    expected, kept = interpreter.run(graph, inputs)
    after = graph
    for graph_pass in PASSES:
        after = graph_pass(after)
    got, kept_after = interpreter.run(after, inputs)
    for a, b in [*zip(expected, got, strict=True), *((kept[n], kept_after[n]) for n in kept)]:
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert len(after.nodes) <= len(graph.nodes) + 1
