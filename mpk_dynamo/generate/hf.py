"""`generate()`'s decoding loop by launches of many steps: HF's prefill, arguments, criteria, streamer and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OptionError
from ..loop.state import CAPACITY
from ..settings import Settings
from .launches import notice
from .request import cache_of, check_capacity, refusal, sampling_of, stopping_of
from .run import Generation

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer


def sample(
    model: "PreTrainedModel",
    original: Callable[..., Any],
    input_ids: torch.Tensor,
    logits_processor: "LogitsProcessorList",
    stopping_criteria: "StoppingCriteriaList",
    generation_config: "GenerationConfig",
    synced_gpus: bool = False,
    streamer: "BaseStreamer | None" = None,
    **model_kwargs: Any,
) -> Any:
    """What `model._sample` does, with the same arguments and results, by launches of the decode loop.

    `original` is HF's own `_sample`, which runs what the loop cannot; that is said once for each reason. Raises
    OptionError, before the first token, when the cache is too small, and whatever a launch raises.
    """
    compile_config = generation_config.compile_config
    sampling = sampling_of(logits_processor, bool(generation_config.do_sample), input_ids.shape[1])
    stopping = stopping_of(stopping_criteria)
    ours = compile_config is not None and compile_config.backend == "mpk" and not generation_config.disable_compile
    why = refusal(model, input_ids, generation_config, model_kwargs, synced_gpus)
    why = why or next((x for x in (sampling, stopping) if isinstance(x, str)), "")
    if not why and stopping.max_length - input_ids.shape[1] > CAPACITY:
        why = f"more than {CAPACITY} new tokens are asked for"
    if ours and not why and not model._valid_auto_compile_criteria(model_kwargs, generation_config):
        why = "the model cannot be compiled as it is placed or quantised"
    if ours and why:
        notice(f"generate() uses the loop of transformers: {why}")
    if why or not ours:
        extra = {"streamer": streamer} if streamer is not None else {}
        return original(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            **extra,
            **model_kwargs,
        )
    settings = Settings.from_options(compile_config.options)
    check_capacity(
        cache_of(model_kwargs), input_ids, generation_config, model_kwargs.get("attention_mask"), stopping.max_length
    )
    given = (model, input_ids, logits_processor, stopping_criteria, generation_config)
    run = Generation(*given, settings, stopping, streamer)
    run.decode(sampling, model_kwargs)
    return run.result()


def custom_generate(
    model: "PreTrainedModel",
    input_ids: torch.Tensor,
    logits_processor: "LogitsProcessorList",
    stopping_criteria: "StoppingCriteriaList",
    generation_config: "GenerationConfig",
    **model_kwargs: Any,
) -> Any:
    """For `model.generate(..., cache_implementation="static", custom_generate=mpk_dynamo.custom_generate)`: the decode
    loop for one call of a model that is not enabled.

    `generate()` hands no streamer to such a function: for streaming, `mpk_dynamo.enable` the model. Options go in
    `compile_config`. Raises OptionError where generate() would not take the next token by itself, as with beams.
    """
    from transformers.generation.utils import GenerationMixin

    mode = generation_config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise OptionError(
            f"custom_generate takes token by token, and {mode.replace('_', ' ')} is asked for",
            remedy="set num_beams=1 and the like, or leave custom_generate out",
        )
    if generation_config.compile_config is None:
        generation_config.compile_config = compile_config()
    return sample(
        model,
        GenerationMixin._sample,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **model_kwargs,
    )


def compile_config(**options: Any) -> Any:
    """What makes `generate()` compile a decode step with this backend. `options` are those of settings.py."""
    from transformers import CompileConfig

    # dynamic=False would compile anew for each length of a cache that counts its tokens in Python
    made = CompileConfig(backend="mpk", mode=None, options=options or None)
    made._compile_all_devices = True  # CPU tensors run on the reference executor
    return made
