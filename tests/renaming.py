"""Nodes with other names of buffers."""

from __future__ import annotations

from dataclasses import replace

from mpk_dynamo.ir.expr import load, transform


def renamed(x, names):
    """A node or anything in it with other names of buffers, through the constructors of expressions."""
    if hasattr(x, "children"):
        return transform(
            x, lambda e: load(names[e.buffer], e.children, e.dtype) if getattr(e, "buffer", None) else None
        )
    if isinstance(x, str):
        return names.get(x, x)
    if isinstance(x, tuple):
        return tuple(renamed(item, names) for item in x)
    if hasattr(x, "__dataclass_fields__"):
        return replace(x, **{f: renamed(getattr(x, f), names) for f in x.__dataclass_fields__})
    return x
