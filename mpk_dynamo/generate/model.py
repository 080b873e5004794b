"""The class of an enabled model: its own, with the decoding loop replaced."""

from __future__ import annotations

import functools
from typing import Any

from transformers.generation.configuration_utils import GenerationMode

from .hf import sample
from .launches import compiled_step, notice
from .request import cache_of


@functools.cache
def looped(base: type) -> type:
    """A subclass of the model class `base` whose `generate()` uses the decode loop. It passes for `base` where names
    matter (saved configurations), and its instances can be copied and pickled."""

    def _sample(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return sample(self, base._sample, input_ids, *args, **kwargs)

    def get_compiled_call(self: Any, compile_config: Any) -> Any:
        if compile_config is None or compile_config.backend != "mpk":
            return base.get_compiled_call(self, compile_config)
        return compiled_step(self, compile_config)

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # the default that `enable` set must not stand in the way of a cache that is handed in, or of other searches
        if cache_of(model_kwargs) is not None:
            generation_config.cache_implementation = None
        elif generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            notice(f"generate() uses transformers alone for {generation_mode.value.replace('_', ' ')}")
            generation_config.cache_implementation, generation_config.disable_compile = None, True
        prepare = base._prepare_cache_for_generation
        return prepare(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, *rest = base.__reduce_ex__(self, protocol)
        return (_blank, (base,), *rest)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    methods = (_sample, get_compiled_call, _prepare_cache_for_generation, __reduce_ex__)
    return type(base)(base.__name__, (base,), {**names, **{m.__name__: m for m in methods}})


def _blank(base: type) -> Any:
    made = looped(base)
    return made.__new__(made)
