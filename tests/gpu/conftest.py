"""Kernels of these tests go to a cache of their own, so that each run compiles what it tests, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mpk_dynamo


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def fresh_backend(cache_dir: Path) -> Iterator[None]:
    """For modules that use the backend through torch: no compiled code or reports of others, and the cache above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPK_CACHE_DIR", str(cache_dir))
        torch._dynamo.reset()
        mpk_dynamo.clear_reports()
        yield
        torch._dynamo.reset()
