"""How a token is drawn from scores: exact integer arithmetic, so that host and device agree bit for bit."""

from __future__ import annotations

import torch


def draw(row: torch.Tensor, stages: frozenset[str], numbers: torch.Tensor, key: int, step: int, sequence: int) -> int:
    """The column drawn from one row of scores."""
    raise NotImplementedError
