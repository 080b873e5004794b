"""generate() with the backend: the shipped model's answers, and long generations of a random one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, gpu
from small_models import make, token_ids, widened
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

import mpk_dynamo

pytestmark = [*gpu, pytest.mark.usefixtures("fresh_backend")]
MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_model" / "model"
PROMPTS = {
    "Question: What is the capital of France? Answer:": " Paris.",
    "Question: What is 3 plus 4? Answer:": " 7.",
    "List: lamp pear stone hat key drum. Again:": " lamp pear stone hat key drum.",
    "Count from 42 to 50:": " 42, 43, 44, 45, 46, 47, 48, 49, 50.",
    "Story: Mia the fox found a lantern in the forest.": None,
}
STRICT = {"fallback": "error"}
OUTCOME = "kernel" if ON_GPU else "reference"
CAPACITY = 256 if ON_GPU else 96
NEW_TOKENS = 200 if ON_GPU else 24


@pytest.fixture(autouse=True)
def fresh_reports() -> None:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()


@pytest.fixture(scope="module")
def tiny() -> Any:
    """(the shipped model on the tests' device, the same on the CPU, tokenizer)."""
    models = [AutoModelForCausalLM.from_pretrained(MODEL).eval() for _ in range(2)]
    return models[0].to(DEVICE), models[1], AutoTokenizer.from_pretrained(MODEL)


def answer(model: Any, tokenizer: Any, prompt: str, **how: Any) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    limit = CAPACITY - inputs.input_ids.shape[1]
    out = model.generate(**inputs, max_new_tokens=limit, do_sample=False, **how)
    return out[0, inputs.input_ids.shape[1] :].tolist()


def test_the_shipped_model_answers_as_eager_does(tiny: Any) -> None:
    """Its tokens win clearly, so they are equal on every device. One compile serves all prompts."""
    model, on_cpu, tokenizer = tiny
    mpk_dynamo.enable(model, max_cache_len=CAPACITY, **STRICT)
    try:
        ours = {p: answer(model, tokenizer, p) for p in PROMPTS}
        assert [r.outcome for r in mpk_dynamo.reports()] == [OUTCOME]
    finally:
        mpk_dynamo.disable(model)
    for prompt, expected in PROMPTS.items():
        assert ours[prompt] == answer(model, tokenizer, prompt, disable_compile=True), prompt
        assert ours[prompt] == answer(on_cpu, tokenizer, prompt, disable_compile=True), prompt
        if expected is not None:
            assert tokenizer.decode(ours[prompt], skip_special_tokens=True) == expected
    assert len(ours["Story: Mia the fox found a lantern in the forest."]) > 60 or not ON_GPU
    assert len(mpk_dynamo.reports()) == 1, "disabled, but a generation went through the backend"


def logits_of(model: Any, sequence: torch.Tensor, start: int) -> torch.Tensor:
    """Logits [steps, vocabulary] in fp32 for each generated token of one sequence, all at once."""
    with torch.no_grad():
        return model(sequence[None, :-1]).logits[0, start - 1 :].float()


def config() -> CompileConfig:
    made = CompileConfig(backend="mpk", mode=None, fullgraph=True, dynamic=False, options=STRICT)
    made._compile_all_devices = not ON_GPU
    return made


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("qwen3", 4)])
def test_a_long_generation_takes_the_best_tokens(family: str, batch: int) -> None:
    """Each token that was chosen is the best one in fp32, or as good as tied with it: nearer than eager's own error.
    Tokens need not equal eager's, since two runs part for good at the first tie."""
    model = make(family)
    prompt, mask = token_ids(batch, 8), torch.ones(batch, 8, dtype=torch.int64, device=DEVICE)
    if batch > 1:
        mask[1, :3] = 0
        prompt[1, :3] = 0
    how = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": "static"}
    ours = model.generate(prompt, **how, compile_config=config())
    (report,) = mpk_dynamo.reports()
    assert report.outcome == OUTCOME and ours.shape == (batch, 8 + NEW_TOKENS)
    again = model.generate(prompt, **how, compile_config=config())
    assert torch.equal(ours, again), "greedy decoding differs from run to run"
    eager = model.generate(prompt, **how, disable_compile=True)
    assert len(mpk_dynamo.reports()) == 1
    wide = widened(model)
    for row in range(batch):
        if not mask[row].all():
            continue  # its positions are shifted; the others judge
        exact = logits_of(wide, ours[row], 8)
        noise = (logits_of(model, ours[row], 8) - exact).abs().max()
        chosen = exact.gather(1, ours[row, 8:, None])[:, 0]
        gap = exact.max(1).values - chosen
        where = f"token {int(gap.argmax())}: {gap.max():.3f} below the best, eager's error is {noise:.3f}"
        assert gap.max() <= 3 * noise, where
        assert (gap == 0).float().mean() >= 0.9
        parted = (ours[row] != eager[row]).nonzero()
        if len(parted):
            step = int(parted[0]) - 8
            top = exact[step].topk(2).values
            assert top[0] - top[1] <= 3 * noise, f"parted from eager at token {step} although one token is clearly best"


def test_the_padded_row_is_the_unpadded_sequence() -> None:
    """A row padded on the left generates what it generates alone, up to the first near tie."""
    model, steps = make("qwen2"), 12
    prompt, mask = token_ids(2, 8), torch.ones(2, 8, dtype=torch.int64, device=DEVICE)
    prompt[1, :3], mask[1, :3] = 0, 0
    how = {"max_new_tokens": steps, "do_sample": False, "cache_implementation": "static"}
    padded = model.generate(prompt, attention_mask=mask, **how, compile_config=config())[1, 8:]
    alone = model.generate(prompt[1:, 3:], **how, disable_compile=True)[0]
    exact = logits_of(widened(model), alone, 5)
    noise = (logits_of(model, alone, 5) - exact).abs().max()
    top = exact.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 3 * noise
    parted = (padded != alone[5:]).nonzero()
    assert not len(parted) or not clear[int(parted[0])], f"parted at token {int(parted[0])}"
    assert clear[:3].any(), "near ties from the start: choose other weights"


def test_enable_and_disable() -> None:
    model, prompt = make("llama", tied=True), token_ids(1, 5)
    before = model.generation_config.to_dict()
    mpk_dynamo.enable(model, max_cache_len=24, **STRICT)
    ours = model.generate(prompt, max_new_tokens=6, do_sample=False)
    model.generate(token_ids(1, 9), max_new_tokens=6, do_sample=False)
    assert [r.outcome for r in mpk_dynamo.reports()] == [OUTCOME], "another prompt length compiled again"
    mpk_dynamo.disable(model)
    assert model.generation_config.to_dict() == before
    eager = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert ours.shape == eager.shape and len(mpk_dynamo.reports()) == 1
