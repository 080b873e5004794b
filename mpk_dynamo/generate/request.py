"""What one `generate()` call asks for, in the loop's terms, or why the loop cannot give it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import logits_process, stopping_criteria

from ..errors import OptionError
from ..loop import Sampling
from ..loop.state import MAX_EOS

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the cache among a model's arguments; newer releases first."""


@dataclass(frozen=True)
class Stopping:
    """When to stop. eos: token ids that end a sequence; pads: whether an ended sequence goes on with padding, as
    `generate()` does where some criterion knows of eos ids. host: criteria that the host must check token by token."""

    max_length: int
    eos: tuple[int, ...]
    pads: bool
    host: bool


def sampling_of(processors: "LogitsProcessorList", do_sample: bool, prompt: int) -> Sampling | str:
    """The loop's sampling that does what `processors` do, or the reason why there is none.

    Judged by the processors that `generate()` made, not by its arguments: these are what it would run. prompt: length.
    """
    found: dict[str, Any] = {}
    previous = -1
    for processor in processors:
        kinds = list(_STAGES)
        if type(processor) not in _STAGES:
            return f"{type(processor).__name__} has no place in the loop"
        place, (name, attribute, warper) = kinds.index(type(processor)), _STAGES[type(processor)]
        if place <= previous or (warper and not do_sample):
            return f"{type(processor).__name__} stands where generate() would not put it"
        if getattr(processor, "filter_value", -float("inf")) != -float("inf"):
            return f"{type(processor).__name__} with a filter value"
        previous, value = place, getattr(processor, attribute)
        if name == "min_new_tokens":  # counted from here, whatever it counts from; the longer of two
            value = max(0, found.get(name, 0), value - prompt + getattr(processor, "prompt_length_to_skip", 0))
        found[name] = value
    if len({frozenset(ids) for ids in _barred(processors)}) > 1:
        return "two processors want different ids to come late"
    return Sampling(do_sample=do_sample, **found)


_STAGES: dict[type, tuple[str, str, bool]] = {
    logits_process.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty", False),
    logits_process.MinLengthLogitsProcessor: ("min_new_tokens", "min_length", False),
    logits_process.MinNewTokensLengthLogitsProcessor: ("min_new_tokens", "min_new_tokens", False),
    logits_process.TemperatureLogitsWarper: ("temperature", "temperature", True),
    logits_process.TopKLogitsWarper: ("top_k", "top_k", True),
    logits_process.TopPLogitsWarper: ("top_p", "top_p", True),
    logits_process.MinPLogitsWarper: ("min_p", "min_p", True),
}
"""Processor -> field of Sampling, the processor's attribute, and whether only sampling uses it; in HF's order."""


def penalised_ids(processors: "LogitsProcessorList", input_ids: torch.Tensor, vocabulary: int) -> torch.Tensor | None:
    """The ids [B, T] that a repetition penalty among `processors` looks at; those it skips are `vocabulary`, which no
    token has."""
    for processor in processors:
        if type(processor) is logits_process.RepetitionPenaltyLogitsProcessor:
            skipped = getattr(processor, "prompt_ignore_length", None)
            if isinstance(skipped, torch.Tensor):  # left padding, one length per row
                places = torch.arange(input_ids.shape[1], device=input_ids.device)
                return input_ids.masked_fill(places < skipped.to(input_ids.device)[:, None], vocabulary)
            return input_ids[:, skipped or 0 :]
    return None


def barred_ids(processors: "LogitsProcessorList") -> list[int]:
    """The ids that are not to come among the first tokens."""
    return next(_barred(processors), [])


def _barred(processors: "LogitsProcessorList") -> Iterator[list[int]]:
    late = logits_process.MinLengthLogitsProcessor, logits_process.MinNewTokensLengthLogitsProcessor
    return (p.eos_token_id.tolist() for p in processors if type(p) in late)


def stopping_of(criteria: "StoppingCriteriaList") -> Stopping | str:
    """How `criteria` divide between the device and the host, or why the loop cannot tell how long to run."""
    eos: list[int] = []
    host = False
    for criterion in criteria:
        if type(criterion) is stopping_criteria.EosTokenCriteria:
            eos += criterion.eos_token_id.tolist()
        elif type(criterion) is not stopping_criteria.MaxLengthCriteria:
            host = True
    if criteria.max_length is None:
        return "no maximum length is given"
    if not isinstance(criteria.max_length, int):
        return f"the maximum length is {criteria.max_length!r}"
    if len(eos) > MAX_EOS:
        return f"{len(eos)} end-of-sequence ids are given, {MAX_EOS} are possible"
    return Stopping(criteria.max_length, tuple(eos), any(hasattr(c, "eos_token_id") for c in criteria), host)


def cache_of(model_kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments, or None."""
    return next((model_kwargs[n] for n in CACHE_NAMES if model_kwargs.get(n) is not None), None)


def refusal(
    model: "PreTrainedModel",
    input_ids: torch.Tensor,
    config: "GenerationConfig",
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> str:
    """Why this call is left to HF's own loop, or ""."""
    from transformers.generation.utils import GenerationMixin

    cache = cache_of(model_kwargs)
    asked = [n for n in ("scores", "logits", "attentions", "hidden_states") if getattr(config, f"output_{n}", None)]
    if asked:
        return f"{' and '.join(asked)} of each step are wanted, which the loop does not keep"
    if model.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if synced_gpus:
        return "ranks are kept in step (synced_gpus)"
    if getattr(config, "is_assistant", False):
        return "the model assists another one"
    if input_ids.device != model.device:
        return f"the prompt is on {input_ids.device}, the model on {model.device}"
    if model_kwargs.get("inputs_embeds") is not None:
        return "the prompt is given as embeddings"
    if not isinstance(cache, StaticCache):
        kind = type(cache).__name__ if isinstance(cache, Cache) else "no cache"
        return f"the loop needs a StaticCache, not {kind}"
    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
        return "the cache has layers of another kind than keys and values"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    if not hasattr(model, "_prefill"):
        return "this release of transformers has no separate prefill"
    if type(model)._update_model_kwargs_for_generation is not GenerationMixin._update_model_kwargs_for_generation:
        return f"{type(model).__name__} prepares its steps in its own way"
    return ""


def check_capacity(cache: Any, input_ids: torch.Tensor, config: "GenerationConfig", mask: Any, max_length: int) -> None:
    """Raises OptionError when `cache` cannot hold the tokens of this call: before the first token, as writing past
    the end would show only much later."""
    known = mask.shape[1] if mask is not None else getattr(config, "_mask_length", 0)
    before = max(known, input_ids.shape[1])  # the mask counts tokens that are in the cache already
    needed = before + max_length - input_ids.shape[1] - 1  # the last token is never read
    whole = [layer.max_cache_len for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    if whole and needed > min(whole):
        raise OptionError(
            f"a cache of {min(whole)} tokens is too small: {before} tokens and {max_length - input_ids.shape[1]} new "
            f"ones need {needed}",
            remedy="ask for fewer new tokens, or make a larger cache (max_cache_len)",
        )
