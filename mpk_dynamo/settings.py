"""Settings: the one table of options. Each field is an option of `torch.compile(options={...})` and of
`mpk_dynamo.enable`, and an environment variable MPK_<NAME>; an option wins over the variable."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OptionError

LARGEST = 2**31 - 1
"""Bound of every number without one of its own: what tables and parameters of the kernel hold."""


def _option(
    default: Any,
    doc: str,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float = LARGEST,
) -> Any:
    metadata = {"doc": doc, "choices": choices, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What one compilation may do. Immutable; make it with `Settings.from_options`.

    The verifier has no option: no program is launched that it has not accepted.
    """

    device: str = _option(
        "auto",
        "cuda: the kernel; reference: the CPU executor; auto: where the model's tensors are",
        ("auto", "cuda", "reference"),
    )
    workers: int = _option(
        0, "resident CTAs or simulated workers; 0: one per SM, 8 on the reference executor", minimum=0
    )
    fallback: str = _option(
        "auto",
        "what runs graphs that cannot be captured; auto: inductor on CUDA, eager on CPU; error: raise instead",
        ("auto", "inductor", "eager", "error"),
    )
    dump_dir: str = _option("", "folder that receives every stage as text, the CUDA source and the report")
    progress: bool = _option(True, "a line on a terminal about a compilation that takes more than two seconds")
    cache_dir: str = _option("", "folder of compiled kernels; empty: the user's cache folder")
    cache_mb: int = _option(4096, "size of that folder: what was used longest ago is removed beyond", minimum=0)
    target: str = _option("", "build for this target, e.g. sm_90a, instead of the present GPU")
    flight: int = _option(0, "ring slots that a worker's loader keeps in flight; 0: about 64 KiB", minimum=0)
    flight_waiting: int = _option(0, "the same while its worker waits for an event; 0: half as many", minimum=0)
    profile: str = _option("", "folder that receives a timeline of each kernel: trace, report, figures")
    profile_call: int = _option(10, "the first call of a kernel that is recorded for it, of five in a row", minimum=1)
    loop_steps: int = _option(
        0, "decode steps per launch inside generate(); 0: grows until a launch takes 0.05 s, 0.025 s with a streamer",
        minimum=0,
    )
    timeout_s: float = _option(4.0, "bound of every wait on the device, in seconds", minimum=0.001, maximum=1e6)

    @staticmethod
    def from_options(options: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> "Settings":
        """Settings from a dict of options over MPK_* variables over defaults.

        Raises OptionError for an unknown option or MPK_* variable of one, a wrong type or a value out of range.
        """
        if options is not None and not isinstance(options, Mapping):
            given = type(options).__name__
            raise OptionError(f"options are of type {given}", remedy="give a dict of names and values")
        options = dict(options or {})
        environ = os.environ if environ is None else environ
        fields = {f.name: f for f in dataclasses.fields(Settings)}
        for name in options:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise OptionError(f"unknown option {name!r}", remedy=f"{hint}valid options: {', '.join(fields)}")
        values: dict[str, Any] = {}
        for name, field in fields.items():
            if name in options:
                values[name] = _checked(field, options[name], f"option {name!r}")
            elif environ.get(_variable(name), "") != "":
                values[name] = _checked(field, _parsed(field, environ[_variable(name)]), _variable(name))
        return Settings(**values)


def _variable(name: str) -> str:
    return f"MPK_{name.upper()}"


def _parsed(field: dataclasses.Field[Any], text: str) -> Any:
    """The text of an environment variable as the type of the option; left as text when it does not parse."""
    kind = type(field.default)
    if kind is bool:
        return {"0": False, "false": False, "1": True, "true": True}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _checked(field: dataclasses.Field[Any], value: Any, name: str) -> Any:
    kind = type(field.default)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if type(value) is not kind:
        given = f"{value!r:.80} ({type(value).__name__})"
        raise OptionError(f"{name} is {given}", remedy=f"give a value of type {kind.__name__}")
    choices, minimum = field.metadata["choices"], field.metadata["minimum"]
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"{name} is {value!r}", remedy=f"{hint}valid values: {', '.join(choices)}")
    if minimum is not None and not value >= minimum:
        raise OptionError(f"{name} is {value!r}", remedy=f"give at least {minimum}")
    if minimum is not None and value > field.metadata["maximum"]:
        raise OptionError(f"{name} is {value!r}", remedy=f"give at most {field.metadata['maximum']:.0f}")
    if kind is str and "\0" in value:
        raise OptionError(f"{name} is {value!r}", remedy="leave out the null character")
    return value


def table() -> str:
    """The options as a Markdown table."""
    rows = ["| option | type | default | variable | meaning |", "|---|---|---|---|---|"]
    for f in dataclasses.fields(Settings):
        cells = (
            f"`{f.name}`",
            type(f.default).__name__,
            f"`{f.default!r}`",
            f"`{_variable(f.name)}`",
            f.metadata["doc"],
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
