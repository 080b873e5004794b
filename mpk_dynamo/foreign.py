"""Operators from outside this package: what a program with their nodes is made of, so that it can be kept (proven.py).

That is the source of the module that defines an operator, of all modules which that one imports, their constants, and
the text of the bodies on the device. Where one of these cannot be known, TypeError is raised, and the program is not
kept.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import Unsupported
from .ir.graph import ExtensionNode, Graph
from .ops import OPERATORS

KNOWN = frozenset({"mpk_dynamo", "torch", "numpy", "sympy", *sys.stdlib_module_names}) - {"__main__"}
"""Packages whose versions, or sources, are part of every key."""

MAX_MODULES = 100
"""Modules an operator is made of, at most."""


def data_types(module: str) -> frozenset[type]:
    """The dataclasses and enums of a module that defines a registered node type: what its nodes may hold."""
    if all(t.__module__ != module for t in OPERATORS):
        return frozenset()
    own = [c for c in vars(sys.modules[module]).values() if isinstance(c, type) and c.__module__ == module]
    return frozenset(c for c in own if dataclasses.is_dataclass(c) or issubclass(c, enum.Enum))


def others_of(graph: Graph) -> frozenset[type]:
    """Types that the graph's nodes from outside this package are made of."""
    return frozenset().union(*(data_types(type(n).__module__) for n in _foreign(graph)))


def modules_of(graph: Graph) -> frozenset[str]:
    """The modules that nodes from outside this package, and their operators, are made of. Raises TypeError where these
    are not known."""
    kinds = {type(n) for n in _foreign(graph)}
    if unknown := [k.__qualname__ for k in kinds if k not in OPERATORS]:
        raise TypeError(f"no operator of {unknown[0]}")
    return frozenset(_imported({t.__module__ for k in kinds for t in (k, type(OPERATORS[k]))}))


def makers_of(graph: Graph) -> list[str]:
    """What such nodes become on the device, and the sources of `modules_of`, as text."""
    lines = [f"{m} {hashlib.sha256(_path(m).read_bytes()).hexdigest()}" for m in sorted(modules_of(graph))]
    for n in _foreign(graph):
        operator = OPERATORS[type(n)]
        try:
            lines.append(f"{type(operator).__qualname__} {operator.device_forms(n, graph.buffers)!r}")  # type: ignore[attr-defined]
        except (AttributeError, Unsupported) as why:
            raise TypeError(f"{n.name} has no body on the device") from why
    return lines


def _foreign(graph: Graph) -> list[ExtensionNode]:
    return [n for n in graph.nodes if isinstance(n, ExtensionNode) and not type(n).__module__.startswith("mpk_dynamo.")]


def _imported(modules: set[str]) -> set[str]:
    """These modules and all that their import statements name, but for the packages in KNOWN."""
    found: set[str] = set()
    left = set(modules)
    while left := {m for m in left - found if m.partition(".")[0] not in KNOWN}:
        name = left.pop()
        found.add(name)
        if len(found) > MAX_MODULES:
            raise TypeError(f"an operator that is made of more than {MAX_MODULES} modules")
        left.update(_named(ast.parse(_path(name).read_bytes()), sys.modules[name].__package__ or ""))
    return found


def _named(tree: ast.AST, package: str) -> Iterator[str]:
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            yield from (a.name for a in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            base = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
            members = [m for a in statement.names if (m := f"{base}.{a.name}") in sys.modules]
            yield from members  # the others are no modules
            if len(members) < len(statement.names):
                yield base


def _path(name: str) -> Path:
    path = getattr(sys.modules.get(name), "__file__", None)
    if path is None or not path.endswith(".py"):
        raise TypeError(f"module {name} has no source that is known")
    return Path(path)
