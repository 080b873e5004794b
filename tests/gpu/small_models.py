"""Small random models, and stepping them through a static cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from harness import DEVICE
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, StaticCache

VOCABULARY = 160
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# lengths that the small caches of these tests reach, so that all three kinds of frequencies occur
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "mistral": lambda **kw: MistralConfig(**SIZES, **kw, sliding_window=20),
    "llama": lambda **kw: LlamaConfig(**SIZES, **kw, rope_parameters=dict(LLAMA3_ROPE)),
    "qwen2": lambda **kw: Qwen2Config(**SIZES, **kw),
    "qwen3": lambda **kw: Qwen3Config(**SIZES, **kw, head_dim=32),
}


def make(family: str, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Any:
    """A model in eval mode on the tests' device. Weights are made on the CPU: the same on every machine."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](tie_word_embeddings=tied), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases and norms away from 0 and 1, where an omitted one would not show
                noise = torch.randn_like(parameter) * 0.1
                parameter.copy_(noise if name.endswith("bias") else 1 + noise)
    return model.to(dtype).to(DEVICE)


def widened(model: Any) -> Any:
    """The same model in fp32."""
    return copy.deepcopy(model).float()


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    made = torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE)


def empty_cache(model: Any, batch: int, capacity: int) -> StaticCache:
    """A cache at position 0 whose tensors exist."""
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    with torch.no_grad():
        model(token_ids(batch, 1), past_key_values=cache)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            tensor.zero_()
    return cache


def state(cache: StaticCache) -> list[torch.Tensor]:
    """Every tensor of a cache."""
    return [t for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]


def walk(forward: Callable[..., Any], cache: StaticCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [steps, batch, vocabulary] in fp32, one token [batch, 1] at a time."""
    out = []
    with torch.no_grad():
        for i in range(tokens.shape[1]):
            out.append(forward(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1].float())
    return torch.stack(out)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs| of all elements."""
    a, b = ours.double(), theirs.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
