"""The cache folder keeps to a size: what was used longest ago goes first, whoever else uses the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpk_dynamo.runtime.cache import Cache

KEYS = [c * 64 for c in "abcdef"]
WORK = """
import random, sys
sys.path.insert(0, sys.argv[1])
from mpk_dynamo.runtime.cache import Cache
cache, me, found = Cache(sys.argv[2]), int(sys.argv[3]), 0
draw = random.Random(me)
for n in range(150):
    k = int(draw.expovariate(0.3)) % 12  # some often, some seldom
    key = f"{k:064x}"
    got = cache.get(key)
    assert got is None or got == (bytes([k]) * 3000, {"kernel": k}), "another entry's"
    found += got is not None
    if got is None:
        assert cache.put(key, bytes([k]) * 3000, {"kernel": k})
    cache.keep_to(20_000)
print(found)
"""


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def filled(folder: Path) -> Cache:
    """Entries of 1000 bytes and their descriptions, the first of them used longest ago."""
    cache = Cache(folder)
    for n, key in enumerate(KEYS):
        cache.put(key, bytes(1000), {"n": n})
        os.utime(folder / f"{key}.mpk", (1000 + n, 1000 + n))
    return cache


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    each = size(tmp_path) // len(KEYS)
    assert cache.get(KEYS[0]) is not None, "it is in use again"
    (tmp_path / ".half-written.x").write_bytes(bytes(50))
    cache.keep_to(4 * each + each // 2)
    assert [cache.get(key) is not None for key in KEYS] == [True, False, False, True, True, True]
    cache.keep_to(4 * each + each // 2)
    assert sum(cache.get(key) is not None for key in KEYS) == 4
    assert (tmp_path / ".half-written.x").exists(), "another process is writing it"
    cache.keep_to(0)
    assert [cache.get(key) for key in KEYS] == [None] * len(KEYS)


def test_no_folder_is_no_trouble(tmp_path: Path) -> None:
    Cache(tmp_path / "none").keep_to(0)
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_only_read_stays_as_it_is(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    cache = filled(tmp_path)
    tmp_path.chmod(0o500)
    try:
        assert cache.get(KEYS[0]) is not None
        cache.keep_to(0)
        assert len(recwarn) == 1 and all(cache.get(key) is not None for key in KEYS)
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_others_can_write_is_left_alone(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        cache.keep_to(0)
    assert len(list(tmp_path.iterdir())) == len(KEYS)


@pytest.mark.slow
def test_processes_that_fill_and_clear_one_folder(tmp_path: Path) -> None:
    """Each finds its own entries or none, and the folder stays small."""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-W", "error", "-c", WORK, root, str(tmp_path)]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(3)]
    found = [int(p.communicate(timeout=60)[0]) for p in running]
    assert all(p.returncode == 0 for p in running) and sum(found) > 0
    assert size(tmp_path) <= 20_000
