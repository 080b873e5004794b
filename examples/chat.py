"""A chat that streams, decoded by launches of many steps, with one cache for all turns.

    python examples/chat.py [--model FOLDER] [--device cpu|cuda] [--tokens N] [--temperature T] [--seed N]

Type a line and get an answer; an empty line or Ctrl-D ends. Ctrl-C ends an answer, not the chat. The default is the
tiny model of this repository, which knows questions such as "What is the capital of France?". Lines may also be piped
in.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache, TextStreamer
from transformers.utils import logging as transformers_logging

import mpk_dynamo

TINY = Path(__file__).resolve().parent / "tiny_model" / "model"


class Chat:
    """A conversation. The cache holds every token so far but the last one, so a turn reads only what is new."""

    def __init__(self, model: Any, tokenizer: Any, capacity: int, **how: Any) -> None:
        self.model, self.tokenizer, self.capacity, self.how = model, tokenizer, capacity, how
        self.streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.restart()

    def restart(self) -> None:
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.capacity)
        self.messages: list[dict[str, str]] = []
        self.ids = torch.zeros(1, 0, dtype=torch.int64, device=self.model.device)

    def say(self, text: str, tokens: int) -> int:
        """Print the answer as it comes; returns how many tokens it has."""
        new = self._new_ids(text)
        if self.ids.shape[1] + new.shape[1] + tokens > self.capacity:
            print("(the cache is full: the chat starts again)", file=sys.stderr)
            self.restart()
            new = self._new_ids(text)
        ids = torch.cat([self.ids, new], 1)
        how = {"max_new_tokens": tokens, "streamer": self.streamer, **self.how}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=self.cache, **how)
        answer = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.ids = out
        return out.shape[1] - ids.shape[1]

    def _new_ids(self, text: str) -> torch.Tensor:
        """What this turn adds: the question in the model's chat template; the tiny model has none, and knows one
        form."""
        if not self.tokenizer.chat_template:
            new = f"Question: {text} Answer:"
        else:
            question = {"role": "user", "content": text}
            make = self.tokenizer.apply_chat_template
            before = make(self.messages, tokenize=False) if self.messages else ""
            whole = make([*self.messages, question], tokenize=False, add_generation_prompt=True)
            new = whole[len(before) :] if whole.startswith(before) else whole
        return self.tokenizer(new, return_tensors="pt", add_special_tokens=False).input_ids.to(self.model.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="a local folder with model and tokenizer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=0, help="of an answer at most; default 256, 32 without a GPU")
    parser.add_argument("--capacity", type=int, default=0, help="tokens of the whole chat; default 4096, 192 without")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token always")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # newer transformers call past_key_values cache
    on_gpu = arguments.device != "cpu"
    if not on_gpu:
        torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval().to(arguments.device)
    mpk_dynamo.enable(model)
    how = {"do_sample": arguments.temperature > 0}
    if how["do_sample"]:
        how["temperature"] = arguments.temperature
    tokens = arguments.tokens or (256 if on_gpu else 32)
    capacity = arguments.capacity or (4096 if on_gpu else 192)
    chat = Chat(model, tokenizer, capacity, **how)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not text:
            break
        begin = time.perf_counter()
        try:
            count = chat.say(text, tokens)
        except mpk_dynamo.OptionError as error:
            print(f"({error})", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            chat.restart()  # where the answer broke off, the cache holds tokens that the chat does not know
            print("\n(interrupted: the chat starts again)", file=sys.stderr)
            continue
        print(f"({count} tokens, {count / (time.perf_counter() - begin):.1f} per second)", file=sys.stderr)


if __name__ == "__main__":
    main()
