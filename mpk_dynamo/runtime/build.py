"""A Program as a cubin: from the cache, or from NVRTC. Needs no GPU."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import abi
from ..errors import CompileError
from ..ir.program import Program
from ..targets import Target
from . import nvrtc
from .cache import Cache, digest
from .resources import ResourceReport, parse_log
from .sources import closure, include_dir


@dataclass(frozen=True)
class Artifact:
    """A compiled Program. key: SHA-256 of all that determined the cubin. log: what NVRTC said when it compiled.
    seconds: what `build` took."""

    cubin: bytes
    arch: str
    report: ResourceReport
    key: str
    log: str
    seconds: float
    from_cache: bool

    @property
    def resources(self) -> ResourceReport:
        """The same as `report`."""
        return self.report


def build(
    program: Program,
    target: Target,
    *,
    cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
    lineinfo: bool = False,
) -> Artifact:
    """Compile `program` for `target`, or take it from the cache folder (`cache_dir`, default cache.default_dir()).

    `dump_dir` receives source, headers, cubin, log and resource report. `lineinfo` adds source lines for profilers.
    Raises CompileError when NVRTC is missing, rejects the source, or the kernel does not fit the target.
    """
    start = time.perf_counter()
    options, headers = nvrtc.compile_options(target, lineinfo=lineinfo), nvrtc.default_headers()
    folder = include_dir()
    files = closure(program.source, folder, frozenset(headers))
    key = _key(program.source, headers, files, options)
    store = Cache(cache_dir) if cache else None
    artifact = _from_cache(store, key, target) if store else None
    if artifact is None:
        cubin, log = nvrtc.compile_source(program.source, target, options=options, headers=headers, folder=folder)
        try:
            report = parse_log(log)
        except ValueError as why:
            raise CompileError(f"NVRTC {nvrtc.version()}: {why}", log=log) from why
        artifact = Artifact(cubin, target.arch, report, key, log, 0.0, False)
        # a header edited meanwhile: what was compiled may not be what was hashed
        if store and closure(program.source, folder, frozenset(headers)) == files:
            description = {"arch": target.arch, "report": asdict(report), "log": log, "options": options}
            store.put(key, cubin, {**description, "nvrtc": nvrtc.version(), "abi": abi.VERSION, "files": list(files)})
    _check_fits(program, artifact.report, target)
    seconds = time.perf_counter() - start
    artifact = Artifact(artifact.cubin, artifact.arch, artifact.report, key, artifact.log, seconds, artifact.from_cache)
    if dump_dir:
        _dump(Path(dump_dir), program, headers, artifact)
    return artifact


def _key(source: str, headers: dict[str, str], files: dict[str, bytes], options: tuple[str, ...]) -> str:
    inputs: dict[str, object] = {
        "abi": abi.VERSION,
        "nvrtc": nvrtc.version(),
        "options": list(options),
        "source": source.encode(),
    }
    inputs |= {f"header {name}": text.encode() for name, text in headers.items()}
    inputs |= {f"file {name}": data for name, data in files.items()}
    return digest(inputs)


def _from_cache(store: Cache, key: str, target: Target) -> Artifact | None:
    found = store.get(key)
    if found is None:
        return None
    cubin, description = found
    try:
        fields = dict(description["report"])
        report = ResourceReport(**{**fields, "spilling": tuple(fields["spilling"])})
        return Artifact(cubin, target.arch, report, key, description["log"], 0.0, True)
    except (KeyError, TypeError):  # an entry of another version of this package
        return None


def _check_fits(program: Program, report: ResourceReport, target: Target) -> None:
    """What would otherwise only show as a failing launch, possibly on another machine."""
    shared = report.static_shared_bytes + program.shared_bytes
    if shared > target.shared_bytes_per_block:
        raise CompileError(
            f"the kernel needs {shared} bytes of shared memory per block ({report.static_shared_bytes} static and "
            f"{program.shared_bytes} dynamic), {target.name} offers {target.shared_bytes_per_block}"
        )
    # registers are handed out per warp in units of 256
    warps = -(-program.threads // 32)
    registers = warps * (-(-report.registers * 32 // 256) * 256)
    if registers > target.registers_per_sm:
        raise CompileError(
            f"{program.threads} threads with {report.registers} registers each need {registers} registers, one SM of "
            f"{target.name} has {target.registers_per_sm}"
        )


def _dump(folder: Path, program: Program, headers: dict[str, str], artifact: Artifact) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    nvrtc.write_sources(folder, program.source, headers)
    (folder / "mpk_program.cubin").write_bytes(artifact.cubin)
    (folder / "nvrtc.log").write_text(artifact.log + "\n")
    summary = {**asdict(artifact.report), "key": artifact.key, "arch": artifact.arch, "from_cache": artifact.from_cache}
    (folder / "resources.json").write_text(json.dumps(summary, indent=1) + "\n")
