"""From the graph of a decode step to that of a step of a loop: it chooses the next token and feeds the next step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import Unsupported
from ..ir.expr import Expr, Var, cast, const, index, load, op, reduce, var, where
from ..ir.graph import Graph, Node, RowMap
from ..ir.types import Buffer, BufferKind, DType, buffer
from ..ops.argmax import Argmax
from ..ops.choice import Choice
from ..ops.draw import NUMBERS
from .state import CAPACITY, MAX_EOS, Sampling

ORIGIN = "generate"
"""Place in the model of what is added."""


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
    loop = _Builder(graph)
    batch, vocab, logits = loop.logits(feed.logits)
    tokens = loop.fed(feed.tokens)
    if tokens.dtype is not DType.I64 or tokens.shape != (batch, 1):
        raise Unsupported(f"the loop feeds int64 tokens [{batch}, 1], found {_form(tokens)}")
    chosen = _choose(loop, logits, batch, vocab, sampling)
    _record(loop, tokens, chosen, batch, vocab, "penalty" in sampling.stages)
    for name in feed.positions:
        _advance_position(loop, loop.fed(name))
    for name in feed.masks:
        _advance_mask(loop, loop.fed(name), batch)
    return loop.finish()


class _Builder:
    """A graph to which nodes are added."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.nodes: list[Node] = list(graph.nodes)
        self.buffers: dict[str, Buffer] = dict(graph.buffers)

    def add(self, kind: BufferKind, name: str, dtype: DType, *shape: int) -> Buffer:
        made = self.buffers[name] = buffer(name, dtype, shape, kind, origin=ORIGIN)
        return made

    def step(self) -> Buffer:
        """How many tokens have been chosen."""
        return self.buffers.get("loop.step") or self.add(BufferKind.STATE, "loop.step", DType.I64)

    def at(self, b: Buffer, *idx: Expr | int) -> Expr:
        return load(b.name, tuple(index(i) if isinstance(i, int) else i for i in idx), b.dtype)

    def newest(self, storage: Buffer) -> Buffer:
        """The last version of a STATE."""
        return [b for b in self.buffers.values() if b.storage == storage.storage][-1]

    def map(self, name: str, dims: tuple[Var, ...], body: Expr, out: Buffer, *store: Expr | int) -> Buffer:
        """out[store] = body. For a STATE, its next version, which is returned."""
        if out.kind is BufferKind.STATE:
            version = sum(b.storage == out.storage for b in self.buffers.values())
            out = replace(out, name=f"{out.storage}@{version}")
            self.buffers[out.name] = out
        idx = tuple(index(i) if isinstance(i, int) else i for i in store)
        name, taken = f"loop_{name}", {n.name for n in self.nodes}
        if name in taken:  # a second mask, say
            name = next(n for k in range(2, len(taken) + 3) if (n := f"{name}_{k}") not in taken)
        self.nodes.append(RowMap(name, dims, body, out.name, idx, ORIGIN))
        return out

    def logits(self, output: int) -> tuple[int, int, str]:
        """(batch, vocabulary, name) of the logits, which become internal."""
        name = self._graph.outputs[output].buffer
        b = self.buffers[name] if name is not None else None
        if b is None or not b.dtype.is_float or b.kind is not BufferKind.OUTPUT or b.storage != b.name:
            raise Unsupported(f"output {output} of the graph is no fresh floating-point tensor of logits")
        if any(other.storage == name for other in self.buffers.values() if other.name != name):
            raise Unsupported("the logits are returned as several views")
        if len(b.shape) not in (2, 3) or (len(b.shape) == 3 and b.shape[1] != 1):
            raise Unsupported(f"the loop takes logits [B, 1, V] or [B, V], found {list(b.shape)}")
        self.buffers[name] = replace(b, kind=BufferKind.SCRATCH)
        return b.shape[0], b.shape[-1], name

    def fed(self, name: str) -> Buffer:
        """An input as a STATE that the loop may write."""
        b = self.buffers.get(name)
        if b is None:
            raise Unsupported(f"the step does not read {name}, which the loop should feed")
        if b.kind is BufferKind.INPUT:
            if any(n > 1 and s == 0 for n, s in zip(b.shape, b.strides)):
                raise Unsupported(f"{name} is an expanded tensor", remedy="pass a contiguous one")
            for other in [x for x in self.buffers.values() if x.storage == b.storage]:
                self.buffers[other.name] = replace(other, kind=BufferKind.STATE)
        elif b.kind is not BufferKind.STATE:
            raise Unsupported(f"{name} is no input of the step but a {b.kind.value}")
        return self.newest(self.buffers[b.storage])

    def finish(self) -> Graph:
        return self._graph.replace("append_loop", nodes=tuple(self.nodes), buffers=self.buffers, outputs=())


def _form(b: Buffer) -> str:
    return f"{b.dtype.value} {list(b.shape)}"


def _choose(loop: _Builder, logits: str, batch: int, vocab: int, sampling: Sampling) -> Buffer:
    """[B] i64: the next token, not knowing of sequences that are finished."""
    stages = sampling.stages
    b, v = var("i0", batch), var("i1", vocab)
    raw = loop.buffers[logits]
    x = loop.at(raw, b, *((0,) if len(raw.shape) == 3 else ()), v)
    numbers = loop.add(BufferKind.INPUT, "loop.numbers", DType.F64, len(NUMBERS))

    def number(name: str) -> Expr:
        return cast(loop.at(numbers, NUMBERS[name]), DType.F32)

    if "penalty" in stages:
        seen = loop.add(BufferKind.STATE, "loop.seen", DType.BOOL, batch, vocab)
        x, p = cast(x, DType.F32), number("penalty")
        penalised = where(op("lt", x, const(0.0, DType.F32)), op("mul", x, p), op("div", x, p))
        x = where(loop.at(seen, b, v), penalised, x)
    if "min_new_tokens" in stages:
        barred = loop.add(BufferKind.INPUT, "loop.barred", DType.BOOL, vocab)
        least = loop.add(BufferKind.INPUT, "loop.least", DType.I64, 1)
        early = op("and", loop.at(barred, v), op("lt", loop.at(loop.step()), loop.at(least, 0)))
        x = where(early, const(float("-inf"), DType.F32), cast(x, DType.F32))
    if "temperature" in stages:
        x = op("div", cast(x, DType.F32), number("temperature"))
    scores = loop.map("scores", (b, v), x, loop.add(BufferKind.SCRATCH, "loop.scores", x.dtype, batch, vocab), b, v)
    chosen = loop.add(BufferKind.SCRATCH, "loop.chosen", DType.I64, batch)
    if "sample" in stages:
        key = loop.add(BufferKind.INPUT, "loop.key", DType.I64, 1)
        step = loop.step()
        sequences = loop.add(BufferKind.INPUT, "loop.sequences", DType.I64, batch)
        flags = {s: s in stages for s in ("top_k", "top_p", "min_p")}
        operands = scores.name, numbers.name, key.name, step.name, sequences.name, chosen.name
        loop.nodes.append(Choice("loop_choice", *operands, **flags, origin=ORIGIN))
    else:
        loop.nodes.append(Argmax("loop_argmax", scores.name, chosen.name, origin=ORIGIN))
    return chosen


def _record(loop: _Builder, fed: Buffer, chosen: Buffer, batch: int, vocab: int, penalty: bool) -> None:
    """Write down the token of each sequence, and whether it finishes it."""
    b, e, other = var("i0", batch), var("r0", MAX_EOS), var("r0", batch)
    finished = loop.add(BufferKind.STATE, "loop.finished", DType.BOOL, batch)
    pad, eos = (
        loop.add(BufferKind.INPUT, "loop.pad", DType.I64, 1),
        loop.add(BufferKind.INPUT, "loop.eos", DType.I64, MAX_EOS),
    )
    step = loop.step()
    everything = loop.add(BufferKind.STATE, "loop.tokens", DType.I64, batch, CAPACITY)
    token = loop.add(BufferKind.SCRATCH, "loop.token", DType.I64, batch)
    loop.map("token", (b,), where(loop.at(finished, b), loop.at(pad, 0), loop.at(chosen, b)), token, b)
    loop.map("feed", (b,), loop.at(token, b), fed, b, 0)
    loop.map("record", (b,), loop.at(token, b), everything, b, loop.at(step))
    if penalty:
        loop.map("mark", (b,), const(True, DType.BOOL), loop.buffers["loop.seen"], b, loop.at(token, b))
    ends = reduce("max", e, where(op("eq", loop.at(eos, e), loop.at(token, b)), index(1), index(0)))
    ended = op("or", loop.at(finished, b), op("ne", ends, index(0)))
    finished = loop.map("finish", (b,), ended, finished, b)
    done = loop.add(BufferKind.STATE, "loop.done", DType.I64)
    loop.map("done", (), reduce("min", other, where(loop.at(finished, other), index(1), index(0))), done)
    loop.map("step", (), op("add", loop.at(step), index(1)), step)


def _advance_position(loop: _Builder, b: Buffer) -> None:
    if b.dtype is not DType.I64:
        raise Unsupported(f"the loop advances int64 positions, found {b.name}: {_form(b)}")
    dims = tuple(var(f"i{n}", size) for n, size in enumerate(b.shape))
    loop.map("position", dims, op("add", loop.at(b, *dims), index(1)), b, *dims)


def _advance_mask(loop: _Builder, b: Buffer, batch: int) -> None:
    """The first key after the last visible one becomes visible. When there is none the cache is full, and the mask of a
    further step means nothing."""
    if b.dtype is not DType.BOOL and not b.dtype.is_float or len(b.shape) < 2 or b.shape[0] not in (1, batch):
        raise Unsupported(f"the loop advances bool or float masks [B, ..., keys], found {b.name}: {_form(b)}")
    if any(n != 1 for n in b.shape[1:-1]):
        raise Unsupported(f"the loop advances masks that heads share, found {b.name}: {_form(b)}")
    rows = b.shape[0]
    row, keys = var("i0", rows), b.shape[-1]
    key = var("r0", keys)
    middle = (0,) * (len(b.shape) - 2)
    value = loop.at(b, row, *middle, key)
    wide = b.dtype if b.dtype is DType.BOOL else DType.F32
    visible = value if wide is DType.BOOL else op("eq", cast(value, wide), const(0.0, wide))
    last = loop.add(BufferKind.SCRATCH, f"{b.storage}.last", DType.I64, rows)
    loop.map("last_key", (row,), reduce("max", key, where(visible, key, index(-1))), last, row)
    at = op("min", op("add", loop.at(last, row), index(1)), index(keys - 1))
    shown = const(True, wide) if wide is DType.BOOL else cast(const(0.0, wide), b.dtype)
    loop.map("mask", (row,), shown, b, row, *middle, at)
