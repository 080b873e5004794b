"""Graph: the captured computation as a list of nodes in execution order.

Every value is a Buffer in `Graph.buffers`; nodes name buffers. Each buffer that is not the caller's is written by
one node. A STATE tensor has one Buffer per version: `keys` as the caller passed it, `keys@1` after the first
mutation. A node that writes `keys@1` reads and overwrites the memory of `keys` in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .expr import Expr, Var, loads
from .types import Buffer, BufferKind


@dataclass(frozen=True)
class RowMap:
    """out[store(dims)] = body(dims), for every value of `dims`: any fused pointwise, view, gather, row-reduction
    or scatter computation. `body` and `store` are over `dims` (Vars named i0, i1, ...). The dtype of `body` is
    that of `out`. Elements of `out` that `store` does not reach keep their value (only for STATE)."""

    name: str
    dims: tuple[Var, ...]
    body: Expr
    out: str
    store: tuple[Expr, ...]
    origin: str = ""


@dataclass(frozen=True)
class LinearPart:
    """One output of a Linear: for each token t and row n in [0, rows):
    acc_j = sum_k x[t, k] * weights[j][n, k] in fp32, out[store(t, n)] = epilogue(t, n, acc_0, acc_1, ...).

    `weights` are [rows, K] with unit stride in K, or [K, rows] with unit stride in rows where the Linear is
    `transposed`. Several of them are joint: they share the epilogue (gate and up).
    `epilogue` is over Vars t and n and the leaves Acc(j); its dtype is that of `out`.
    """

    weights: tuple[str, ...]
    rows: int
    epilogue: Expr
    out: str
    store: tuple[Expr, ...]
    origin: str = ""

    @property
    def n(self) -> Var:
        from .expr import var

        return var("n", self.rows)


@dataclass(frozen=True)
class Linear:
    """x @ weight.T for one or several weights that share x. `x` is the prologue: an expression over Vars t
    (tokens) and k (depth) that may hold reductions over k, such as RMSNorm. dtype of x: that of the weights.
    transposed: all weights are stored [K, rows] (x @ weight)."""

    name: str
    t: Var
    k: Var
    x: Expr
    parts: tuple[LinearPart, ...]
    origin: str = ""
    transposed: bool = False


@dataclass(frozen=True)
class Append:
    """A cache append absorbed by an Attention: row `position(b)` of both caches becomes key(b, g, d) and
    value(b, g, d). `keys`, `values` name the written versions."""

    position: Expr
    key: Expr
    value: Expr
    keys: str
    values: str


@dataclass(frozen=True)
class Attention:
    """One query token against a cache:
    out[store(b, h, d)] = sum_s softmax_s(scale * q(b, h, :) . K(b, g, s, :) + mask(b, h, s)) * V(b, g, s, d),
    g = h // (h.size // g.size), in fp32, rounded once to the dtype of `out`.

    K(b, g, s, d) is `keys[key_index]`, with key_index over (b, g, s, d); V likewise. With `append`, the element at
    s == position is the appended one. `mask` is None, bool (False: ignore the key) or float (added). Only keys in
    [first(b), last(b)) are live when these are given. A query with no live key gives zeros. With `softcap` c > 0,
    the scaled score x is capped, c * tanh(x / c), before the mask.
    """

    name: str
    b: Var
    h: Var
    g: Var
    s: Var
    d: Var
    q: Expr
    keys: str
    key_index: tuple[Expr, ...]
    values: str
    value_index: tuple[Expr, ...]
    scale: float
    out: str
    store: tuple[Expr, ...]
    mask: Expr | None = None
    first: Expr | None = None
    last: Expr | None = None
    append: Append | None = None
    softcap: float | None = None
    origin: str = ""


class ExtensionNode:
    """Base class of node types from outside this package (see ops.register). The package knows of such a node only
    what it answers here, and takes what it does with its memory from the accesses its tasks declare. Graph passes
    leave it and the buffers it touches as they are.

    A subclass is a frozen dataclass with at least `name` and `origin`. Other fields hold Exprs, numbers, names of
    buffers, and tuples and dataclasses of these: every string but `name` and `origin` is the name of a buffer. It
    writes all elements of what it writes, and reads no storage that it writes.
    """

    name: str
    origin: str

    def expressions(self) -> tuple[Expr, ...]:
        """Every expression it holds, in a fixed order."""
        return ()

    def reads(self) -> tuple[str, ...]:
        """Buffers it reads besides those its expressions load from."""
        return ()

    def writes(self) -> tuple[str, ...]:
        """Buffers it writes."""
        raise NotImplementedError(f"{type(self).__name__}.writes")


Node = RowMap | Linear | Attention | ExtensionNode


@dataclass(frozen=True)
class Output:
    """What the compiled callable returns at one position: a buffer (OUTPUT, or a caller's tensor handed back,
    possibly mutated) or a Python constant."""

    buffer: str | None = None
    constant: object = None


@dataclass(frozen=True)
class Graph:
    nodes: tuple[Node, ...]
    buffers: dict[str, Buffer]
    outputs: tuple[Output, ...]
    provenance: tuple[str, ...] = field(default=())  # passes that made it, in order

    def replace(self, provenance: str, **changes: object) -> "Graph":
        """A copy with changes, stamped with the pass that made it. Buffers nothing mentions are dropped."""
        from dataclasses import replace

        new = replace(self, **changes, provenance=(*self.provenance, provenance))  # type: ignore[arg-type]
        used: set[str] = set()
        for node in new.nodes:
            used.update(buffers_read(node), writes(node))
        used |= {o.buffer for o in new.outputs if o.buffer}
        storages = {new.buffers[name].storage for name in used}
        kept = {k: b for k, b in new.buffers.items() if k in used or (k in storages and k == b.storage)}
        return replace(new, buffers=kept)


def expressions(node: Node) -> tuple[Expr, ...]:
    """Every expression a node holds, in a fixed order."""
    if isinstance(node, ExtensionNode):
        return node.expressions()
    if isinstance(node, RowMap):
        return (node.body, *node.store)
    if isinstance(node, Linear):
        return (node.x, *(e for p in node.parts for e in (p.epilogue, *p.store)))
    held = (node.q, *node.key_index, *node.value_index, *node.store, node.mask, node.first, node.last)
    if node.append:
        held += (node.append.position, node.append.key, node.append.value)
    return tuple(e for e in held if e is not None)


def reads(node: Node) -> list[str]:
    """Names of buffers a node reads, without repeats, in a stable order."""
    names = [ld.buffer for e in expressions(node) for ld in loads(e)]
    if isinstance(node, Linear):
        names += [w for p in node.parts for w in p.weights]
    if isinstance(node, Attention):
        names += [node.keys, node.values]
    if isinstance(node, ExtensionNode):
        names += node.reads()
    return list(dict.fromkeys(names))


def buffers_read(node: Node) -> frozenset[str]:
    """Like `reads`, as a set: quick, since expressions remember their buffers."""
    names = frozenset().union(*(e.buffers for e in expressions(node)))
    if isinstance(node, Linear):
        return names.union(*(p.weights for p in node.parts))
    if isinstance(node, ExtensionNode):
        return names.union(node.reads())
    return names | {node.keys, node.values} if isinstance(node, Attention) else names


def writes(node: Node) -> list[str]:
    """Names of buffers a node writes."""
    if isinstance(node, ExtensionNode):
        return list(node.writes())
    if isinstance(node, RowMap):
        return [node.out]
    if isinstance(node, Linear):
        return list(dict.fromkeys(p.out for p in node.parts))
    return [node.out] + ([node.append.keys, node.append.values] if node.append else [])


def is_callers(buffer: Buffer) -> bool:
    """Whether the memory is handed in by the caller."""
    return buffer.kind in (BufferKind.PARAM, BufferKind.INPUT, BufferKind.STATE)
