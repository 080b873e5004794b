"""Timelines of whole models: recording changes no bit, and what is recorded can be true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import gpu, kernel_only
from small_models import empty_cache, make, state, token_ids, walk

from mpk_dynamo.passes.schedule.timeline import COMPUTED, SIGNALLED, edges_of
from mpk_dynamo.profiler import Profile

pytestmark = [*gpu, kernel_only, pytest.mark.usefixtures("fresh_backend")]
STEPS = 12
EARLY = 0.2e-6
"""Seconds by which a waiter may seem to be before its producer: the timer that aligns the clocks counts in steps, and
the clocks' rates are known from two readings alone."""


def _run(batch: int, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch._dynamo.reset()
    model = make("qwen3", tied=True)
    compiled = torch.compile(model, backend="mpk", dynamic=False, options={"fallback": "error", **options})
    cache = empty_cache(model, batch, 24)
    return walk(compiled, cache, token_ids(batch, STEPS)), state(cache)


@pytest.mark.parametrize("batch", [1, 3])
def test_recording_changes_no_bit(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Profile] = []
    kept = Profile.__init__

    def keep(self: Profile, *args: Any, **kwargs: Any) -> None:
        kept(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(Profile, "__init__", keep)
    plain, plain_cache = _run(batch)
    logits, cache = _run(batch, profile=str(tmp_path), profile_call=3)
    assert torch.equal(plain, logits)
    assert all(torch.equal(a, b) for a, b in zip(plain_cache, cache))
    (text,) = tmp_path.glob("*.txt")
    assert "measured" in text.read_text() and "layers.*.mlp.down_proj" in text.read_text()
    assert json.loads(text.with_suffix(".json").read_text())["makespan_us"] > 0
    (profile,) = seen
    timeline = profile.timeline
    assert (np.diff(timeline.clock, axis=1) >= 0).all(), "phases are in order"
    assert (timeline.phases[:, 0] > -1e-9).all(), "a worker runs one task at a time"
    assert timeline.clock[:, SIGNALLED].max() < 0.01
    for edge in edges_of(timeline.schedule):
        if not edge.flagged:  # all consumers meet before they signal, and after they have waited
            last = timeline.clock[edge.producers, COMPUTED].max()
            assert (timeline.clock[edge.waiters, edge.mark] > last - EARLY).all()
