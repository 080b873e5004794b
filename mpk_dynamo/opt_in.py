"""Make plain `model.generate(...)` of a HuggingFace model use the backend, and undo it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import OptionError
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAVED = "_mpk_dynamo_saved"


def enable(model: "PreTrainedModel", *, max_cache_len: int | None = None, **options: Any) -> "PreTrainedModel":
    """Change `model.generation_config` so that `generate()` decodes with the backend; returns `model`.

    A static cache becomes the default and each decode step one kernel launch. Prefill stays as it is (eager), as
    `generate()` compiles the decode step alone. `max_cache_len`, in tokens, fixes the size of the cache: without
    it, a call that needs a longer cache than those before compiles again. Each batch size has a program of its own,
    made when it first comes. `options` are those of settings.py.
    Calling it again replaces what the last call set. For direct calls of the model use
    `model.compile(backend="mpk")` instead.

    Raises OptionError for a bad option, or for a model without `generate`.
    """
    from transformers import CompileConfig

    Settings.from_options(options)  # a mistake shows here, not in the first decode step
    config = getattr(model, "generation_config", None)
    if config is None:
        raise OptionError(f"{type(model).__name__} has no generation_config", remedy="give a model that can generate()")
    if max_cache_len is not None and not (type(max_cache_len) is int and max_cache_len > 0):
        raise OptionError(f"max_cache_len is {max_cache_len!r}", remedy="give a positive number of tokens")
    disable(model)
    compile_config = CompileConfig(backend="mpk", mode=None, options=options or None)
    compile_config._compile_all_devices = True  # CPU tensors run on the reference executor
    changes: dict[str, Any] = {"cache_implementation": "static", "compile_config": compile_config}
    if max_cache_len is not None:
        changes["max_cache_len"] = max_cache_len
    setattr(model, _SAVED, {name: getattr(config, name, None) for name in changes})
    for name, value in changes.items():
        setattr(config, name, value)
    return model


def disable(model: "PreTrainedModel") -> "PreTrainedModel":
    """Undo `enable`: restores what it changed and drops the compiled call. Does nothing to other models."""
    saved = model.__dict__.pop(_SAVED, None)
    if saved is None:
        return model
    for name, value in saved.items():
        setattr(model.generation_config, name, value)
    # generate() keeps the compiled call and the largest cache length on the model
    for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
        model.__dict__.pop(name, None)
    return model
