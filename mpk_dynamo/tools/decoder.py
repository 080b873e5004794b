"""A model with a filled static cache, stepped the way `generate()` steps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = dict[str, Any]


class Decoder:
    """`batch` sequences of `prompt` random tokens in a StaticCache of `max_cache` tokens, and the keyword arguments
    of the next `steps` forward calls, made by the model's own `prepare_inputs_for_generation` ahead of time: the
    mask [B, 1, 1, max_cache] bool, position ids and token ids [B, 1] int64.
    """

    def __init__(
        self, model: "PreTrainedModel", *, batch: int, prompt: int, max_cache: int, steps: int, seed: int = 0
    ) -> None:
        from transformers import StaticCache

        if prompt + steps > max_cache:
            raise ValueError(f"{prompt} prompt tokens and {steps} steps do not fit a cache of {max_cache}")
        self.model, self.prompt = model, prompt
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.vocab_size
        ids = torch.randint(0, vocabulary, (batch, prompt + steps), generator=generator).to(model.device)
        self.cache_ids = ids[:, :prompt]
        self.cache = StaticCache(config=model.config, max_cache_len=max_cache)
        with torch.no_grad():
            model(ids[:, :prompt], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.steps = [self._inputs(ids[:, : prompt + i + 1], prompt + i) for i in range(steps)]
        self.rewind()

    def _inputs(self, ids: torch.Tensor, position: int) -> Step:
        self.rewind(position)
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=1,
            past_key_values=self.cache,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.full((ids.shape[0], 1), position, dtype=torch.int64, device=ids.device),
            use_cache=True,
        )
        return {**inputs, "return_dict": True}

    def rewind(self, position: int | None = None) -> None:
        """Let the cache hold `position` tokens (default: the prompt). Later entries are overwritten by the steps."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt if position is None else position)

    def logits(self, forward: Callable[..., Any]) -> torch.Tensor:
        """Logits of all steps through `forward`, [steps, B, vocabulary] in fp32 on the host."""
        self.rewind()
        with torch.no_grad():
            return torch.stack([forward(**step).logits[:, -1].float().cpu() for step in self.steps])

    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))


def step_bytes(model: "PreTrainedModel", batch: int, position: int) -> int:
    """Bytes that one decode step must read: every weight once (of the embedding only the rows looked up, unless it
    is the output layer too) and the live keys and values of each sequence. Counted on the model, not on tasks."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    if embedding is not head:
        total -= (embedding.shape[0] - batch) * embedding.shape[1] * embedding.element_size()
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return total + 2 * config.num_hidden_layers * batch * heads * size * (position + 1) * embedding.element_size()
