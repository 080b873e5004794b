"""Content-addressed disk cache of compiled kernels.

One file per entry: a line of JSON (what made the cubin, its checksum, its resource report), then the cubin. Files
appear by rename, so processes share a folder without locks. A cubin is code that will run with the user's rights:
folders and entries that someone else could have written are refused. The cache may lose entries; it never gives
wrong ones, and no trouble with it stops a compilation. It is kept to a size by removing what was used longest ago: the
time of a file is that of its last use.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import artifacts

FORMAT = 1
_SUFFIX = ".mpk"
_warned: set[str] = set()


def default_dir() -> Path:
    """MPK_CACHE_DIR, else $XDG_CACHE_HOME/mpk_dynamo, else ~/.cache/mpk_dynamo."""
    if chosen := os.environ.get("MPK_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "mpk_dynamo"
    except RuntimeError:  # no home directory; ownership is checked on use
        return Path(tempfile.gettempdir()) / f"mpk_dynamo-{os.geteuid()}"


def digest(inputs: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of everything that determines a cubin. Values: JSON data or bytes."""
    plain = {k: {"sha256": _sha(v)} if isinstance(v, bytes) else v for k, v in inputs.items()}
    return _sha(json.dumps(plain, sort_keys=True).encode())


class Cache:
    """Entries in `folder` (default: default_dir()), which is made on first use with mode 0700."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else default_dir()

    def get(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """(cubin, description) of an entry, or None when there is none that can be trusted. Entries of loaded artifacts
        serve where the folder has none, and are stored there."""
        path = self.folder / (key + _SUFFIX)
        if (data := self._read(path)) is not None and (found := _parsed(key, data, str(path))) is not None:
            artifacts.record(key, data)
            return found
        if (data := artifacts.loaded(key)) is not None and (found := _parsed(key, data, "of loaded artifacts")):
            self.put(key, *found)
            return found
        return None

    def _read(self, path: Path) -> bytes | None:
        try:
            if not path.exists():
                return None
            _refuse_foreign(os.stat(self.folder), self.folder)
            data = _read_own(path)
        except OSError as why:
            _warn(f"the kernel cache entry {path} is not used: {why}")
            return None
        with suppress(OSError):  # a folder that is only read, or an entry that is removed just now
            os.utime(path)
        return data

    def put(self, key: str, cubin: bytes, description: Mapping[str, Any]) -> bool:
        """Stores an entry; False (with one warning) when it cannot be stored. `description` is JSON data."""
        meta = {"format": FORMAT, "sha256": _checksum(key, cubin, description), "description": dict(description)}
        data = json.dumps(meta, sort_keys=True).encode() + b"\n" + cubin
        artifacts.record(key, data)
        temporary = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_foreign(os.stat(self.folder), self.folder)
            # mkstemp opens with mode 0600
            handle, temporary = tempfile.mkstemp(prefix=f".{key[:16]}.", dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, self.folder / (key + _SUFFIX))
            _remove_left_over(self.folder)
            return True
        except OSError as why:
            if temporary is not None:
                try:
                    os.unlink(temporary)
                except OSError:
                    pass
            _warn(f"compiled kernels are not kept in {self.folder}: {why}; set MPK_CACHE_DIR to a writable folder")
            return False


    def keep_to(self, size: int) -> None:
        """Removes the entries that were used longest ago, until the others have at most `size` bytes together. Other
        processes may use the folder meanwhile: who has opened an entry reads it to its end."""
        entries = []
        try:
            _refuse_foreign(os.stat(self.folder), self.folder)
            for entry in os.scandir(self.folder):
                if entry.name.endswith(_SUFFIX):
                    with suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        entries.append((info.st_mtime_ns, info.st_size, entry.path))
            total = sum(length for _, length, _ in entries)
            for _, length, path in sorted(entries):
                if total <= size:
                    return
                Path(path).unlink(missing_ok=True)
                total -= length
        except OSError as why:
            if self.folder.exists():
                _warn(f"the kernel cache {self.folder} is not kept to {size >> 20} MB: {why}")


def _remove_left_over(folder: Path) -> None:
    """Files that a process was writing when it died, a day ago or longer."""
    for path in folder.glob(".*.*"):
        with suppress(FileNotFoundError):  # it was only just written, and has its name now
            if path.stat().st_mtime < time.time() - 86400:
                path.unlink()


def _parsed(key: str, data: bytes, where: str) -> tuple[bytes, dict[str, Any]] | None:
    """(cubin, description) of an entry's bytes, or None, with a warning, when they are not what was stored."""
    head, _, cubin = data.partition(b"\n")
    try:
        meta = json.loads(head)
        description = dict(meta["description"])
        if meta["format"] != FORMAT or meta["sha256"] != _checksum(key, cubin, description):
            raise ValueError("its checksum does not match")
        return cubin, description
    except (ValueError, KeyError, TypeError) as why:
        _warn(f"the kernel cache entry {where} is damaged and will be replaced: {why}")
        return None


def _read_own(path: Path) -> bytes:
    """The contents of a regular file that only this user can write; OSError otherwise."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise OSError("it is not a regular file")
        _refuse_foreign(info, path)
        return file.read()


def _refuse_foreign(info: os.stat_result, path: Path) -> None:
    if info.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {info.st_uid}, not to {os.geteuid()}")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others (mode {stat.S_IMODE(info.st_mode):o})")


def _checksum(key: str, cubin: bytes, description: Mapping[str, Any]) -> str:
    return digest({"key": key, "cubin": cubin, "description": dict(description)})


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _warn(message: str) -> None:
    """Each message once per process: a broken cache must not fill the user's log."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
