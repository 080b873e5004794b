"""Compiled kernels among torch's portable cache artifacts (`torch.compiler.save_cache_artifacts`).

torch has no public interface for others to take part: where its private one is missing, artifacts hold no kernels.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.compiler._cache import CacheInfo

_log = logging.getLogger("mpk_dynamo")
_TYPE = "mpk_dynamo"
_loaded: dict[str, bytes] = {}
_lock = threading.Lock()


def load_cache_artifacts(artifacts: bytes) -> "CacheInfo | None":
    """`torch.compiler.load_cache_artifacts(artifacts)`, for a process that has not compiled with this backend yet.

    torch must know of the kernels among the artifacts before it reads them, or it reads none at all. Kernels stay in
    memory and are looked up when the cache folder does not have them; each is checked against its checksum then.
    """
    import torch

    register()
    return torch.compiler.load_cache_artifacts(artifacts)


def loaded(key: str) -> bytes | None:
    """The cache entry of that key among loaded artifacts."""
    return _loaded.get(key)


def record(key: str, entry: bytes) -> None:
    """Hands a cache entry that was made or used to torch's artifacts."""
    if register():
        from torch.compiler._cache import CacheArtifactManager

        CacheArtifactManager.record_artifact(_TYPE, key, entry)


def register() -> bool:
    """Whether torch knows the kernels' kind of artifact; tells it, the first time."""
    with _lock:  # torch refuses to be told twice
        return _register()


@functools.cache
def _register() -> bool:
    try:
        from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

        class KernelArtifact(CacheArtifact):
            def populate_cache(self) -> None:
                _loaded[self.key] = self.content

            @staticmethod
            def type() -> str:
                return _TYPE

        CacheArtifactFactory.register(KernelArtifact)
        return callable(CacheArtifactManager.record_artifact)
    except (ImportError, AttributeError, TypeError) as why:
        _log.info("this torch keeps no artifacts of others: kernels are not among them (%s)", why)
        return False
