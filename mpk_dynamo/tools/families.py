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


def _widths(hidden: int, inner: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        **more,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": _widths(2048, 8192, 32, 8, 128256),  # 3.2 1B
    "mistral": _widths(4096, 14336, 32, 8, 32768, head_dim=128),  # 7B v0.3, with the window of v0.1
    "qwen2": _widths(3584, 18944, 28, 4, 152064),  # 7B
    "qwen2.5": _widths(1536, 8960, 12, 2, 151936),  # 1.5B
    "qwen3": _widths(2560, 9728, 32, 8, 151936, head_dim=128),  # 4B
    "gemma2": _widths(2304, 9216, 8, 4, 256000, head_dim=256, query_pre_attn_scalar=256),  # 2B
    "gemma3": _widths(1152, 6912, 4, 1, 262144, head_dim=256, query_pre_attn_scalar=256),  # 1B
    "phi3": _widths(3072, 8192, 32, 32, 32064),  # mini
    "phi4-mini": _widths(3072, 8192, 24, 8, 200064),
    "phi": _widths(2560, 10240, 32, 32, 51200),  # 2
    "stablelm": _widths(2048, 5632, 32, 32, 100352),  # 2 1.6B
    "olmo2": _widths(2048, 8192, 16, 16, 100352),  # 1B
    "smollm3": _widths(2048, 11008, 16, 4, 128256),  # 3B
    "granite": _widths(2048, 8192, 32, 8, 49155),  # 3.1 2B
    "gpt2": {"n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "gpt-neox": _widths(2048, 8192, 16, 16, 50304),  # Pythia 1.4B
    "starcoder2": _widths(3072, 12288, 24, 2, 49152),  # 3B
    "falcon": _widths(4544, 18176, 71, 1, 65024),  # 7B
    "cohere": _widths(8192, 22528, 64, 8, 256000),  # Command R 08-2024
    "opt": _widths(2048, 8192, 32, 32, 50272, ffn_dim=8192, word_embed_proj_dim=2048),  # 1.3B
}
"""By name, widths of one published checkpoint of the family. The number of layers stays the tiny model's."""


_EXPERTS: dict[str, Any] = {**_SIZES, "head_dim": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

PARTIAL: dict[str, dict[str, Any]] = {
    "qwen3-moe": {**_EXPERTS, "model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": []},
    "mixtral": {**_EXPERTS, "model_type": "mixtral", "num_local_experts": 4, "sliding_window": None},
    "deepseek-v3": {**_EXPERTS, "model_type": "deepseek_v3", "head_dim": 16, "num_key_value_heads": 4,
                    "n_routed_experts": 4,
                    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
                    "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
                    "v_head_dim": 16},
    "gpt-oss": {**_EXPERTS, "model_type": "gpt_oss", "num_local_experts": 4, "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}  # fmt: skip
"""The same for families of which a part stays outside the programs: mixtures of experts, latent attention."""


def build(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    published: bool = False,
    device: str | torch.device = "cpu",
    **changes: Any,
) -> "PreTrainedModel":
    """The model of a family, in eval mode on `device`, with random weights that leave no part without effect: tiny,
    or with the published widths. `changes` are of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .models import vary_vectors

    implementation = {"attn_implementation": changes.pop("attn_implementation", None)}
    widths = {**PUBLISHED[name], "initializer_range": 0.02} if published else {}
    config = AutoConfig.for_model(**{**(FAMILIES | PARTIAL)[name], **widths, **changes})
    torch.manual_seed(0)
    kept = {k: v for k, v in implementation.items() if v}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kept).eval()
    vary_vectors(model)
    return model
