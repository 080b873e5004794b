"""The tiling of a node, made from that of another node with the same structure."""

from __future__ import annotations

from dataclasses import replace

from ...ir.expr import render
from ...ir.graph import Node
from ...ir.region import Access
from ...ops.spec import TileSpec, Tiling
from ...ops.structure import Structure


def rename_tiling(made_for: str, old: Structure, tiling: Tiling, node: Node, new: Structure) -> Tiling:
    """`tiling`, made for the node of name `made_for` and structure `old`, as that of `node`, whose structure `new`
    has an equal key. Accesses that tasks share stay shared.

    Raises ValueError when the operator names a buffer or a partition against its contract (ops/spec.py).
    """
    names = dict(zip(old.buffers, new.buffers, strict=True))
    extra = []
    for b in tiling.buffers:
        if not b.name.startswith(f"{made_for}.") or b.storage != b.name:
            raise ValueError(f"{made_for}: its operator adds buffer {b.name!r}, not named {made_for}.<what>")
        names[b.name] = node.name + b.name.removeprefix(made_for)
        extra.append(replace(b, name=names[b.name], storage=names[b.name], origin=node.origin))
    partitions = {"": ""}
    renamed: dict[int, Access] = {}

    def rename(accesses: tuple[Access, ...]) -> tuple[Access, ...]:
        out = []
        for a in accesses:
            done = renamed.get(id(a))
            if done is None:
                if a.partition not in partitions:
                    partitions[a.partition] = _partition(a.partition, made_for, old, new)
                done = renamed[id(a)] = Access(names[a.buffer], a.box, partitions[a.partition], a.side)
            out.append(done)
        return tuple(out)

    tuples: dict[int, tuple[Access, ...]] = {}

    def shared(accesses: tuple[Access, ...]) -> tuple[Access, ...]:
        done = tuples.get(id(accesses))
        if done is None:
            done = tuples[id(accesses)] = rename(accesses)
        return done

    return Tiling(
        tuple(TileSpec(t.op, t.tile, shared(t.reads), shared(t.writes), t.bytes, t.flops) for t in tiling.tasks),
        tuple(extra),
    )


def _partition(text: str, made_for: str, old: Structure, new: Structure) -> str:
    for before, after in zip(old.exprs, new.exprs, strict=True):
        if render(before) == text:
            return render(after)
    raise ValueError(f"{made_for}: its operator names partition {text!r}, which is no expression of the node")
