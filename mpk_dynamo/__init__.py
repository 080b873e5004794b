"""mpk_dynamo: one persistent CUDA kernel for the decode step of a HuggingFace model.

`torch.compile(model, backend="mpk")` needs no import of this package. Importing it is cheap: torch comes with the
first use of a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "enable": "mpk_dynamo.opt_in",
    "disable": "mpk_dynamo.opt_in",
    "custom_generate": "mpk_dynamo.generate.hf",
    "explain": "mpk_dynamo.tools.explain",
    "load_cache_artifacts": "mpk_dynamo.runtime.artifacts",
    "reports": "mpk_dynamo.report",
    "clear_reports": "mpk_dynamo.report",
    "Settings": "mpk_dynamo.settings",
    "MpkError": "mpk_dynamo.errors",
    "Unsupported": "mpk_dynamo.errors",
    "OptionError": "mpk_dynamo.errors",
    "VerificationError": "mpk_dynamo.errors",
    "CompileError": "mpk_dynamo.errors",
    "LaunchError": "mpk_dynamo.errors",
    "DeviceFault": "mpk_dynamo.errors",
}

__all__ = [
    "CompileError",
    "DeviceFault",
    "LaunchError",
    "MpkError",
    "OptionError",
    "Settings",
    "Unsupported",
    "VerificationError",
    "__version__",
    "clear_reports",
    "custom_generate",
    "disable",
    "enable",
    "explain",
    "load_cache_artifacts",
    "reports",
]

if TYPE_CHECKING:
    from .errors import CompileError, DeviceFault, LaunchError, MpkError, OptionError, Unsupported, VerificationError
    from .generate.hf import custom_generate
    from .opt_in import disable, enable
    from .report import clear_reports, reports
    from .runtime.artifacts import load_cache_artifacts
    from .settings import Settings
    from .tools.explain import explain


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpk_dynamo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
