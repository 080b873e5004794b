"""`soak`: generate for a long time, everything several times over, and compare bit by bit."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MpkError, OptionError
from ..generate.hf import compile_config
from ..opt_in import disable, enable
from ..report import reports
from .memory import Memory
from .models import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_S = 30.0
"""Seconds between two looks at the memory."""
SINGLE_STEPS = 64
"""Most new tokens of the runs that take a launch per token, whose logits are compared."""
FIXED = -1
"""Number of the round that is the same every time: it makes the programs, and memory is measured after it."""


@dataclass(frozen=True)
class Round:
    """What is generated: `batch` sequences of `prompt` random tokens, of which some are padding on the left, and `new`
    more. steps: per launch of the second run. ends: whether a token of the first run ends the sequences of the others.
    """

    number: int
    batch: int
    prompt: int
    new: int
    steps: int
    sampled: bool
    ends: bool
    seed: int

    @staticmethod
    def draw(seed: int, number: int, batches: list[int], capacity: int) -> "Round":
        r = random.Random(f"{seed} {number}")
        prompt = r.randint(1, capacity // 2)
        new = r.randint(2, min(capacity - prompt, capacity // 2))
        sampled, ends = r.random() < 0.3, r.random() < 0.3
        return Round(number, r.choice(batches), prompt, new, r.randint(1, 32), sampled, ends, r.getrandbits(31))

    def inputs(self, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, vocabulary, (self.batch, self.prompt), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(self.batch):
            padding = int(torch.randint(0, self.prompt, (), generator=generator)) if row % 2 else 0
            ids[row, :padding], mask[row, :padding] = 0, 0
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def how(self) -> dict[str, Any]:
        """Arguments of generate() about the choice of tokens."""
        if not self.sampled:
            return {"do_sample": False}
        r = random.Random(self.seed)
        return {"do_sample": True, "temperature": r.uniform(0.5, 1.5), "top_k": r.randint(2, 80), "top_p": 0.95}


@dataclass
class Result:
    """tokens: made in all runs, padding after an end included. programs: compiled up to each look at the memory.
    problems: in words; empty when all is well."""

    rounds: int = 0
    runs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    probes: int = 0
    programs: list[int] = field(default_factory=list)
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)


class Soak:
    """Rounds on one model. Raises whatever a run raises."""

    def __init__(self, model: "PreTrainedModel", capacity: int, result: Result) -> None:
        self.model, self.capacity, self.result = model, capacity, result
        self.fixed: dict[Round, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, what: Round) -> str:
        """What differs between the runs of a round, or ""."""
        inputs = self._inputs(what)
        first = self._tokens(what, inputs, 0)
        more: dict[str, Any] = {}
        if what.ends:
            more = {"eos_token_id": int(first[-1, what.prompt + what.new // 2])}
            first = self._tokens(what, inputs, 0, **more)
        second = self._tokens(what, inputs, what.steps, **more)
        if wrong := _different(first, second, what.prompt, f"launches of any and of {what.steps} steps"):
            return wrong
        tokens, logits = self._single(what, inputs, more)
        again, logits_again = self._single(what, inputs, more)
        if wrong := _different(tokens, again, what.prompt, "two runs of single steps"):
            return wrong
        if not torch.equal(logits.view(torch.int32), logits_again.view(torch.int32)):
            places = (logits.view(torch.int32) != logits_again.view(torch.int32)).nonzero()
            return f"{len(places)} logits differ between two runs, first at step, sequence, token {places[0].tolist()}"
        if not torch.isfinite(logits).all():
            return "logits are not finite"
        wanted = min(first.shape[1], what.prompt + min(what.new, SINGLE_STEPS))
        wrong = _different(first[:, :wanted], tokens, what.prompt, "the loop and single steps")
        if wrong and not what.sampled:  # the loop draws other random numbers than torch.multinomial
            return wrong
        return self._compare_fixed(what, first, logits) if what.number == FIXED else ""

    def _compare_fixed(self, what: Round, tokens: torch.Tensor, logits: torch.Tensor) -> str:
        kept = self.fixed.setdefault(what, (tokens.cpu(), logits.cpu()))
        if wrong := _different(kept[0], tokens.cpu(), what.prompt, "the start of the soak and now"):
            return wrong
        same = torch.equal(kept[1].view(torch.int32), logits.cpu().view(torch.int32))
        return "" if same else "logits differ between the start of the soak and now"

    def _inputs(self, what: Round) -> dict[str, torch.Tensor]:
        return what.inputs(self.model.config.vocab_size, self.model.device)

    def _generate(self, what: Round, new: int, arguments: dict[str, Any]) -> Any:
        torch.manual_seed(what.seed)
        out = self.model.generate(**arguments, **what.how(), max_new_tokens=new)
        tokens = out if isinstance(out, torch.Tensor) else out.sequences
        self.result.runs += 1
        self.result.tokens += what.batch * (tokens.shape[1] - what.prompt)
        return out

    def _tokens(self, what: Round, inputs: dict[str, torch.Tensor], steps: int, **more: Any) -> torch.Tensor:
        config = compile_config(fallback="error", loop_steps=steps)
        return self._generate(what, what.new, {**inputs, "compile_config": config, **more})

    def _single(
        self, what: Round, inputs: dict[str, torch.Tensor], more: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and logits [steps, B, vocabulary] in fp32: the loop keeps none, so that HF's runs each step."""
        wanted = {"output_logits": True, "return_dict_in_generate": True}
        out = self._generate(what, min(what.new, SINGLE_STEPS), {**inputs, **more, **wanted})
        return out.sequences, torch.stack(out.logits).float()


def _different(a: torch.Tensor, b: torch.Tensor, prompt: int, what: str) -> str:
    if a.shape != b.shape:
        return f"{a.shape[1] - prompt} and {b.shape[1] - prompt} tokens from {what}"
    if torch.equal(a, b):
        return ""
    row, column = (a != b).nonzero()[0].tolist()
    place = column - prompt
    return f"tokens differ between {what}, first in sequence {row} at new token {place}" + (
        " (the prefill's own)" if place == 0 else ""
    )


def run(arguments: argparse.Namespace) -> int:
    """The command. Exit status 1 when something differed, failed or grew."""
    _check(arguments)
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {text}", file=sys.stderr, flush=True)

    # PyTorch keeps a plan of cuDNN's attention for each new length of an eager prefill: growth that is not ours
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = load(arguments.model, device=arguments.device, layers=arguments.layers)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    capacity, result = arguments.max_cache, Result()
    memory = Memory(model.device)
    soak = Soak(enable(model, max_cache_len=capacity, fallback="error"), capacity, result)
    try:
        _rounds(soak, arguments, memory, say)
    except KeyboardInterrupt:
        result.interrupted = True
        say("interrupted")
    disable(model)
    grown = memory.grown(shared=arguments.shared)
    result.problems += grown
    figures = _figures(arguments, result, memory)
    print(_text(figures))
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
    elif arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)
    return 1 if result.problems else 0


def _rounds(soak: Soak, arguments: argparse.Namespace, memory: Memory, say: Any) -> None:
    """All of it. A round that fails ends the soak: what follows a fault says nothing new."""
    result, capacity = soak.result, soak.capacity
    half = capacity // 2
    probe = [Round(FIXED, b, half, half, 7, sampled, False, 1) for b in arguments.batch for sampled in (False, True)]
    for what in probe:
        say(f"batch {what.batch}, {'sampled' if what.sampled else 'greedy'}: compile, and the first runs")
        if not _safely(soak, what, arguments):
            return
    _probe(soak, probe[0], arguments, memory)
    start = looked = time.perf_counter()
    numbers = iter([arguments.round]) if arguments.round is not None else iter(range(1 << 62))
    for number in numbers:
        what = Round.draw(arguments.seed, number, arguments.batch, capacity)
        if not _safely(soak, what, arguments):
            return
        result.rounds += 1
        result.seconds = time.perf_counter() - start
        over = result.seconds >= arguments.minutes * 60
        if over or time.perf_counter() - looked > PROBE_S:
            looked = time.perf_counter()
            say(f"{result.rounds} rounds, {result.tokens} tokens; {memory.line()}")
            if not _probe(soak, probe[0], arguments, memory) or over:
                return
    _probe(soak, probe[0], arguments, memory)


def _probe(soak: Soak, what: Round, arguments: argparse.Namespace, memory: Memory) -> bool:
    fine = _safely(soak, what, arguments)
    soak.result.probes += 1
    soak.result.programs.append(len(reports()))
    gc.collect()
    memory.look()
    return fine


def _safely(soak: Soak, what: Round, arguments: argparse.Namespace) -> bool:
    try:
        wrong = soak.run(what)
    except MpkError as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        soak.result.problems.append(f"{wrong}\n  in {what}\n  again: {_again(arguments, what.number)}")
    return not wrong


def _again(arguments: argparse.Namespace, number: int) -> str:
    words = [f"--model {arguments.model}", f"--batch {' '.join(map(str, arguments.batch))}"]
    words += [f"--layers {arguments.layers}"] if arguments.layers else []
    words += [f"--max-cache {arguments.max_cache}", f"--device {arguments.device}", f"--seed {arguments.seed}"]
    return " ".join(["python -m mpk_dynamo soak", *words, f"--round {max(number, 0)}"])


def _check(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("no CUDA device", remedy="--device cpu runs the reference executor, slowly")
    if not arguments.batch or not all(1 <= b <= 16 for b in arguments.batch):
        raise OptionError(f"--batch {arguments.batch}", remedy="give sizes from 1 to 16")
    if arguments.max_cache < 8:
        raise OptionError(f"--max-cache is {arguments.max_cache}", remedy="give at least 8 tokens")
    if not arguments.minutes > 0:
        raise OptionError(f"--minutes is {arguments.minutes}", remedy="give a positive number")


def _figures(arguments: argparse.Namespace, result: Result, memory: Memory) -> dict[str, Any]:
    import transformers

    on_gpu = arguments.device == "cuda"
    return {
        "model": arguments.model,
        "layers": arguments.layers or None,
        "batch": arguments.batch,
        "max_cache": arguments.max_cache,
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu (reference executor)",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **dataclasses.asdict(result),
        "memory": memory.figures(),
    }


def _text(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['model']}, batch {figures['batch']}, seed {figures['seed']}, on {figures['device']}: "
        f"{figures['rounds']} rounds in {figures['seconds']:.0f} s" + (", interrupted" * figures["interrupted"]),
        f"{figures['runs']} runs of generate(), {figures['tokens']} tokens; the fixed round {figures['probes']} times",
    ]
    if (programs := figures["programs"]) and programs[-1] > programs[0]:
        lines.append(f"{programs[-1] - programs[0]} programs were compiled after the first {programs[0]}")
    for name, values in figures["memory"].items():
        if values:
            lines.append(f"{name}: {values[0]} MB at first, {values[-1]} at the end, {max(values)} at most")
    lines += [f"problem: {p}" for p in figures["problems"]]
    return "\n".join([*lines, "" if figures["problems"] else "all runs agree bit by bit; no fault"]).rstrip()
