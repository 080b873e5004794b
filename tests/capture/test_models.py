"""Decode steps of tiny models with static caches: the unfused graph gives eager's logits and cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from mpk_dynamo.ir.graph import is_callers

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip


def tiny(name: str, dtype: torch.dtype, **more: Any) -> Any:
    extra = {"Llama": dict(rope_parameters=LLAMA3), "Qwen3": dict(head_dim=32)}.get(name, {})
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        p.data.mul_(3)  # larger weights than at initialisation, so that a wrong step shows
    return model.to(dtype)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_direct_call(name: str, batch: int, grab: Any) -> None:
    model = tiny(name, torch.float32)
    prompt = torch.randint(2, 128, (batch, 5))
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        twin = copy.deepcopy(cache)
        step = torch.compile(model, backend=grab, fullgraph=True)
        for token in range(3):
            ids = torch.full((batch, 1), 7 + token)
            ours = step(ids, past_key_values=cache).logits
            theirs = model(ids, past_key_values=twin).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(grab.found) == 1
    for a, b in zip(cache.layers, twin.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
        assert a.cumulative_length == b.cumulative_length == 8
    assert a.keys[:, :, 7].abs().sum() > 0


@pytest.mark.parametrize("name", ["Gemma3", "Phi3", "GPTNeoX", "GPT2"])
def test_other_architectures(name: str, grab: Any) -> None:
    """Sandwich norms with 1 + weight; fused projections that are split; partial rotary with biases; Conv1D."""
    if name == "GPT2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=128)
        model = transformers.GPT2LMHeadModel(config).eval()
    elif name == "Gemma3":
        config = transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=32)
        model = transformers.Gemma3ForCausalLM(config).eval()
    else:
        model = tiny(name, torch.float32)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.randint(2, 128, (2, 5)), past_key_values=cache)
        twin, ids = copy.deepcopy(cache), torch.full((2, 1), 9)
        ours = torch.compile(model, backend=grab, fullgraph=True)(ids, past_key_values=cache).logits
        torch.testing.assert_close(ours, model(ids, past_key_values=twin).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_generate(name: str, batch: int, grab: Any) -> None:
    """generate() hands in the mask as an input, with padding for the shorter prompts."""
    model = tiny(name, torch.float32)
    prompt = torch.randint(2, 128, (batch, 5))
    attention = torch.ones_like(prompt)
    attention[0, :2] = 0
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation="static", attention_mask=attention)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    compile_config = transformers.CompileConfig(backend=grab)
    compile_config._compile_all_devices = True
    with torch.no_grad():
        theirs = model.generate(prompt, disable_compile=True, **options)
        ours = model.generate(prompt, compile_config=compile_config, **options)
    assert len(grab.found) == 1
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_bf16_is_as_close_to_f32_as_eager(grab: Any) -> None:
    exact, model = tiny("Qwen3", torch.float32), tiny("Qwen3", torch.bfloat16)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    prompt = torch.randint(2, 128, (3, 5))
    results = []
    with torch.no_grad():
        for m, step in ((exact, exact), (model, model), (model, torch.compile(model, backend=grab, fullgraph=True))):
            cache = transformers.StaticCache(config=m.config, max_cache_len=16)
            m(prompt, past_key_values=cache)
            results.append(step(torch.full((3, 1), 9), past_key_values=cache).logits.float())
    reference, eager, ours = results
    assert ours.sub(reference).norm() <= 1.2 * eager.sub(reference).norm()


def test_what_a_capture_says(grab: Any) -> None:
    model = tiny("Qwen3", torch.bfloat16)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.randint(2, 128, (1, 5)), past_key_values=cache)
        torch.compile(model, backend=grab)(torch.full((1, 1), 9), past_key_values=cache)
    found = grab.found[0]
    graph = found.graph
    kinds = {name: b.kind.value for name, b in graph.buffers.items()}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "param"
    assert kinds["model.rotary_emb.inv_freq"] == "param"
    assert kinds["past_key_values.layers.1.keys"] == kinds["past_key_values.layers.1.keys@1"] == "state"
    assert set(found.arguments) == {b.storage for b in graph.buffers.values() if is_callers(b)}
    assert sum(kind == "input" for kind in kinds.values()) == 1  # token ids
    nodes = {type(n).__name__: [m for m in graph.nodes if type(m) is type(n)] for n in graph.nodes}
    assert len(nodes["Linear"]) == 15 and len(nodes["Attention"]) == 2
    attention = nodes["Attention"][0]
    assert [v.size for v in (attention.b, attention.h, attention.g, attention.s, attention.d)] == [1, 4, 2, 16, 32]
    assert attention.keys == "past_key_values.layers.0.keys@1"
    assert repr(attention.key_index) == repr(attention.value_index) == "(0, g, s, d)"
    assert nodes["Linear"][0].origin == "model.layers.0.self_attn.q_proj"
    assert not any(n.out.startswith(("view", "transpose", "slice")) for n in nodes["RowMap"]), "views cost nothing"
    assert found.nodes_total > len(graph.nodes)
