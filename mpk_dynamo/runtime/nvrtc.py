"""NVRTC: CUDA C++ text to a cubin, on any machine, with or without a GPU or a CUDA toolkit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import abi
from ..errors import CompileError
from ..targets import Target
from .sources import include_dir

PROGRAM_NAME = "mpk_program.cu"
ABI_HEADER = "mpk/abi.h"
_INSTALL = "pip install nvidia-cuda-nvrtc cuda-bindings"


def default_headers() -> dict[str, str]:
    """Headers that exist only in memory, by the name they are included with."""
    return {ABI_HEADER: abi.header()}


def compile_options(target: Target, *, lineinfo: bool = False) -> tuple[str, ...]:
    """Options that determine the result, without include paths. Raises CompileError for a target without cubins."""
    if not target.is_gpu:
        raise CompileError(f"target {target.name} has no architecture to compile for; choose a GPU such as sm_90a")
    # without contraction, a product and a sum of the graph stay two roundings, as in eager
    options = [f"-arch={target.arch}", "-std=c++20", "-default-device", "-fmad=false", "-Xptxas=-v"]
    return tuple(options + (["-lineinfo"] if lineinfo else []))


def compile_source(
    source: str,
    target: Target,
    *,
    options: tuple[str, ...] | None = None,
    headers: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> tuple[bytes, str]:
    """(cubin, log) of a translation unit. The log holds warnings and ptxas's resource usage.

    `headers` (default: mpk/abi.h) win over files of the same name under `folder` (default: the device sources).
    Raises CompileError with the log and the path of the dumped source.
    """
    nvrtc = _nvrtc()
    options = compile_options(target) if options is None else options
    headers = default_headers() if headers is None else headers
    _check_arch(target)
    flags = [o.encode() for o in (*options, f"-I{folder or include_dir()}", *_own_cache_off(nvrtc))]
    names = [n.encode() for n in headers]
    texts = [t.encode() for t in headers.values()]
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.encode(), PROGRAM_NAME.encode(), len(names), texts, names), "nvrtcCreateProgram"
    )
    try:
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = _text(nvrtc, program, "nvrtcGetProgramLog")
        if int(status) != 0:
            rejected = int(status) == 6  # NVRTC_ERROR_COMPILATION
            what = "NVRTC rejected the generated source" if rejected else f"nvrtcCompileProgram: {_name(status)}"
            raise CompileError(f"{what} for {target.arch}", log=log, source_path=_dump(source, headers, flags, log))
        return _bytes(nvrtc, program, "nvrtcGetCUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@lru_cache(maxsize=1)
def version() -> str:
    """NVRTC's version, as exact as it can be known: it is part of the cache key. Raises CompileError without NVRTC."""
    nvrtc = _nvrtc()
    major, minor = _checked(nvrtc.nvrtcVersion(), "nvrtcVersion")
    return f"{major}.{minor}" + "".join(f" {package}" for package in _distributions())


def _own_cache_off(nvrtc: Any) -> list[str]:
    """NVRTC keeps results on disk since 12.9. What comes from there has no log, hence no report of resources."""
    return ["-no-cache"] if tuple(_checked(nvrtc.nvrtcVersion(), "nvrtcVersion")) >= (12, 9) else []


def _distributions() -> list[str]:
    """Name and full version of the wheels NVRTC may come from; nvrtcVersion() has no patch level."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    found = []
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            found.append(f"{name}={version_of(name)}")
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    """The bindings, with the library behind them loaded. Imported late: it costs 0.1 s, and a warm start on the
    CPU needs neither."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as why:
        raise CompileError(f"NVRTC cannot be loaded ({why}); {_INSTALL}") from why
    return nvrtc


def _check_arch(target: Target) -> None:
    supported = _checked(_nvrtc().nvrtcGetSupportedArchs(), "nvrtcGetSupportedArchs")
    number = int(target.arch.removeprefix("sm_").removesuffix("a"))
    if number not in supported:
        raise CompileError(
            f"NVRTC {version()} cannot compile for {target.arch}; it knows {', '.join(f'sm_{a}' for a in supported)}. "
            f"Upgrade it: pip install -U nvidia-cuda-nvrtc"
        )


def _checked(result: tuple[Any, ...], call: str) -> Any:
    status, *values = result
    if int(status) != 0:
        raise CompileError(f"{call} failed: {_name(status)}")
    return values[0] if len(values) == 1 else tuple(values)


def _name(status: Any) -> str:
    return getattr(status, "name", str(status))


def _bytes(nvrtc: Any, program: Any, getter: str) -> bytes:
    size = _checked(getattr(nvrtc, f"{getter}Size")(program), f"{getter}Size")
    out = bytearray(size)
    _checked(getattr(nvrtc, getter)(program, out), getter)
    return bytes(out)


def _text(nvrtc: Any, program: Any, getter: str) -> str:
    return _bytes(nvrtc, program, getter).rstrip(b"\0 \n").decode("utf-8", "replace")


def write_sources(folder: Path, source: str, headers: Mapping[str, str]) -> Path:
    """Writes a translation unit and its in-memory headers so that a compiler finds them; the source's path."""
    for name, text in headers.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = folder / PROGRAM_NAME
    path.write_text(source)
    return path


def _dump(source: str, headers: Mapping[str, str], flags: list[bytes], log: str) -> str:
    """Where a rejected source was written, or "" when nothing can be."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="mpk_dynamo_"))
        path = write_sources(folder, source, headers)
        (folder / "nvrtc.log").write_text(" ".join(os.fsdecode(f) for f in flags) + "\n" + log + "\n")
    except OSError:
        return ""
    return str(path)
