"""`generate`: answer prompts with a local model on the decode loop, and say how fast it was."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer, TextStreamer

from ..errors import OptionError
from ..loop import Sampling
from ..opt_in import enable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def run(arguments: argparse.Namespace) -> int:
    """The command. Text goes to standard output, everything else to standard error."""
    _check(arguments)
    model, tokenizer = load_with_tokenizer(arguments.model, arguments.device or default_device())
    inputs = encode(tokenizer, arguments.prompt, chat=not arguments.plain).to(model.device)
    prompt = inputs["input_ids"].shape[1]
    cache = arguments.max_cache or prompt + arguments.max_new_tokens
    enable(model, max_cache_len=cache, loop_steps=arguments.steps)
    how = {**inputs, **_how(arguments, tokenizer)}
    begin = time.perf_counter()
    _say(f"{arguments.model} on {_device_name(model)}: {len(arguments.prompt)} x {prompt} prompt tokens; compiling")
    model.generate(**{**how, "max_new_tokens": 2})
    _say(f"ready after {time.perf_counter() - begin:.1f} s")
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if arguments.stream else None
    meter = Meter(arguments.max_new_tokens, len(arguments.prompt), text)
    out = model.generate(**how, streamer=meter)
    if not arguments.stream:
        for row in tokenizer.batch_decode(out[:, prompt:], skip_special_tokens=True):
            print(row.strip())
    _say(meter.summary())
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.stream and len(arguments.prompt) > 1:
        raise OptionError(f"--stream with {len(arguments.prompt)} prompts", remedy="stream one prompt at a time")
    if arguments.max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens is {arguments.max_new_tokens}", remedy="give at least 1")
    if arguments.temperature is not None and arguments.temperature <= 0:
        raise OptionError(f"--temperature is {arguments.temperature}", remedy="leave it out for greedy decoding")
    try:
        numbers = {n: getattr(arguments, n) for n in (*SAMPLING, "repetition_penalty")}
        Sampling(do_sample=True, **{n: v for n, v in numbers.items() if v is not None})
    except ValueError as error:
        raise OptionError(str(error)) from None
    for name in ("max_cache", "steps"):
        if getattr(arguments, name) < 0:
            raise OptionError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}", remedy="give 0 or more")


def _how(arguments: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    given = {n: v for n in SAMPLING if (v := getattr(arguments, n)) is not None}
    how = {"max_new_tokens": arguments.max_new_tokens, "do_sample": bool(given) or arguments.sample, **given}
    if arguments.repetition_penalty is not None:
        how["repetition_penalty"] = arguments.repetition_penalty
    if tokenizer.pad_token_id is not None:
        how["pad_token_id"] = tokenizer.pad_token_id
    return how


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_with_tokenizer(folder: str, device: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model in bf16, in eval mode on `device`. Raises OptionError for what is no folder with a tokenizer."""
    from transformers import AutoTokenizer

    from .models import load

    if not Path(folder).is_dir():
        raise OptionError(f"no folder {folder!r}", remedy="give a local folder with a model and its tokenizer")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("no CUDA device", remedy="--device cpu runs the reference executor, slowly")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{folder} has no tokenizer: {str(error).splitlines()[0]}", remedy="save it beside the model"
        ) from error
    tokenizer.padding_side = "left"
    return load(folder, device=device), tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", prompts: list[str], *, chat: bool) -> Any:
    """Ids and mask [B, T], padded on the left; through the model's chat template when it has one and `chat` is on."""
    if chat and tokenizer.chat_template:
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
            for p in prompts
        ]
        return tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, add_special_tokens=False)
    return tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)


def _device_name(model: "PreTrainedModel") -> str:
    on_gpu = model.device.type == "cuda"
    return torch.cuda.get_device_name(model.device) if on_gpu else "the reference executor (no GPU)"


class Meter(BaseStreamer):
    """Passes tokens on, keeps the time of each, and shows on a terminal how far it is."""

    def __init__(self, limit: int, batch: int, further: BaseStreamer | None = None) -> None:
        self._limit, self._batch, self._further = limit, batch, further
        self._begin, self._times, self._shown = time.perf_counter(), [], 0.0

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        if value.dim() == 1:  # the prompt comes first, with two dimensions
            self._times.append(now)
            if self._further is None and sys.stderr.isatty() and now - self._shown > 0.2:
                self._shown = now
                print(f"\r{len(self._times)}/{self._limit} tokens", end="", file=sys.stderr, flush=True)
        if self._further is not None:
            self._further.put(value)

    def end(self) -> None:
        if self._shown:
            print("\r", end="", file=sys.stderr)
        if self._further is not None:
            self._further.end()

    def summary(self) -> str:
        """Time to the first token and the rate of the later ones."""
        if not self._times:
            return "no token"
        first, last = self._times[0] - self._begin, self._times[-1] - self._times[0]
        text = f"{len(self._times)} x {self._batch} tokens; first after {first * 1e3:.0f} ms"
        if last > 0 and len(self._times) > 1:
            steps = len(self._times) - 1
            text += f"; then {steps * self._batch / last:.1f} tokens/s, {last / steps * 1e3:.2f} ms per step"
        return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
