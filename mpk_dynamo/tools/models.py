"""Models to measure and to explain: built-in shapes with random weights (no network), or a local folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": tied,
    }


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": tied,
    }


def _llama3(hidden: int, inner: int, layers: int, factor: float, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": factor},
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32.0, True),
    "llama-3.2-3b": {**_llama3(3072, 8192, 28, 32.0, True), "num_attention_heads": 24},
    "llama-3.1-8b": _llama3(4096, 14336, 32, 8.0, False),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, False),
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2"},  # the defaults of its configuration
}
"""The `config.json` of published models, as far as it shapes the computation."""


def load(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    layers: int = 0,
    seed: int = 0,
) -> "PreTrainedModel":
    """A model in eval mode on `device`: of a built-in shape with random weights, or from a local folder.

    `layers` > 0 keeps only that many (random weights only). With device "meta" nothing is allocated.
    Raises OptionError for a name that is neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES.get(name.lower())
    if shape is None and not Path(name).is_dir():
        near = difflib.get_close_matches(name.lower(), SHAPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"no model {name!r}", remedy=f"{hint}give a local folder or one of {', '.join(SHAPES)}")
    if shape is None and str(device) != "meta":
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=True).eval().to(device)
    if shape is None:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    else:
        config = AutoConfig.for_model(**{**shape, **({"num_hidden_layers": layers} if layers else {})})
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if str(device) != "meta":
        vary_vectors(model)
    return model


def vary_vectors(model: torch.nn.Module) -> None:
    """Biases and norm weights away from 0 and 1, where an omitted one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.randn_like(parameter) * 0.1
                parameter.copy_(noise if name.endswith("bias") else 1 + noise)
