"""The contract of an operator: how a node is cut into tasks, and what a task means on the reference executor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..ir.graph import Graph, Node
from ..ir.region import Access
from ..ir.types import Buffer

if TYPE_CHECKING:
    import torch

Memory = Mapping[str, "torch.Tensor"]
"""Tensor of each buffer, by Buffer name, shaped and strided as declared. Versions of a STATE share memory."""


@dataclass(frozen=True)
class TileSpec:
    """A task before it has a number: see ir.tasks.Task for the fields."""

    op: str
    tile: tuple[int, ...]
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Tiling:
    """Tasks of a node in an order in which running them one by one is right, and buffers for partial results, which
    are named `<node>.<what>`."""

    tasks: tuple[TileSpec, ...]
    buffers: tuple[Buffer, ...] = ()


@dataclass(frozen=True)
class DeviceForm:
    """The body of a task kind on the device, for nodes that codegen knows nothing of.

    source: text of a .cuh that defines, in namespace mpk, `template <class N, class Ctx> MPK_DEVICE void call(Ctx& c)`
    under the name `call`. traits: C++ members of the struct N, constants as a rule; nodes with equal traits share one
    body. operands: buffers by the number the body asks for, `c.pointer<T>(number)`; `c.arg(i)` is tile[i].
    scratch: bytes of shared memory the body uses at `c.scratch()`.
    """

    call: str
    source: str
    traits: str
    operands: tuple[str, ...]
    scratch: int = 0


class Operator(Protocol):
    """One operator. Registered in ops/__init__.py by the type of its node."""

    name: str

    def tile(self, node: Node, graph: Graph, workers: int) -> Tiling:
        """Cut the node into tasks for `workers` equal workers. Every task declares what it reads and writes.

        Nodes of equal structure (ops/structure.py) in equal context must be cut alike: one tiling is made and the
        others are copies with other names. The partition of an access is the text of an expression of the node."""
        ...

    def context(self, node: Node, graph: Graph, workers: int) -> Hashable:
        """All that `tile` makes of the graph around the node."""
        ...

    def prepare(
        self, node: Node, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...]
    ) -> Callable[[Memory], None]:
        """A function that executes one task on memory: what `run` does, with the work that does not depend on
        memory done once."""
        ...

    def run(self, node: Node, buffers: Mapping[str, Buffer], op: str, tile: tuple[int, ...], memory: Memory) -> None:
        """Execute one task on torch tensors (any device), touching only what the task declares."""
        ...

    def oracle(self, node: Node, buffers: Mapping[str, Buffer], memory: Memory) -> None:
        """Execute the whole node at once, in plain torch, sharing no tiling code with `run`."""
        ...

    def samples(self) -> list[tuple[Node, Graph]]:
        """Small nodes in one-node graphs that cover the operator's traits, for the conformance test."""
        ...


class ExtensionOperator(Operator, Protocol):
    """An operator of an ExtensionNode. Without `device_forms` it runs on the reference executor alone."""

    def device_forms(self, node: Node, buffers: Mapping[str, Buffer]) -> dict[str, DeviceForm]:
        """Task kind -> its body. Tiles have at most 6 numbers. Raises Unsupported for a node it has no body for."""
        ...
