"""Calls of generate() with what no one should hand it, against the same call without the backend; for both devices."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from hypothesis import strategies as st
from loops import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from mpk_dynamo.errors import MpkError

VOCABULARY, CAPACITY = SIZES["vocab_size"], 32
USUAL = {"input_ids": [[5, 6, 7]], "max_new_tokens": 4, "do_sample": False}

SHAPES = ((1, 3), (2, 5), (3, 1), (3,), (1, 0), (0, 3), (1, CAPACITY), (1, CAPACITY + 9), (1, 2, 3), (17, 2), ())
IDS = ("usual", "int32", "float", "bool", "turned", "every second", "expanded", "negative", "too large", "list", "meta",
       "none", "text")  # fmt: skip
MASKS = ("none", "ones", "bool", "float", "padded", "right padded", "zeros", "nan", "shorter", "longer", "turned",
         "ids", "fourfold", "text")  # fmt: skip
NUMBERS: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (1, 2, 5, 0, -1, 2.5, "3", 10**6, CAPACITY, True),
    "temperature": (0.5, 0.0, -1.0, math.nan, math.inf, 1e-30, "hot"),
    "top_k": (1, 7, 0, -3, 10**9, 2.5),
    "top_p": (0.5, 0.0, 1.0, 2.0, -0.5, math.nan),
    "min_p": (0.1, 0.0, 1.0, 2.0, math.nan),
    "repetition_penalty": (1.2, 0.0, -1.0, math.nan, 1e30),
    "min_new_tokens": (2, 0, -1, 10**6),
    "eos_token_id": (3, [3, 4], -5, 10**6, [], 2.5, list(range(64))),
    "pad_token_id": (0, -1, 10**6, VOCABULARY),
    "num_beams": (2, 0),
    "num_return_sequences": (2, 0),
    "return_dict_in_generate": (True,),
    "output_logits": (True,),
    "use_cache": (False,),
    "past_key_values": ("too short", "f64", "used", "no cache"),
    "cache_implementation": ("dynamic", "none such"),
}
WEIGHTS = ("usual", "nan", "inf", "huge", "zero")

extras = st.dictionaries(st.sampled_from(sorted(NUMBERS)), st.integers(0, 20), max_size=2)
cases = st.tuples(
    st.sampled_from(SHAPES[:3]) | st.sampled_from(SHAPES), st.sampled_from(IDS[:1]) | st.sampled_from(IDS),
    st.sampled_from(MASKS), extras, st.booleans(), st.sampled_from(WEIGHTS[:1]) | st.sampled_from(WEIGHTS),
)  # fmt: skip


def model_of(device: torch.device | str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32).eval().to(device)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def ids_of(shape: tuple[int, ...], what: str, device: Any) -> Any:
    x = torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).to(device)
    if what == "turned" and x.dim() == 2:
        return x.t().contiguous().t()
    if what == "every second" and x.dim():
        return x.repeat_interleave(2, -1)[..., ::2]
    if what == "expanded" and x.dim() == 2 and len(x):
        return x[:1].expand(shape)
    if what in ("negative", "too large") and x.numel():
        x.view(-1)[0] = -1 if what == "negative" else VOCABULARY
    simple = {"int32": torch.int32, "float": torch.float32, "bool": torch.bool}
    if what in simple:
        return x.to(simple[what])
    return {"list": x.tolist(), "meta": x.to("meta"), "none": None, "text": "a prompt"}.get(what, x)


def mask_of(ids: torch.Tensor, what: str) -> Any:
    """None: no mask is given."""
    if not isinstance(ids, torch.Tensor) or what == "none":
        return None
    ones = torch.ones(ids.shape, dtype=torch.int64, device=ids.device)
    if what in ("padded", "right padded") and ids.dim() == 2 and ids.shape[1] > 1:
        ones[1::2, 0 if what == "padded" else -1] = 0
    made = {
        "bool": lambda: ones.bool(), "float": lambda: ones.float(), "zeros": lambda: torch.zeros_like(ones),
        "nan": lambda: ones * math.nan, "ids": lambda: ids, "text": lambda: "a mask",
        "shorter": lambda: ones[..., :-1], "longer": lambda: torch.cat([ones, ones], -1),
        "turned": lambda: ones.t().contiguous().t(), "fourfold": lambda: ones[:, None, None],
    }  # fmt: skip
    try:
        return made[what]() if what in made else ones
    except (RuntimeError, IndexError):  # of tensors that have no such form
        return ones


def arguments(case: tuple, model: Any) -> dict[str, Any]:
    shape, ids, mask, extra, sampled, _ = case
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": sampled}
    given |= {name: NUMBERS[name][n % len(NUMBERS[name])] for name, n in extra.items()}
    given["input_ids"] = ids_of(shape, ids, model.device)
    found = mask_of(given["input_ids"], mask)
    if found is not None:
        given["attention_mask"] = found
    if (kind := given.get("past_key_values")) is not None:
        given["past_key_values"] = _cache(kind, shape[0] if shape else 1, model)
    return given


def _cache(kind: str, batch: int, model: Any) -> Any:
    if kind == "no cache":
        return object()
    cache = StaticCache(config=model.config, max_cache_len=3 if kind == "too short" else CAPACITY)
    heads, size = SIZES["num_key_value_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"]
    cache.early_initialization(batch, heads, size, torch.float64 if kind == "f64" else torch.float32, model.device)
    if kind == "used":
        with torch.no_grad():
            model(torch.ones(batch, 2, dtype=torch.int64, device=model.device), past_key_values=cache)
    return cache


def spoil(model: Any, how: str) -> dict[str, torch.Tensor]:
    """What was there before, for load_state_dict."""
    before = copy.deepcopy(model.state_dict())
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight.view(-1)[::5] = {"nan": math.nan, "inf": math.inf, "huge": 1e38, "zero": 0.0}[how]
    return before


def outcome(model: Any, given: dict[str, Any], **more: Any) -> tuple[Any, Exception | None]:
    torch.manual_seed(0)
    try:
        out = model.generate(**given, **more)
    except Exception as error:  # any: what is allowed is asked afterwards
        return None, error
    return out if isinstance(out, torch.Tensor) else out.sequences, None


def check(case: tuple, plain: Any, ours: Any, way: dict[str, Any]) -> str:
    """`plain`: a model. `ours`: one with the same weights that is enabled, or called with `way`. What came of it."""
    models = (plain, ours)
    before = [spoil(m, case[-1]) for m in models] if case[-1] != "usual" else []
    try:
        still: dict[str, Any] = {"disable_compile": True}
        if not {"cache_implementation", "past_key_values"} & set(case[3]):
            still["cache_implementation"] = "static"
        wanted, refused = outcome(plain, arguments(case, plain), **still)
        given = arguments(case, ours)
        found, error = outcome(ours, given, **{k: v for k, v in way.items() if k not in given})
    finally:
        for m, state in zip(models, before):
            m.load_state_dict(state)
    assert_usual(plain, ours, way)
    if error is None and "probability tensor" in str(refused):
        return "drawn"  # ops/draw.py has an answer where logits are no numbers, and torch.multinomial has none
    if refused is not None:
        assert error is not None and str(error), f"without the backend: {refused!r}"
        return "refused by both"
    if error is not None:
        assert isinstance(error, MpkError) and error.message, f"not a clear error: {error!r}"
        return "refused"
    assert found.shape[0] == wanted.shape[0] and found.dtype == wanted.dtype and found.device == wanted.device
    if not case[4]:
        assert torch.equal(found, wanted), (found, wanted)
        return "equal"
    return "drawn"


def assert_usual(plain: Any, ours: Any, way: dict[str, Any]) -> None:
    """Nothing is broken afterwards."""
    made = [
        outcome(m, {**USUAL, "input_ids": torch.tensor(USUAL["input_ids"], device=m.device)}, **w)
        for m, w in ((plain, {"cache_implementation": "static", "disable_compile": True}), (ours, way))
    ]
    assert made[0][1] is None and made[1][1] is None, made
    assert torch.equal(made[0][0], made[1][0])
