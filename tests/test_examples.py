"""The examples do what they say. As a user runs them: each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
VERDICT = re.compile(r"margins \[([\d., ]+)\]: (equal to torch|equal but for rounding)")


def run(script: str, *arguments: str) -> dict[str, str]:
    """The lines of an example by their first word. It must succeed."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if len(line.split()) > 1)


@pytest.mark.parametrize("tokens", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_operator_added_with_two_files(tokens):
    said = run("add_an_op.py", "--tokens", str(tokens))
    assert said["graph"] == "margin = margin(logits) -> margin"
    assert said["tasks"].startswith(f"8 linear, {tokens} margin; 1 events")
    assert said["verified"] == "graph, tasks, schedule, program"
    assert said["compiled"].startswith("for sm_90a: ") and " 0/0 bytes spilled" in said["compiled"]
    found = VERDICT.fullmatch(said["reference"])
    assert found and len(found[1].split(",")) == tokens
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        assert VERDICT.fullmatch(said["kernel"])
    else:
        assert said["kernel"].startswith("not launched")


@pytest.mark.slow
def test_a_model_answers_as_in_eager_execution():
    said = run("generate_text.py", "--model", str(EXAMPLES / "tiny_model" / "model"), "--tokens", "6")
    assert said["answer"] == "Paris."
    assert re.fullmatch(r"the same \d+ tokens", said["eager"]) and said["repeated"] == "same tokens"
    assert re.match(r"the whole decode step: \d+ calls became \d+ nodes", said["captured"])


@pytest.mark.slow
def test_chat_streams_turns_with_one_cache():
    said = chat("What is the capital of France?\nWhat is 3 plus 4?\n")
    assert [line.strip() for line in said.splitlines() if line.strip()] == ["Paris.", "7."]


def chat(lines: str) -> str:
    command = [sys.executable, str(EXAMPLES / "chat.py"), "--device", "cpu", "--tokens", "8"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "per second" in done.stderr and "starts again" not in done.stderr
    return done.stdout
