"""What code generation makes of one kind of task of a node."""

from __future__ import annotations

from dataclasses import dataclass

TEMPLATE = "template <class Ctx>"


@dataclass(frozen=True)
class Body:
    """text: members of the traits struct. call: device function that takes it. operands: buffer names by slot.
    source: definition of `call` where it is no file of kernels_cuda; scratch: its bytes of shared memory."""

    op: str
    call: str
    text: str
    operands: tuple[str, ...]
    source: str = ""
    scratch: int = 0
