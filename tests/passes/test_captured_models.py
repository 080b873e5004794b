"""Captured decode steps: every pass keeps the results bit for bit and satisfies the verifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import interpreter
import pytest
import torch
import transformers

from mpk_dynamo.capture import capture
from mpk_dynamo.ir.graph import Attention, Graph, Linear
from mpk_dynamo.passes.graph import PASSES
from mpk_dynamo.verify import verify_graph

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "Llama": dict(rope_parameters=LLAMA3),
    "Qwen3": dict(head_dim=32),
    "Granite": dict(residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=3.0),
    "Gemma3": dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=4096),
}
EAGER_CACHE = 16


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def captured(name: str, batch: int, call: str) -> Graph:
    """The unfused graph of one decode step of a tiny model, by a direct call or from generate()."""
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**SIZES, **EXTRA.get(name, {})})
    model_name = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, model_name)(config).to(torch.bfloat16).eval()
    found: list[Graph] = []

    class Grab:
        def __call__(self, gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
            found.append(capture(gm, inputs).graph)
            return gm.forward

        def __deepcopy__(self, memo: object) -> "Grab":
            return self  # CompileConfig copies its backend

    ids = torch.randint(2, 128, (batch, 5))
    with torch.no_grad():
        if call == "generate":
            compile_config = transformers.CompileConfig(backend=Grab())
            compile_config._compile_all_devices = True
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
                cache_implementation="static", compile_config=compile_config,
            )  # fmt: skip
        else:
            cache = transformers.StaticCache(config=config, max_cache_len=EAGER_CACHE)
            model(ids, past_key_values=cache)
            torch.compile(model, backend=Grab())(ids[:, :1], past_key_values=cache)
    return found[0]


def fuse_and_compare(graph: Graph) -> Graph:
    verify_graph(graph)
    inputs = interpreter.random_memory(graph)
    expected, kept = interpreter.run(graph, inputs)
    for graph_pass in PASSES:
        graph = graph_pass(graph)
        verify_graph(graph)
        got, kept_after = interpreter.run(graph, inputs)
        for a, b in [*zip(expected, got, strict=True), *((kept[n], t) for n, t in kept_after.items())]:
            assert torch.equal(a, b), graph_pass.__name__
    return graph


@pytest.mark.parametrize(
    ("name", "batch", "call"),
    [
        ("Qwen3", 1, "generate"),
        ("Llama", 3, "direct"),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in [("Qwen2", 1, "direct"), ("Llama", 3, "generate")]),
    ],
)
def test_supported_models(name: str, batch: int, call: str) -> None:
    graph = fuse_and_compare(captured(name, batch, call))
    layers = 2
    assert sum(isinstance(n, Attention) and n.append is not None for n in graph.nodes) == layers
    assert sum(isinstance(n, Linear) for n in graph.nodes) == 4 * layers + 1
    # embedding, cosine, sine, live keys, a counter per layer
    assert len(graph.nodes) == 5 * layers + 1 + 4 + layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma3", "Phi3", "Olmo2", "GPTNeoX", "Granite", "SmolLM3", "GPT2", "Mistral"])
def test_other_architectures(name: str) -> None:
    graph = fuse_and_compare(captured(name, 1, "direct"))
    assert sum(isinstance(n, Attention) and n.append is not None for n in graph.nodes) >= 2
