"""What an installation promises: the backend's name, a cheap import, the public names, the device sources."""

from __future__ import annotations

import subprocess
import sys

import mpk_dynamo


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_lists_the_backend_before_anything_of_ours_is_imported():
    code = "import sys, torch; print('mpk' in torch._dynamo.list_backends(), 'mpk_dynamo' in sys.modules)"
    assert run(code) == "True False"


def test_import_does_not_import_torch():
    assert run("import sys, mpk_dynamo; print('torch' in sys.modules, mpk_dynamo.__version__)") == "False 0.1.0"


def test_every_public_name_resolves():
    for name in mpk_dynamo.__all__:
        assert getattr(mpk_dynamo, name) is not None
    assert set(mpk_dynamo.__all__) <= set(dir(mpk_dynamo))


def test_device_sources_are_found():
    from mpk_dynamo.runtime.sources import include_dir

    assert (include_dir() / "mpk" / "megakernel.cuh").is_file()
