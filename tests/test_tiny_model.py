"""The small trained model in examples/tiny_model: it loads, it answers, and its trainer runs."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny_model"


@pytest.fixture(scope="module")
def tiny():
    """The model in evaluation mode on the CPU, and its tokenizer."""
    path = EXAMPLE / "model"
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def greedy(tiny, prompt, max_new_tokens=200):
    """Generated token ids, and the gap between first and second logit at each of them."""
    model, tokenizer = tiny
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, output_logits=True,
                         return_dict_in_generate=True)
    top = torch.stack(out.logits)[:, 0].float().topk(2).values
    return out.sequences[0, inputs.input_ids.shape[1]:].tolist(), (top[:, 0] - top[:, 1]).tolist()


def test_shape_and_size(tiny):
    """bfloat16 weights of a Qwen3 model whose query width differs from its hidden width."""
    model, tokenizer = tiny
    config = model.config
    assert config.model_type == "qwen3" and model.dtype == torch.bfloat16
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.num_attention_heads != config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == config.vocab_size
    assert config.eos_token_id == tokenizer.eos_token_id
    assert (EXAMPLE / "model" / "model.safetensors").stat().st_size < 4e6


@pytest.mark.parametrize("prompt, expected", [
    ("Question: What is the capital of France? Answer:", " Paris."),
    ("Question: What is 3 plus 4? Answer:", " 7."),
    ("List: lamp pear stone hat key drum. Again:", " lamp pear stone hat key drum."),
    ("Count from 42 to 50:", " 42, 43, 44, 45, 46, 47, 48, 49, 50."),
])
def test_answers(tiny, prompt, expected):
    """The expected words, then the end-of-text token."""
    tokens, _ = greedy(tiny, prompt)
    assert tokens[-1] == tiny[1].eos_token_id
    assert tiny[1].decode(tokens[:-1]) == expected


def test_story_is_long_varied_and_decided(tiny):
    """A story ends by itself, does not loop, and every token in it wins clearly."""
    tokens, gaps = greedy(tiny, "Story: Mia the fox found a lantern in the forest.")
    text = tiny[1].decode(tokens, skip_special_tokens=True)
    assert tokens[-1] == tiny[1].eos_token_id
    assert text.endswith("The end.") and "Mia" in text and "badger" in text
    assert len(tokens) > 60 and len(set(tokens)) > 0.4 * len(tokens)
    assert all(tokens[i:i + 3] != tokens[i + 3:i + 6] for i in range(len(tokens) - 5))
    assert min(gaps) > 0.5


def test_trainer_writes_a_loadable_model(tmp_path, monkeypatch):
    """Two steps of the training script end in a folder that from_pretrained accepts."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "2", "--out", str(tmp_path), "--tokens-per-step", "64",
                                      "--threads", str(torch.get_num_threads()), "--eval-documents", "0"])
    runpy.run_path(str(EXAMPLE / "train.py"), run_name="__main__")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Question: What is frozen water called?"
    inputs = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(inputs.input_ids[0]) == text
    assert model(**inputs).logits.shape == (1, inputs.input_ids.shape[1], len(tokenizer))
