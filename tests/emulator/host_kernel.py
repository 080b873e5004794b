"""The generated kernel, compiled for the host and run there. kernels_cuda/tests/host/cuda.h says how. MPK_HOST_SEED
gives the turns of threads and the order in which copies land another seed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

from host_device import HostDevice

from mpk_dynamo import abi
from mpk_dynamo.ir.program import Program
from mpk_dynamo.runtime.sources import include_dir

COMPILER = shutil.which("g++")
HOST = Path(__file__).parents[2] / "kernels_cuda" / "tests" / "host"
ENTRY = """
extern "C" void mpk_host_launch(const void* launch, unsigned blocks, unsigned threads, unsigned seed) {
  host::run(blocks, threads, seed, host_shared, [=] { %s(*static_cast<const mpk::Launch*>(launch)); });
}
"""
FLAGS = "-std=c++17 -O1 -fPIC -shared -pthread -ffp-contract=off -march=native -U_FORTIFY_SOURCE -w".split()
# a vector at an address that is no multiple of its size: the host would not mind, a GPU does
FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]


def compile_for_host(program: Program, folder: Path) -> Path:
    """The kernel as a shared library. Raises RuntimeError with the compiler's messages."""
    key = hashlib.sha256(program.source.encode())
    for file in sorted([*HOST.rglob("*.*h"), *include_dir().rglob("*.*h")]):
        key.update(file.read_bytes())
    name = key.hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        (folder / "mpk").mkdir(exist_ok=True)
        (folder / "mpk" / "abi.h").write_text(abi.header())
        source = folder / f"{name}.cpp"
        source.write_text('#include "cuda.h"\n' + program.source + ENTRY % abi.KERNEL_NAME)
        paths = [f"-I{p}" for p in (HOST, folder, include_dir())]
        command = [COMPILER, *FLAGS, *paths, "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[:6000])
    return library


class EmulatedKernel:
    """Stands for runtime.device.Kernel. A launch returns when the kernel is done."""

    def __init__(self, library: Path, seed: int) -> None:
        self.entry, self.seed = ctypes.CDLL(str(library)).mpk_host_launch, seed
        self.entry.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]

    def co_resident(self, threads: int, shared_bytes: int) -> int:
        return 1 << 10

    def launch(self, grid: int, threads: int, shared_bytes: int, stream: int, params: int) -> None:
        self.seed += 1
        self.entry(ctypes.c_uint64.from_address(params).value, grid, threads, self.seed)


class EmulatedDevice(HostDevice):
    """A device whose kernels run on the host."""

    def __init__(self, library: Path, seed: int = 0) -> None:
        super().__init__()
        self.kernel = EmulatedKernel(library, seed + 1000 * int(os.environ.get("MPK_HOST_SEED", "0")))


def artifact_for(program: Program) -> SimpleNamespace:
    """What Executable wants of an artifact."""
    return SimpleNamespace(cubin=b"", resources=SimpleNamespace(registers=0, spill_store=0, spill_load=0))
