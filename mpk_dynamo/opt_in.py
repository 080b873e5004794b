"""Make plain `model.generate(...)` of a HuggingFace model use the backend, and undo it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import OptionError
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAVED = "_mpk_dynamo_saved"


def enable(model: "PreTrainedModel", *, max_cache_len: int | None = None, **options: Any) -> "PreTrainedModel":
    """Make `model.generate()` decode with the backend; returns `model`.

    A static cache becomes the default, and many decode steps one kernel launch: the next token is chosen in the
    kernel. What the loop cannot do goes through HF's own, with one launch per step, and is said once. Prefill stays as
    it is (eager). `max_cache_len`, in tokens, fixes the size of the cache: without it, a call that needs a longer
    cache than those before compiles again. Each batch size has a program of its own, made when it first comes.
    `options` are those of settings.py. Calling it again replaces what the last call set. For direct calls of the model
    use `model.compile(backend="mpk")` instead.

    Raises OptionError for a bad option, or for a model without `generate`.
    """
    from .generate.hf import compile_config
    from .generate.model import looped

    Settings.from_options(options)  # a mistake shows here, not in the first decode step
    config = getattr(model, "generation_config", None)
    if config is None:
        raise OptionError(f"{type(model).__name__} has no generation_config", remedy="give a model that can generate()")
    if max_cache_len is not None and not (type(max_cache_len) is int and max_cache_len > 0):
        raise OptionError(f"max_cache_len is {max_cache_len!r}", remedy="give a positive number of tokens")
    disable(model)
    changes: dict[str, Any] = {"cache_implementation": "static", "compile_config": compile_config(**options)}
    if max_cache_len is not None:
        changes["max_cache_len"] = max_cache_len
    setattr(model, _SAVED, {name: getattr(config, name, None) for name in changes})
    for name, value in changes.items():
        setattr(config, name, value)
    model.__class__ = looped(type(model))
    return model


def disable(model: "PreTrainedModel") -> "PreTrainedModel":
    """Undo `enable`: restores what it changed and drops the compiled call. Does nothing to other models."""
    saved = getattr(model, _SAVED, None)
    if saved is None:
        return model
    delattr(model, _SAVED)
    for name, value in saved.items():
        setattr(model.generation_config, name, value)
    from .generate.launches import forget_compiled

    model.__class__ = type(model).__mro__[1]
    forget_compiled(model)
    # generate() keeps the compiled call and the largest cache length on the model
    for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
        model.__dict__.pop(name, None)
    return model
