"""Runtime: compiling, caching, loading and launching. The only importer of cuda.*, and only when it is needed."""

from .build import Artifact, build
from .resources import ResourceReport

__all__ = ["Artifact", "DeviceCallable", "Executable", "ProfiledCallable", "ResourceReport", "build"]


def __getattr__(name: str) -> object:
    if name == "Executable":
        from .launch import Executable

        return Executable
    if name == "DeviceCallable":  # needs torch
        from .callable import DeviceCallable

        return DeviceCallable
    if name == "ProfiledCallable":
        from .profiled import ProfiledCallable

        return ProfiledCallable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
