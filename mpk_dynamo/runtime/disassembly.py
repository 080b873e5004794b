"""The instructions of a cubin, as nvdisasm prints them: which widths loads have, and which kind of tensor-core product.

nvdisasm comes with Triton, a dependency of PyTorch's CUDA builds, or with the CUDA toolkit."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

INSTRUCTION_BYTES = 16
"""Of every architecture that kernels are built for."""

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_WIDTH = re.compile(r"\.([US]?(?:8|16)|64|128)\b")


@lru_cache(maxsize=1)
def nvdisasm() -> str | None:
    """The disassembler's path, or None where there is none."""
    try:
        import triton.backends.nvidia as nvidia
    except ImportError:
        return shutil.which("nvdisasm")
    shipped = Path(next(iter(nvidia.__path__))) / "bin" / "nvdisasm"
    return str(shipped) if shipped.exists() else shutil.which("nvdisasm")


def instructions(cubin: bytes) -> Counter[str]:
    """Opcode with its modifiers -> how often it stands in the code, without padding. Raises FileNotFoundError without
    nvdisasm, CalledProcessError when it refuses the cubin."""
    tool = nvdisasm()
    if tool is None:
        raise FileNotFoundError("nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    found = Counter(_INSTRUCTION.findall(text))
    del found["NOP"]
    return found


def describe(found: Counter[str]) -> str:
    """Size of the code, loads by their width in bits, products on tensor cores by their kind."""
    parts = [f"{sum(found.values()) * INSTRUCTION_BYTES / 1024:.1f} KiB of code"]
    for name, opcodes in (("global", ("LDG", "LD")), ("shared", ("LDS", "LDSM"))):
        widths: Counter[int] = Counter()
        for opcode, n in found.items():
            if opcode.split(".")[0] in opcodes:
                width = _WIDTH.search(opcode)
                widths[int(width[1].lstrip("US")) if width else 32] += n
        if widths := +widths:
            parts.append(f"{name} loads " + ", ".join(f"{widths[w]} x {w} bit" for w in sorted(widths, reverse=True)))
    named = ((opcode, n) for opcode, n in sorted(found.items()) if n > 0 and opcode.startswith(("HMMA", "UBLKCP")))
    parts += [f"{n} x {opcode}" for opcode, n in named]
    return "; ".join(parts)
