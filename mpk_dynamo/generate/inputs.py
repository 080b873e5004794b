"""What HF prepares for a step: which of it the loop advances, and what the cache counts in Python."""

from __future__ import annotations

from typing import Any

import torch

from .request import cache_of


def fed_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a loop advances among a step's inputs, replaced in `inputs` by copies that are ours to write."""

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: own(v) for k, v in value.items()}
        return value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value

    def tensors(value: Any) -> list[torch.Tensor]:
        return [t for v in value.values() for t in tensors(v)] if isinstance(value, dict) else [value]

    for name in ("input_ids", "position_ids", "attention_mask"):
        if inputs.get(name) is not None:
            inputs[name] = own(inputs[name])
    found = {name: tensors(inputs[name]) if inputs.get(name) is not None else [] for name in _FED.values()}
    return {"tokens": inputs["input_ids"], **{kind: found[name] for kind, name in _FED.items()}}


_FED = {"positions": "position_ids", "masks": "attention_mask"}


def counting_layers(inputs: dict[str, Any]) -> list[Any]:
    """Layers of the cache that count their tokens in Python."""
    return [layer for layer in cache_of(inputs).layers if hasattr(layer, "cumulative_length_int")]


def full_windows(inputs: dict[str, Any]) -> list[Any]:
    """Sliding windows that are full: each step moves their keys and values by one."""
    return [x for x in counting_layers(inputs) if x.cumulative_length_int >= x.max_cache_len]


def room_in_window(inputs: dict[str, Any], masks: list[Any]) -> int | None:
    """How many steps the loop may run: until a sliding window is full, and none while a full one has padding inside,
    which moves from step to step. None where no window sets a limit. masks: see fed_of."""
    full = full_windows(inputs)
    moving = {x.max_cache_len for x in full}
    if any(m.shape[-1] in moving and not bool((m if m.dtype is torch.bool else m == 0).all()) for m in masks):
        return 0
    rooms = [x.max_cache_len - x.cumulative_length_int for x in counting_layers(inputs)]
    return min((room for room in rooms if room > 0), default=None)


def count(inputs: dict[str, Any], steps: int) -> None:
    """Let the layers that count in Python know of `steps` more tokens (fewer where negative)."""
    for layer in counting_layers(inputs):
        layer.cumulative_length_int += steps
