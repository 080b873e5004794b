"""Tasks in the words of the user's model."""

from __future__ import annotations

import re

from ..ir.graph import Linear, Node
from ..ir.tasks import TaskGraph

_ROOT = re.compile(r"^((args\.\d+|kwargs\.\w+|self)\.)?(model\.(?=.))?")
_LAYER = re.compile(r"\.\d+(?=\.|$)")
_COPY = re.compile(r"_\d+$")


def operator_names(tg: TaskGraph) -> dict[tuple[int, str], str]:
    """(node index, task kind) -> e.g. `layers.3.mlp.down_proj`, `layers.3.self_attn.q_proj+k_proj+v_proj`,
    `layers.3.self_attn.attention`. Two operators of one module may have the same name."""
    return {key: _name(tg.graph.nodes[key[0]], key[1]) for key in dict.fromkeys((t.node, t.op) for t in tg.tasks)}


def task_names(tg: TaskGraph) -> list[str]:
    """Of each task: its operator's name and which of its tasks it is, e.g. `layers.3.mlp.down_proj[17]`."""
    names, seen, out = operator_names(tg), dict[tuple[int, str], int](), []
    for task in tg.tasks:
        key = task.node, task.op
        number = seen[key] = seen.get(key, -1) + 1
        out.append(f"{names[key]}[{number}]")
    return out


def of_any_layer(name: str) -> str:
    """`layers.3.mlp.down_proj` -> `layers.*.mlp.down_proj`: what repeated layers have in common."""
    return _LAYER.sub(".*", name)


def _name(node: Node, op: str) -> str:
    if isinstance(node, Linear):
        origins = [o for p in node.parts for o in (p.origin or node.origin).split(" & ")]
        modules = dict.fromkeys(_ROOT.sub("", o) for o in origins if o)
        if modules:
            first, *rest = modules
            folder, _, _ = first.rpartition(".")
            inside = folder and all(m.startswith(folder + ".") for m in rest)
            return "+".join([first, *(m[len(folder) + 1 :] if inside else m for m in rest)])
        return node.name
    what = op if op != "row_map" else _COPY.sub("", node.name).strip("_")
    place = _ROOT.sub("", node.origin)
    return f"{place}.{what}" if place else what
