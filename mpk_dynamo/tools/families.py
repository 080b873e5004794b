"""One small configuration per model family: real structure (what its published checkpoints switch on), tiny sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ONE_HEAD_EACH = {**_SIZES, "num_key_value_heads": 4}  # multi-head attention, nothing shared
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _partial_rope(share: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}


WINDOW = 12
"""Tokens of the sliding windows: decoding from a shorter prompt fills and passes them within a few steps."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "model_type": "llama", "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {**_SIZES, "model_type": "mistral", "head_dim": 32, "sliding_window": WINDOW},
    "qwen2": {**_SIZES, "model_type": "qwen2", "num_attention_heads": 7, "hidden_size": 7 * 32,
              "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2.5": {**_SIZES, "model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {**_SIZES, "model_type": "qwen3", "head_dim": 64},
    "gemma2": {**_SIZES, "model_type": "gemma2", "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": WINDOW,
               "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {**_SIZES, "model_type": "gemma3_text", "head_dim": 64, "query_pre_attn_scalar": 64,
               "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**_ONE_HEAD_EACH, "model_type": "phi3", "sliding_window": None},
    "phi4-mini": {**_SIZES, "model_type": "phi3", "sliding_window": None, "tie_word_embeddings": True,
                  "rope_parameters": _partial_rope(0.75)},
    "phi": {**_ONE_HEAD_EACH, "model_type": "phi", "rope_parameters": _partial_rope(0.5)},
    "stablelm": {**_ONE_HEAD_EACH, "model_type": "stablelm", "rope_parameters": _partial_rope(0.25),
                 "use_qkv_bias": True},
    "olmo2": {**_SIZES, "model_type": "olmo2"},
    "smollm3": {**_SIZES, "model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "granite": {**_SIZES, "model_type": "granite", "embedding_multiplier": 12.0, "attention_multiplier": 0.0156,
                "residual_multiplier": 0.22, "logits_scaling": 8.0, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 256,
             "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "gpt-neox": {**_ONE_HEAD_EACH, "model_type": "gpt_neox", "rope_parameters": _partial_rope(0.25)},
    "starcoder2": {**_SIZES, "model_type": "starcoder2", "sliding_window": None, "use_bias": True},
    "falcon": {**_SIZES, "model_type": "falcon", "new_decoder_architecture": False, "multi_query": True,
               "parallel_attn": True, "bias": False, "alibi": False},
    "cohere": {**_SIZES, "model_type": "cohere", "use_qk_norm": True, "logit_scale": 0.0625},
    "opt": {**_ONE_HEAD_EACH, "model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 128},
}  # fmt: skip
"""By name, what `AutoConfig.for_model` takes."""


def build(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> "PreTrainedModel":
    """The tiny model of a family, in eval mode, with random weights that leave no part without effect."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .models import vary_vectors

    implementation = {"attn_implementation": changes.pop("attn_implementation", None)}
    config = AutoConfig.for_model(**{**FAMILIES[name], **changes})
    torch.manual_seed(0)
    kept = {k: v for k, v in implementation.items() if v}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kept).eval()
    vary_vectors(model)
    return model
