"""The device traits of a node as C++ text. Nodes of different layers with equal text share one task body."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import Unsupported
from ..ir.expr import reductions
from ..ir.graph import ExtensionNode, Linear, Node, RowMap
from ..ir.types import Buffer
from ..ops import operator_of
from ..ops.row_map import row_dims
from .attention import attention_body, combine_body
from .body import TEMPLATE, Body
from .expressions import Emitter, Operands, row_function, split_index
from .geometry import SLOT_BYTES
from .linear import linear_body


def bodies(
    node: Node,
    buffers: Mapping[str, Buffer],
    *,
    split: bool = False,
    flagged: frozenset[str] = frozenset(),
    most: int = SLOT_BYTES,
) -> dict[str, Body]:
    """Task kind -> Body of a node. `split`: the attention's keys are cut, so it also combines. `flagged`: storages
    whose elements are their own flags. `most`: as for `linear_geometry`."""
    if isinstance(node, ExtensionNode):
        return _extension(node, buffers)
    if isinstance(node, RowMap):
        return {"row_map": _row_map(node, buffers, flagged)}
    if isinstance(node, Linear):
        return {"linear": linear_body(node, buffers, flagged, most)}
    found = {"attention": attention_body(node, buffers, split, flagged)}
    if split:
        found["attention_combine"] = combine_body(node, buffers, flagged)
    return found


def _extension(node: ExtensionNode, buffers: Mapping[str, Buffer]) -> dict[str, Body]:
    """As its operator says. The verifier has shown that none of its buffers is flagged."""
    operator = operator_of(node)
    forms = getattr(operator, "device_forms", None)
    if forms is None:
        raise Unsupported(f"operator {operator.name!r} has no device form", origin=node.origin)
    return {
        kind: Body(kind, f.call, f"  {f.traits}\n", f.operands, f.source, f.scratch)
        for kind, f in forms(node, buffers).items()
    }


def _row_map(node: RowMap, buffers: Mapping[str, Buffer], flagged: frozenset[str]) -> Body:
    operands = Operands()
    rows = row_dims(node)
    if not reductions(node.body):
        flat = split_index("e", node.dims)
        emitter = Emitter(buffers, operands, {v: n for v, (n, _) in flat.items()}, flagged=flagged, origin=node.origin)
        value = emitter.emit(node.body)
        store = emitter.store(node.out, node.store, value)
        decode = " ".join(f"const int {n} = {text};" for n, text in flat.values())
        lines = "\n    ".join([decode, *emitter.lines, store])
        text = (
            f"  static constexpr int ROW_THREADS = 0;\n"
            f"  {TEMPLATE} MPK_DEVICE static void element(Ctx& c, int e) {{\n    {lines}\n  }}\n"
        )
        return Body("row_map", "row_map", text, tuple(operands.names))
    outer, inner = node.dims[:rows], node.dims[rows:]
    flat = split_index("row", outer)
    longest = max(r.var.size for r in reductions(node.body))
    threads = 32 if longest <= 512 else 256
    function = row_function(
        "row",
        tuple((n, v) for v, (n, _) in flat.items()),
        inner,
        node.body,
        lambda names: Emitter(buffers, operands, names, flagged=flagged, origin=node.origin),
        lambda emitter, value: emitter.store(node.out, node.store, value),
        threads,
    )
    decode = " ".join(f"const int {n} = {text};" for n, text in flat.values())
    text = (
        f"  static constexpr int ROW_THREADS = {threads};\n"
        f"  template <class Ctx, class G> MPK_DEVICE static void row(Ctx& c, const G& g, int row) {{\n"
        f"    {decode}\n    {function}\n  }}\n"
    )
    return Body("row_map", "row_map", text, tuple(operands.names))
