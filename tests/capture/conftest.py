"""Fixtures: a fresh Dynamo for each test, and a backend that captures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capturing import Grab


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def grab() -> Grab:
    return Grab()
