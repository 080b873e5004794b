"""Programs that were proven once, and captures of Dynamo's graphs, kept beside the kernels.

The key of a program is a hash of all that it is made of: the captured graph, the number of workers, the target and the
sources of this package and of operators from outside it (foreign.py). A program is stored when the verifier has
accepted every stage of it, and comes back byte for byte or not at all: entries have checksums and owners as kernels do
(runtime/cache.py), and only data of this package and of registered node types can be in one. The key of a capture is a
hash of Dynamo's graph and of everything else that capturing it depends on; the verifier looks at a captured graph that
comes back as it looks at a new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import pickle
import pkgutil
import sys
import types
import zlib
from collections.abc import Sequence, Set
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .capture import Alias, Captured
from .capture.identity import identity
from .errors import CompileError
from .foreign import KNOWN, data_types, makers_of, modules_of, others_of
from .ir.structure import structure
from .runtime.cache import Cache, digest
from .runtime.sources import include_dir

if TYPE_CHECKING:
    from torch import fx

    from .ir.graph import Graph
    from .targets import Target

_log = logging.getLogger("mpk_dynamo")
FORMAT = 1
Kept = TypeVar("Kept")


def key_of(graph: "Graph", workers: int, target: "Target") -> str | None:
    """Hash of what determines a program; None where that cannot be known."""
    try:
        made_of = structure((graph, workers, target), others_of(graph))
        return digest({"program": made_of.encode(), "others": makers_of(graph), **_makers(modules_of(graph))})
    except TypeError:
        return None


def key_of_capture(gm: "fx.GraphModule", example_inputs: Sequence[Any]) -> str | None:
    """Hash of what determines a capture; None where that cannot be known."""
    made_of = identity(gm, example_inputs)
    try:
        return digest({"capture": made_of.encode(), **_makers()}) if made_of is not None else None
    except TypeError:
        return None


def load_capture(key: str, cache_dir: str | os.PathLike[str] | None) -> Captured | None:
    found = load(tuple, key, cache_dir)
    if found is None:
        return None
    graph, arguments, sources, total, report, aliases = found
    return Captured(graph, arguments, {}, sources, total, report, {k: Alias(*a) for k, a in aliases.items()})


def save_capture(captured: Captured, key: str, cache_dir: str | os.PathLike[str] | None) -> None:
    """Keeps a capture, unless it holds tensors that tracing made."""
    c = captured
    if not c.constants:
        aliases = {k: dataclasses.astuple(a) for k, a in c.aliases.items()}
        save((c.graph, c.arguments, c.sources, c.nodes_total, c.report, aliases), key, cache_dir)


def load(kind: type[Kept], key: str, cache_dir: str | os.PathLike[str] | None) -> Kept | None:
    """What `save` has kept under the key, of that class, or None."""
    found = Cache(cache_dir).get(key)
    if found is None or found[1].get("kind") != kind.__name__:
        return None
    try:
        value = _Unpickler(io.BytesIO(zlib.decompress(found[0]))).load()
    except Exception as why:  # whatever is wrong with it, it can be made anew
        _log.warning("the stored %s %s is not used: %s: %s", kind.__name__, key[:16], type(why).__name__, why)
        return None
    return value if isinstance(value, kind) else None


def save(value: Any, key: str, cache_dir: str | os.PathLike[str] | None) -> None:
    """Keeps what the verifier has accepted. Trouble with the folder is a warning."""
    if _sources.__wrapped__() == _sources():  # not edited since they were read
        data = zlib.compress(pickle.dumps(value, protocol=5), 1)
        Cache(cache_dir).put(key, data, {"kind": type(value).__name__})


def _makers(others: Set[str] = frozenset()) -> dict[str, Any]:
    made = {"format": FORMAT, "python": list(sys.version_info[:3]), "sources": _sources()}
    return {**made, "constants": _constants(others)}


def _constants(others: Set[str]) -> str:
    """Values of the modules' constants, and which functions their names stand for: who tries another value in a running
    process gets another program. `others`: modules from outside this package. Raises TypeError for a function from
    elsewhere."""
    lines = []
    for module in (*_modules(), *sorted(others)):
        for name, value in vars(sys.modules[module]).items():
            if not name.startswith("__") and (text := _constant(value, others)) is not None:
                lines.append(f"{module}.{name} = {text}")
    return "\n".join(lines)


def _constant(value: Any, others: Set[str]) -> str | None:
    """None for what is neither a number, a text, a function, nor a collection of these."""
    if type(value) in (bool, int, float, str):
        return repr(value)
    if isinstance(value, types.FunctionType):
        if value.__module__ not in others and value.__module__.partition(".")[0] not in KNOWN:
            raise TypeError(f"{value.__module__}.{value.__qualname__} has no known source")
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (tuple, frozenset)):
        found = [_constant(x, others) for x in value]
        return None if None in found else str(found if isinstance(value, tuple) else sorted(found))  # type: ignore[type-var]
    return None


@cache
def _modules() -> tuple[str, ...]:
    """The modules that programs are made by, all of them imported."""
    names = ["mpk_dynamo.abi"]
    for part in ("capture", "codegen", "ir", "loop", "ops", "passes", "targets"):
        package = import_module(f"mpk_dynamo.{part}")
        names += [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]
    return tuple(sorted(m.__name__ for m in map(import_module, names)))


@cache
def _sources() -> str:
    """Hash of everything that has a part in making a program: this package, and the device code it refers to."""
    total = hashlib.sha256()
    roots = [(Path(__file__).parent, "*.py")]
    try:
        roots.append((include_dir(), "*.cuh"))
    except CompileError:  # it is said when a kernel is compiled
        pass
    for root, pattern in roots:
        for path in sorted(root.rglob(pattern)):
            total.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return total.hexdigest()


_sources()  # now, when what is imported is what the files say


class _Unpickler(pickle.Unpickler):
    """Of this package's data, and of the node types that are registered."""

    def find_class(self, module: str, name: str) -> Any:
        for kind in data_types(module):
            if kind.__qualname__ == name:
                return kind
        if module.startswith("mpk_dynamo.ir.") and "." not in name:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a stored program")
