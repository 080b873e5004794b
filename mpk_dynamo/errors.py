"""Every exception of the project. Each names the cause, the place in the model, and the next step."""

from __future__ import annotations


class MpkError(Exception):
    """Base class. `origin` is a place in the user's model (module path, source line) when one is known."""

    def __init__(self, message: str, *, origin: str = "", remedy: str = "") -> None:
        self.message, self.origin, self.remedy = message, origin, remedy
        parts = [message]
        if origin:
            parts.append(f"at {origin}")
        if remedy:
            parts.append(f"-> {remedy}")
        super().__init__(" ".join(parts))


ELSEWHERE = "the fallback runs it; for a place in the kernel, write it with operators that have one"


class Unsupported(MpkError):
    """A part of the graph that cannot be captured. The only exception that leads to a (reported) fallback.

    `passing`: the graph as a whole is of a kind that comes with many sizes and is not for these programs, such as the
    pass over a prompt, so that it is not to be split either.
    """

    def __init__(self, message: str, *, origin: str = "", remedy: str = "", passing: bool = False) -> None:
        super().__init__(message, origin=origin, remedy=remedy or ELSEWHERE)
        self.passing = passing


class OptionError(MpkError, ValueError):
    """An unknown or ill-typed option of the backend."""


class VerificationError(MpkError):
    """A stage broke a numbered rule: a defect of this project, never of the user's model. `rule` is e.g. "T4"."""

    def __init__(self, rule: str, message: str, *, origin: str = "") -> None:
        self.rule = rule
        super().__init__(f"{rule}: {message}", origin=origin, remedy="please report this with the dump directory")


class CompileError(MpkError):
    """NVRTC rejected a generated translation unit. `source_path` and `log` tell where and why."""

    def __init__(self, message: str, *, log: str = "", source_path: str = "") -> None:
        self.log, self.source_path = log, source_path
        remedy = f"source: {source_path}" if source_path else ""
        super().__init__(f"{message}\n{log}" if log else message, remedy=remedy)


class LaunchError(MpkError):
    """A CUDA driver call failed, or the kernel cannot be co-resident on this device."""


class ProfileError(MpkError):
    """Profile records that do not describe one whole launch."""


class DeviceFault(MpkError):
    """A bounded wait on the device ran out. The message names task, event, needed and seen counts, and the module."""
