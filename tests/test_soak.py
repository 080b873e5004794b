"""`soak`: what differs, fails or grows is found and said with how to repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpk_dynamo.errors import DeviceFault
from mpk_dynamo.tools import soak as command
from mpk_dynamo.tools.cli import main
from mpk_dynamo.tools.memory import Memory
from mpk_dynamo.tools.soak import FIXED, Result, Round, Soak

TINY = str(Path(__file__).resolve().parents[1] / "examples" / "tiny_model" / "model")
VOCABULARY = 50
GREEDY = Round(0, batch=2, prompt=3, new=5, steps=2, sampled=False, ends=False, seed=9)


class Model:
    """generate() of some fixed function of the inputs. spoil(call number, tokens, logits): changes them in place."""

    def __init__(self, spoil: Any = lambda call, tokens, logits: None) -> None:
        self.config, self.device = SimpleNamespace(vocab_size=VOCABULARY), torch.device("cpu")
        self.generation_config = SimpleNamespace()
        self.calls, self._spoil = 0, spoil

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **how: Any) -> Any:
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        logits = torch.rand(max_new_tokens, len(input_ids), VOCABULARY, generator=generator)
        tokens = torch.cat([input_ids, logits.argmax(-1).T], 1)
        self._spoil(self.calls, tokens, logits)
        self.calls += 1
        if how.get("output_logits"):
            return SimpleNamespace(sequences=tokens, logits=tuple(logits))
        return tokens


def run(spoil: Any, what: Round = GREEDY) -> str:
    return Soak(Model(spoil), 16, Result()).run(what)  # type: ignore[arg-type]


def test_equal_runs_are_fine_and_counted() -> None:
    result = Result()
    assert Soak(Model(), 16, result).run(GREEDY) == ""  # type: ignore[arg-type]
    assert (result.runs, result.tokens) == (4, 4 * 2 * 5)


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (0, "between launches of any and of 2 steps, first in sequence 1 at new token 2"),
        (2, "between two runs of single steps"),
        (3, "between two runs of single steps"),
    ],
)
def test_a_token_that_differs_shows(call: int, wanted: str) -> None:
    def spoil(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        if number == call:
            tokens[1, 5] ^= 1

    assert wanted in run(spoil)


def test_the_loop_is_compared_with_single_steps() -> None:
    def spoil(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        if number in (2, 3):
            tokens[0, 3] ^= 1

    assert "between the loop and single steps, first in sequence 0 at new token 0 (the prefill's own)" in run(spoil)


def test_one_bit_of_a_logit_and_what_is_not_finite_show() -> None:
    def bit(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        if number == 3:
            logits[4, 1, 7].view(torch.int32).bitwise_xor_(1)

    def nan(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        logits[4, 1, 7] = float("nan")

    assert "1 logits differ between two runs, first at step, sequence, token [4, 1, 7]" in run(bit)
    assert run(nan) == "logits are not finite"


def test_the_fixed_round_is_compared_over_time() -> None:
    def later(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        logits += number // 4

    soak = Soak(Model(later), 16, Result())  # type: ignore[arg-type]
    fixed = Round(FIXED, 2, 3, 5, 2, False, False, 9)
    assert soak.run(fixed) == ""
    assert soak.run(fixed) == "logits differ between the start of the soak and now"


def test_rounds_follow_the_seed_and_fit_the_cache() -> None:
    made = [Round.draw(3, n, [1, 4], 32) for n in range(200)]
    assert made == [Round.draw(3, n, [1, 4], 32) for n in range(200)]
    assert made != [Round.draw(4, n, [1, 4], 32) for n in range(200)]
    assert {r.batch for r in made} == {1, 4} and {r.sampled for r in made} == {r.ends for r in made} == {True, False}
    assert all(1 <= r.prompt and 2 <= r.new and r.prompt + r.new <= 32 for r in made)
    for r in made[:20]:
        inputs = r.inputs(VOCABULARY, torch.device("cpu"))
        assert inputs["attention_mask"][:, -1].all(), "padding is on the left, and never all of a prompt"


def test_what_grows_is_said() -> None:
    memory = Memory(torch.device("cpu"))
    memory.allocated_mb, memory.device_mb = [10.0, 10.0], [100.0, 120.0]
    assert memory.grown(shared=False) == []
    memory.allocated_mb[1] += 0.000512
    memory.device_mb[1] += 20
    assert memory.grown(shared=False) == [
        "tensors on the device grew by 0.000512 MB",
        "memory in use on the device grew by 40.0 MB (--shared if others use it)",
    ]
    assert len(memory.grown(shared=True)) == 1
    memory.look()
    assert memory.host_mb[0] > 0 and memory.figures()["tensors"] == [10.0, 10.001]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setattr(command, "load", lambda *_args, **_how: model)
    monkeypatch.setattr(command, "enable", lambda model, **_how: model)
    monkeypatch.setattr(command, "disable", lambda model: model)
    return model


COMMAND = ["soak", "--device", "cpu", "--batch", "1", "2", "--max-cache", "16", "--seed", "5", "--minutes", "0.01"]


def test_the_command_says_what_it_did(stubbed: Model, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*COMMAND, "--json", str(tmp_path / "f.json")]) == 0
    assert "all runs agree bit by bit; no fault" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["rounds"] > 0 and figures["probes"] == 2 and figures["seed"] == 5 and not figures["problems"]


@pytest.mark.slow
def test_a_fault_ends_it_with_how_to_repeat(stubbed: Model, capsys: pytest.CaptureFixture[str]) -> None:
    def fault(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        if number == 40:
            raise DeviceFault("event 7 never came")

    stubbed._spoil = fault
    assert main(COMMAND) == 1
    out = capsys.readouterr().out
    assert "DeviceFault: event 7 never came" in out and "all runs agree" not in out
    again = out.partition("again: python -m mpk_dynamo ")[2].split("\n")[0].split()
    number = int(again[again.index("--round") + 1])
    stubbed._spoil, stubbed.calls = lambda *_: None, 0
    assert main(again) == 0
    assert f"{Round.draw(5, number, [1, 2], 16)}" in out and "1 rounds in" in capsys.readouterr().out


def test_an_interrupt_gives_the_result_so_far(stubbed: Model, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        if number == 40:
            raise KeyboardInterrupt

    stubbed._spoil = interrupt
    assert main(COMMAND) == 0
    assert ", interrupted\n40 runs of generate()" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--batch", "17"], "sizes from 1 to 16"),
        (["--minutes", "0"], "a positive number"),
        (["--max-cache", "4"], "at least 8"),
        (["--model", "qwen3-06b"], "did you mean 'qwen3-0.6b'"),
    ],
)
def test_mistakes_end_with_status_2(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak", "--device", "cpu", *arguments]) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_on_the_executor(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["soak", "--device", "cpu", "--model", TINY, "--batch", "2", "--max-cache", "16", "--minutes", "0.1"]
    assert main(command) == 0, capsys.readouterr().out
