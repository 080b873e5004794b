"""The kernel cache: hits, damage, races, permissions. A broken cache recompiles, and never gives a wrong kernel."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import toy_program

import mpk_dynamo
from mpk_dynamo.runtime import cache as cache_module
from mpk_dynamo.runtime import sources
from mpk_dynamo.runtime.cache import Cache, default_dir, digest
from mpk_dynamo.targets import known

KEY = "ab" * 32
CUBIN = bytes(range(256)) * 8
DESCRIPTION = {"arch": "sm_90a", "report": {"registers": 32}, "options": ("-a",)}


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch):
    monkeypatch.setattr(cache_module, "_warned", set())


@pytest.fixture
def stored(tmp_path):
    """A cache with one entry, and the entry's path."""
    store = Cache(tmp_path / "cache")
    assert store.put(KEY, CUBIN, DESCRIPTION)
    return store, store.folder / f"{KEY}.mpk"


def test_an_entry_comes_back(stored):
    store, path = stored
    cubin, description = store.get(KEY)
    assert cubin == CUBIN and description["report"] == {"registers": 32}
    assert path.stat().st_mode & 0o777 == 0o600 and store.folder.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in store.folder.iterdir()] == [path.name]
    assert store.get("cd" * 32) is None


@pytest.mark.parametrize("where", (0, 40, -1))
def test_a_flipped_bit_is_found(stored, where):
    store, path = stored
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert store.get(KEY) is None


@pytest.mark.parametrize("keep", (0, 10, -1, -len(CUBIN)))
def test_a_truncated_entry_is_found(stored, keep):
    store, path = stored
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert store.get(KEY) is None


def test_a_changed_description_is_found(stored):
    store, path = stored
    path.write_bytes(path.read_bytes().replace(b'"registers": 32', b'"registers": 33'))
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert store.get(KEY) is None


def test_an_entry_under_another_name_is_not_taken(stored):
    store, path = stored
    other = "cd" * 32
    os.link(path, store.folder / f"{other}.mpk")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert store.get(other) is None


@pytest.mark.parametrize("mode", (0o620, 0o602))
def test_an_entry_others_can_write_is_refused(stored, mode):
    store, path = stored
    path.chmod(mode)
    with pytest.warns(RuntimeWarning, match="written by others"):
        assert store.get(KEY) is None


def test_a_folder_others_can_write_is_refused(stored):
    store, _ = stored
    store.folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="written by others"):
        assert store.get(KEY) is None
    with pytest.warns(RuntimeWarning, match="not kept"):
        assert not store.put(KEY, CUBIN, DESCRIPTION)


def test_an_entry_of_another_user_is_refused(stored, monkeypatch):
    store, _ = stored
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(RuntimeWarning, match="belongs to user"):
        assert store.get(KEY) is None


def test_a_link_is_refused(stored, tmp_path):
    store, path = stored
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="not used"):
        assert store.get(KEY) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_gives_one_warning(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    _expect_one_warning(Cache(tmp_path / "cache"))


def test_a_folder_that_cannot_be_made_gives_one_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    _expect_one_warning(Cache(tmp_path / "file" / "cache"))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    store = Cache(tmp_path / "cache")
    store.folder.mkdir(mode=0o700)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    _expect_one_warning(store)
    assert list(store.folder.iterdir()) == []


def _expect_one_warning(store):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not store.put(KEY, CUBIN, DESCRIPTION)
        assert not store.put(KEY, CUBIN, DESCRIPTION)
        assert store.get(KEY) is None
    assert len(caught) == 1 and "MPK_CACHE_DIR" in str(caught[0].message)


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MPK_CACHE_DIR", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_dir() == tmp_path / "a"
    monkeypatch.delenv("MPK_CACHE_DIR")
    assert default_dir() == tmp_path / "b" / "mpk_dynamo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_dir() == tmp_path / ".cache" / "mpk_dynamo"


def test_digest_depends_on_every_input():
    base = {"source": b"x", "options": ["-a"], "abi": 1}
    changed = [base | {"source": b"y"}, base | {"options": ["-a", "-b"]}, base | {"abi": 2}, base | {"file a": b""}]
    assert len({digest(v) for v in (base, *changed)}) == 5
    assert digest(base) == digest(dict(reversed(base.items())))


# --- build() with the cache -----------------------------------------------------------------------------------

WRITER = """
import sys
sys.path[:0] = {path!r}
import toy_program
from mpk_dynamo.runtime.build import build
from mpk_dynamo.targets import known
for i in range(3):
    a = build(toy_program.program(), known("sm_90a"), cache_dir=sys.argv[1])
print(a.key, len(a.cubin))
"""


def _build(folder, program=None, target="sm_90a", **options):
    from mpk_dynamo.runtime.build import build

    return build(program or toy_program.program(), known(target), cache_dir=folder, **options)


def test_build_hits_and_survives_damage(tmp_path):
    cold = _build(tmp_path / "c")
    warm = _build(tmp_path / "c")
    assert not cold.from_cache and warm.from_cache
    assert (warm.cubin, warm.report, warm.key) == (cold.cubin, cold.report, cold.key)
    (entry,) = (tmp_path / "c").iterdir()
    entry.write_bytes(entry.read_bytes()[:-7])
    with pytest.warns(RuntimeWarning, match="damaged"):
        again = _build(tmp_path / "c")
    assert not again.from_cache and again.cubin == cold.cubin
    assert _build(tmp_path / "c").from_cache  # the damaged entry was replaced


def test_build_recompiles_when_an_input_changes(tmp_path):
    program = toy_program.program()
    first = _build(tmp_path / "c", program)
    for other, target, options in (
        (dataclasses.replace(program, source=program.source + "// changed\n"), "sm_90a", {}),
        (program, "sm_80", {}),
        (program, "sm_90a", {"lineinfo": True}),
    ):
        artifact = _build(tmp_path / "c", other, target, **options)
        assert not artifact.from_cache and artifact.key != first.key
    assert _build(tmp_path / "c", dataclasses.replace(program, threads=32)).from_cache  # not part of the cubin


def test_build_recompiles_when_a_header_changes(tmp_path, monkeypatch):
    folder = tmp_path / "include"
    (folder / "mpk" / "tasks").mkdir(parents=True)
    (folder / "mpk/tasks/one.cuh").write_text('#include "../two.cuh"\n')
    (folder / "mpk/two.cuh").write_text("#define TWO 2\n")
    (folder / "mpk/unused.cuh").write_text("#define THREE 3\n")
    # by module object: the package's attribute `build` is the function
    monkeypatch.setattr(importlib.import_module("mpk_dynamo.runtime.build"), "include_dir", lambda: folder)
    program = toy_program.program('#include "mpk/tasks/one.cuh"\n' + toy_program.SOURCE)
    assert not _build(tmp_path / "c", program).from_cache
    (folder / "mpk/unused.cuh").write_text("#define THREE 4\n")
    assert _build(tmp_path / "c", program).from_cache
    (folder / "mpk/two.cuh").write_text("#define TWO 3\n")
    assert not _build(tmp_path / "c", program).from_cache


def test_an_entry_of_another_version_is_replaced(tmp_path):
    first = _build(tmp_path / "c")
    store = Cache(tmp_path / "c")
    cubin, description = store.get(first.key)
    store.put(first.key, cubin, {**description, "report": {"threads": 1}})
    assert not _build(tmp_path / "c").from_cache


def test_two_processes_share_a_folder(tmp_path):
    path = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    command = [sys.executable, "-c", WRITER.format(path=path), str(tmp_path / "c")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate(timeout=120) for p in running]
    assert [p.returncode for p in running] == [0, 0], outputs
    assert outputs[0] == outputs[1] and outputs[0][1] == ""
    (entry,) = (tmp_path / "c").iterdir()
    head = json.loads(entry.read_bytes().partition(b"\n")[0])
    assert entry.stem in outputs[0][0] and head["format"] == cache_module.FORMAT


def test_closure_follows_includes(tmp_path):
    (tmp_path / "mpk/a").mkdir(parents=True)
    (tmp_path / "mpk/a/x.cuh").write_text('#  include <mpk/y.cuh>\n#include "z.cuh"\n#include "mpk/abi.h"\n')
    (tmp_path / "mpk/y.cuh").write_text('#include "a/x.cuh"\n#include "../../escape.h"\n#include "missing.h"\n')
    (tmp_path / "mpk/a/z.cuh").write_text('// #include "mpk/not.cuh" stays a comment\n')
    (tmp_path / "mpk/not.cuh").write_text("")
    found = sources.closure('#include "mpk/a/x.cuh"\n', tmp_path, frozenset({"mpk/abi.h"}))
    assert list(found) == ["mpk/a/x.cuh", "mpk/a/z.cuh", "mpk/y.cuh"]


def test_device_sources_are_found():
    assert (sources.include_dir() / "mpk").is_dir()


# --- a process that dies, and torch's artifacts -----------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from mpk_dynamo.runtime import cache
store = cache.Cache(sys.argv[1])
def die(*_args, **_how):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before the rename":
    os.replace = die
else:
    whole = os.fdopen
    def fdopen(handle, mode):
        class Half:
            def __enter__(self): return self
            def __exit__(self, *_): pass
            def write(self, data):
                os.write(handle, data[: len(data) // 2])
                die()
        return Half() if mode == "wb" else whole(handle, mode)
    os.fdopen = fdopen
store.put({key!r}, bytes(range(256)) * 8, {{"arch": "sm_90a"}})
"""


@pytest.mark.parametrize(
    ("when", "old"), [("in the write", True), pytest.param("before the rename", False, marks=pytest.mark.slow)]
)
def test_a_kill_while_an_entry_is_written(tmp_path, when, old):
    store = Cache(tmp_path / "c")
    if old:
        assert store.put(KEY, CUBIN, DESCRIPTION)
    path = [str(Path(__file__).parents[2])]
    dead = subprocess.run([sys.executable, "-c", KILLED.format(path=path, key=KEY), str(tmp_path / "c"), when])
    assert dead.returncode == -9
    (left,) = [p for p in store.folder.iterdir() if p.name != f"{KEY}.mpk"]
    assert left.name.startswith(".") and left.stat().st_size > 0, "it died before it wrote anything"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (store.get(KEY) is not None) == old
        assert store.put(KEY, CUBIN, DESCRIPTION) and store.get(KEY)[0] == CUBIN
    _make_old(left)
    store.put("cd" * 32, CUBIN, DESCRIPTION)
    assert not left.exists(), "what a dead process left is removed some day"
    assert store.get(KEY)[0] == CUBIN


def _make_old(path):
    day_before_yesterday = path.stat().st_mtime - 2 * 86400
    os.utime(path, (day_before_yesterday, day_before_yesterday))


ARTIFACTS = """
import sys, warnings
sys.path[:0] = {path!r}
import torch, toy_program, mpk_dynamo
from mpk_dynamo.runtime.build import build
from mpk_dynamo.targets import known
if sys.argv[2] == "load":
    print(mpk_dynamo.load_cache_artifacts(open(sys.argv[3], "rb").read()).artifacts["mpk_dynamo"])
a = build(toy_program.program(), known("sm_90a"), cache_dir=sys.argv[1])
if sys.argv[2] == "save":
    open(sys.argv[3], "wb").write(torch.compiler.save_cache_artifacts()[0])
print(a.key, a.from_cache)
"""


def test_torch_saves_and_loads_kernels(tmp_path, monkeypatch):
    from torch.compiler._cache import CacheArtifactManager

    from mpk_dynamo.runtime import artifacts

    monkeypatch.setattr(artifacts, "_loaded", {})
    with CacheArtifactManager.with_fresh_cache():
        made = _build(tmp_path / "a")
        data, info = torch.compiler.save_cache_artifacts()
    assert info.artifacts["mpk_dynamo"] == [made.key]
    assert mpk_dynamo.load_cache_artifacts(data).artifacts["mpk_dynamo"] == [made.key]
    with CacheArtifactManager.with_fresh_cache():
        again = _build(tmp_path / "b")
        assert torch.compiler.save_cache_artifacts()[1].artifacts["mpk_dynamo"] == [made.key], "handed on"
    assert again.from_cache and again.cubin == made.cubin and (tmp_path / "b" / f"{made.key}.mpk").exists()


@pytest.mark.slow
def test_artifacts_of_torch_carry_kernels_to_another_process(tmp_path):
    path = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

    def process(folder, what):
        command = [sys.executable, "-c", ARTIFACTS.format(path=path), str(tmp_path / folder), what, str(tmp_path / "a")]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split("\n")

    key, hit = process("one", "save")[0].split()
    assert hit == "False"
    assert process("other", "load") == [f"['{key}']", f"{key} True", ""]
    assert process("other", "save") == [f"{key} True", ""], "what was loaded is kept, and handed on"
    assert process("third", "load") == [f"['{key}']", f"{key} True", ""]


def test_a_damaged_artifact_is_compiled_anew(tmp_path, monkeypatch):
    from mpk_dynamo.runtime import artifacts

    key = _build(tmp_path / "a").key
    entry = (tmp_path / "a" / f"{key}.mpk").read_bytes()
    monkeypatch.setattr(artifacts, "_loaded", {key: entry[:-1] + bytes([entry[-1] ^ 1])})
    with pytest.warns(RuntimeWarning, match="of loaded artifacts is damaged"):
        assert not _build(tmp_path / "b").from_cache
    assert _build(tmp_path / "b").from_cache


def test_a_torch_without_artifacts_of_others(stored, monkeypatch):
    from mpk_dynamo.runtime import artifacts

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.compiler._cache", None)
        assert not artifacts._register.__wrapped__()
    monkeypatch.setattr(artifacts, "register", lambda: False)
    assert stored[0].get(KEY)[0] == CUBIN


def test_threads_may_use_it_first_at_the_same_time(tmp_path):
    """Each tells torch of the kernels' kind of artifact, which torch takes once."""
    code = (
        "import sys\nfrom concurrent.futures import ThreadPoolExecutor\nfrom threading import Barrier\n"
        "import torch.compiler._cache\nfrom mpk_dynamo.runtime import artifacts\n"
        "sys.setswitchinterval(1e-6)\nstart = Barrier(8)\n"
        "def first(n):\n    start.wait()\n    artifacts.record(str(n), b'x')\n"
        "list(ThreadPoolExecutor(8).map(first, range(8)))\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
