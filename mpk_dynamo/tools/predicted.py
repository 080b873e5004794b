"""Edges and step time of a schedule for `explain`: predicted, and measured where a profile is at hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..passes.schedule.simulate import simulate
from ..profiler import Profile
from ..targets import machine_of

if TYPE_CHECKING:
    from ..ir.schedule import Schedule
    from ..targets import Target

Rows = list[tuple[str, str]]


def load_profile(path: str) -> dict[str, Any]:
    """The figures that `profile --json` wrote. Raises OptionError for another file."""
    try:
        with open(path, encoding="utf-8") as file:
            figures = json.load(file)
        if figures["times"] == "measured" and {"makespan_us", "edges", "title"} <= set(figures):
            return figures
        why = "its times are predicted" if figures["times"] == "predicted" else "figures are missing"
    except OSError as error:
        why = error.strerror or "it cannot be read"
    except (ValueError, KeyError, TypeError):
        why = "it is no profile"
    raise OptionError(f"{path}: {why}", remedy="give what `profile --json FILE` wrote on a GPU")


def predicted_rows(schedule: "Schedule", target: "Target", measured: dict[str, Any] | None, live: int | None) -> Rows:
    """(name, text) of the step and of each kind of edge that a task waits for, the costliest first. An edge's cost is
    the time from its last producer's end until a reader has its inputs. live: keys that attentions find, as in
    `simulate`."""
    machine = machine_of(target)
    figures = Profile(simulate(schedule, machine, live), "", machine.bandwidth, "").figures()
    step = f"{figures['makespan_us'] / 1e3:.3f} ms predicted"
    seen: dict[tuple[str, ...], float] = {}
    if measured:
        step += f", {measured['makespan_us'] / 1e3:.3f} ms measured ({measured['title']})"
        seen = {_key(e): e["median_latency_us"] for e in measured["edges"]}
    count = sum(e["times"] for e in figures["edges"])
    rows = [("step", step), ("edges", f"{count} between operators on the way of a step, by kind:")]
    for edge in figures["edges"]:
        text = f"{edge['from']} to {edge['to']}, {edge['kind']}, {edge['times']} times: "
        text += f"{edge['median_latency_us']:.2f} us predicted"
        if _key(edge) in seen:
            text += f", {seen[_key(edge)]:.2f} us measured"
        rows.append(("", text))
    return rows


def _key(edge: dict[str, Any]) -> tuple[str, ...]:
    return edge["from"], edge["to"], edge["kind"]
