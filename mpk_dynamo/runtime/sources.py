"""Where the device sources lie, and which of them a translation unit pulls in."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from ..errors import CompileError

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">\n]+)[">]', re.MULTILINE)


@lru_cache(maxsize=1)
def include_dir() -> Path:
    """The folder that holds mpk/*.cuh: beside the package in a checkout, inside it when installed from a wheel.

    Raises CompileError when neither exists.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = (package.parent / "kernels_cuda" / "include", package / "kernels_cuda" / "include")
    for folder in candidates:
        if (folder / "mpk").is_dir():
            return folder
    looked = ", ".join(map(str, candidates))
    raise CompileError(f"the device sources are missing (looked in {looked}); reinstall mpk_dynamo")


def closure(source: str, folder: Path, provided: frozenset[str] = frozenset()) -> dict[str, bytes]:
    """Files that `source` includes, directly or not, by path relative to `folder`, with their contents.

    Conditional includes count as taken, so the closure is never too small. `provided` are include names that are
    handed to the compiler in memory. A name found nowhere is left out: the compiler reports it if it is reached.
    """
    found: dict[str, bytes] = {}
    pending = [(match, Path()) for match in _INCLUDE.findall(source)]
    while pending:
        (quote, name), at = pending.pop()
        if name in provided:
            continue
        relative = [at / name] if quote == '"' else []
        for path in (*relative, Path(name)):
            key = _normal(path)
            if key is None or key in found:
                continue
            file = folder / key
            if file.is_file():
                found[key] = file.read_bytes()
                text = found[key].decode("utf-8", "replace")
                pending += [(match, Path(key).parent) for match in _INCLUDE.findall(text)]
    return dict(sorted(found.items()))


def _normal(path: Path) -> str | None:
    """`path` without "." and ".."; None when it leaves the include folder."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)
