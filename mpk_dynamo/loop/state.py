"""What the caller hands to a loop: how to sample, and the tensors of one generation."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..errors import MpkError
from ..ops.draw import NUMBERS, draw

CAPACITY = 1 << 16
"""Tokens one generation can hold per sequence. Fixed, so that one program serves generations of any length."""

MAX_EOS = 32
"""End-of-sequence ids one generation can have."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the names and meanings of HF's generation config, applied in its order (repetition
    penalty, min_new_tokens, temperature, top-k, top-p, min-p). Without `do_sample` the largest logit wins, after the
    first two. min_new_tokens: for so many tokens, ids that the state bars are not chosen.

    Which stages are present is compiled into a program; their numbers are data. Raises ValueError for a number
    outside its range."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for name, fine, wanted in (
            ("temperature", self.temperature > 0 and math.isfinite(self.temperature), "greater than 0"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 <= self.top_p <= 1, "in [0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("min_new_tokens", self.min_new_tokens >= 0, "0 or more"),
            (
                "repetition_penalty",
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "greater than 0",
            ),
        ):
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be {wanted}")

    @property
    def stages(self) -> frozenset[str]:
        """The stages that change something: what a program is compiled for."""
        found = {"penalty"} if self.repetition_penalty != 1.0 else set()
        found |= {"min_new_tokens"} if self.min_new_tokens else set()
        if self.do_sample:
            found |= {"sample"}
            found |= {"temperature"} if self.temperature != 1.0 else set()
            found |= {"top_k"} if self.top_k else set()
            found |= {"top_p"} if self.top_p < 1.0 else set()
            found |= {"min_p"} if self.min_p > 0.0 else set()
        return frozenset(found)


@functools.cache
def _stream_aside(device: torch.device) -> torch.cuda.Stream:
    """Made before anything is launched, since making one may wait for the device; of a priority of its own, since
    streams of one priority share hardware queues, where a copy stands behind the launches of another stream."""
    return torch.cuda.Stream(device, priority=-1)


@dataclass
class LoopState:
    """The tensors of one generation, all on one device; made by `create`. A launch reads and writes them in place.

    tokens: [B, max_steps] int64, the tokens chosen so far; pad after the end of a sequence. finished: [B] bool.
    counters: [4] int64: `step`, `done`, a word in which a launch notes that it has ended for good, and one in which the
    host asks for that. The rest is `inputs`.
    """

    tokens: torch.Tensor
    finished: torch.Tensor
    counters: torch.Tensor
    seen: torch.Tensor | None
    sampling: Sampling
    inputs: dict[str, torch.Tensor] = field(repr=False)
    _all_tokens: torch.Tensor = field(repr=False)
    _one: torch.Tensor = field(repr=False)
    _aside: torch.cuda.Stream | None = field(repr=False)
    known: tuple[int, bool] | None = None
    """What `read` said last, None when that may have changed."""
    most: int = 0
    """What `step` will be at most when the launches under way are done."""

    @classmethod
    def create(
        cls,
        batch: int,
        max_steps: int,
        device: torch.device | str,
        vocab: int,
        sampling: Sampling,
        *,
        eos: Iterable[int] = (),
        pad: int | None = None,
        seed: int = 0,
        seen_ids: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        barred: Iterable[int] = (),
    ) -> "LoopState":
        """State before the first token.

        vocab: columns of the logits. eos: ids that finish a sequence; with none, nothing finishes. pad: what a finished
        sequence emits, needed with eos when batch > 1 (default: the first eos, or 0). seed: key of the random numbers,
        64 bits. seen_ids: [B, T] ids that the repetition penalty counts as seen (the prompt). sequence_ids: [B] int64,
        each the name of a sequence's stream of random numbers (default 0 .. B - 1). barred: ids that are not chosen for
        sampling.min_new_tokens tokens.

        Raises ValueError for more steps or ids than a state can hold.
        """
        ends = tuple(int(e) for e in eos)
        if not 0 < max_steps <= CAPACITY:
            raise ValueError(f"{max_steps} steps; one generation can hold 1 to {CAPACITY}")
        if len(ends) > MAX_EOS:
            raise ValueError(f"{len(ends)} end-of-sequence ids; {MAX_EOS} are possible")
        device = torch.device(device)

        def integers(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        everything = torch.zeros(batch, CAPACITY, dtype=torch.int64, device=device)
        padding = pad if pad is not None else (ends[0] if ends else 0)
        numbers = (
            sampling.temperature, float(sampling.top_k), sampling.top_p, sampling.min_p, sampling.repetition_penalty
        )  # fmt: skip
        inputs = {
            "loop.eos": integers(*ends, *(-1,) * (MAX_EOS - len(ends))),
            "loop.pad": integers(padding),
            "loop.key": integers(seed if seed < 1 << 63 else seed - (1 << 64)),
            "loop.sequences": integers(*range(batch)) if sequence_ids is None else sequence_ids.to(device, torch.int64),
            "loop.numbers": torch.tensor(numbers, dtype=torch.float64, device=device),
        }
        if "min_new_tokens" in sampling.stages:
            inputs["loop.least"] = integers(sampling.min_new_tokens)
            inputs["loop.barred"] = torch.zeros(vocab, dtype=torch.bool, device=device)
            inputs["loop.barred"][[i for i in barred if 0 <= i < vocab]] = True
        counters = torch.zeros(4, dtype=torch.int64, device=device)
        state = cls(
            tokens=everything[:, :max_steps],
            finished=torch.zeros(batch, dtype=torch.bool, device=device),
            counters=counters,
            seen=None,
            sampling=sampling,
            inputs=inputs,
            _all_tokens=everything,
            _one=torch.ones(1, dtype=torch.int64, pin_memory=counters.is_cuda),
            _aside=_stream_aside(counters.device) if counters.is_cuda else None,
            known=(0, False),
        )
        if "penalty" in sampling.stages:
            state.seen = torch.zeros(batch, vocab, dtype=torch.bool, device=device)
            state._mark(seen_ids)
        return state

    @property
    def storages(self) -> dict[str, torch.Tensor]:
        """The tensor of each storage that `append_loop` adds to a graph."""
        found = {
            **self.inputs,
            "loop.tokens": self._all_tokens,
            "loop.finished": self.finished,
            "loop.step": self.step,
            "loop.done": self.done,
        }
        return found if self.seen is None else {**found, "loop.seen": self.seen}

    @property
    def step(self) -> torch.Tensor:
        """[] int64: how many tokens each row of `tokens` holds; also the place in each sequence's stream of random
        numbers."""
        return self.counters[0]

    @property
    def done(self) -> torch.Tensor:
        """[] int64: 1 when all sequences are finished."""
        return self.counters[1]

    @property
    def max_steps(self) -> int:
        return self.tokens.shape[1]

    def read(self) -> tuple[int, bool]:
        """(tokens chosen, whether all sequences are finished), once the device is done with what was launched."""
        step, done, *_ = self.counters.tolist()
        self.known, self.most = (step, bool(done)), step
        return self.known

    def launching(self, steps: int) -> None:
        """Up to `steps` steps are about to be launched. Raises MpkError when `tokens` has no room for them."""
        if self.most + steps > self.max_steps:
            raise MpkError(
                f"{steps} steps after {self.most}, but the state has room for {self.max_steps}",
                remedy="make the state with more max_steps",
            )
        self.known, self.most = None, self.most + steps

    def stop(self) -> None:
        """Let the launch under way end after the step it is at, and those behind it run none. Returns at once, however
        many there are."""
        if not self.counters.is_cuda:
            self.counters[1:] = 1
            return
        with torch.cuda.stream(self._aside):  # the current stream's turn comes after the launches
            self.counters[3:].copy_(self._one, non_blocking=True)
        self._aside.synchronize()

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V] fp32: the next token's logits after the repetition penalty, min_new_tokens and the temperature."""
        stages, numbers = self.sampling.stages, self.inputs["loop.numbers"].float()
        scores = logits.float()
        if self.seen is not None:
            penalty = numbers[NUMBERS["penalty"]]
            scores = torch.where(self.seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if "min_new_tokens" in stages:
            barred = self.inputs["loop.barred"] & (self.step < self.inputs["loop.least"])
            scores = scores.masked_fill(barred, -math.inf)
        return scores / numbers[NUMBERS["temperature"]] if "temperature" in stages else scores

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next token of each sequence from `logits` [B, V] as the program would, and record it.

        For the token after the prefill. Returns [B] int64. Raises MpkError when `tokens` is full."""
        step, _ = self.known or self.read()
        if step >= self.max_steps:
            raise MpkError(f"all {self.max_steps} steps of this generation are used")
        stages = self.sampling.stages
        scores = self.scores(logits)
        if "sample" in stages:
            numbers = self.inputs["loop.numbers"].cpu()  # read one by one
            key, sequences = int(self.inputs["loop.key"]), self.inputs["loop.sequences"].tolist()
            chosen = [draw(row, stages, numbers, key, step, s) for row, s in zip(scores, sequences, strict=True)]
            chosen = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
        else:
            chosen = first_largest(scores)
        token = torch.where(self.finished, self.inputs["loop.pad"], chosen)
        self.tokens[:, step] = token
        self.finished |= (token[:, None] == self.inputs["loop.eos"]).any(1)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        self._moved(step + 1)
        return token

    def rewind(self, step: int, finished: torch.Tensor | None = None, seen_ids: torch.Tensor | None = None) -> None:
        """Go back to when `step` tokens were chosen. finished: [B] bool, as it was then (default: from the tokens that
        are left). seen_ids: [B, T], every id that counts as seen by then."""
        now, _ = self.read()
        if not 0 <= step <= now:
            raise ValueError(f"cannot go back to step {step} of {now}")
        if finished is None:
            finished = (self.tokens[:, :step, None] == self.inputs["loop.eos"]).any(2).any(1)
        self.finished.copy_(finished)
        self._moved(step)
        if self.seen is not None:
            self.seen.zero_()
            self._mark(seen_ids)

    def _moved(self, step: int) -> None:
        """The host has brought the state to `step`."""
        self.counters[0] = step
        self.counters[1:] = self.finished.all()
        self.known, self.most = None, step

    def _mark(self, ids: torch.Tensor | None) -> None:
        if ids is None or not ids.numel():
            return
        vocab = self.seen.shape[1]
        ids = ids.to(self.seen.device)
        # an id without a column in the logits cannot be penalised
        padded = torch.zeros(self.seen.shape[0], vocab + 1, dtype=torch.bool, device=self.seen.device)
        self.seen |= padded.scatter_(1, ids.clamp(max=vocab), True)[:, :vocab]


def first_largest(scores: torch.Tensor) -> torch.Tensor:
    """[B, V] -> [B] int64: the column of the largest element, of equal ones the first; a NaN is larger than any
    number. (torch.argmax promises no order among equals.)"""
    best = scores.amax(1, keepdim=True)
    hit = (scores == best) | (scores.isnan() & best.isnan())
    columns = torch.arange(hit.shape[1], device=hit.device)
    return torch.where(hit, columns, hit.shape[1]).amin(1)
