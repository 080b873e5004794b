"""Modules other than a whole decoder through the backend: parts of a model, encoders, several at once, plain functions.

Each case runs on the reference executor, and on a GPU by the kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import mpk_dynamo
from mpk_dynamo.tools.families import build

STRICT = {"fallback": "error"}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative difference to eager that roundings in another order leave, after a few layers."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    yield request.param
    torch._dynamo.reset()


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape and ours.device == theirs.device
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert error <= ROUNDING[ours.dtype], f"relative error {error:.2e}"


def programs(device: str) -> int:
    """How many graphs became programs; every one must have."""
    found = mpk_dynamo.reports()
    wanted = "kernel" if device == "cuda" else "reference"
    assert found and all(r.outcome == wanted for r in found), [r.summary() for r in found]
    return len(found)


def mlp(dtype: torch.dtype = torch.float32, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.SiLU()
    ).to(dtype)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_sequential(device: str, dtype: torch.dtype) -> None:
    module = mlp(dtype).to(device)
    compiled = torch.compile(module, backend="mpk", options=STRICT)
    with torch.no_grad():
        for rows in (1, 3, 16):
            x = torch.randn(rows, 64, device=device, dtype=dtype)
            assert_near(compiled(x), module(x))
    assert programs(device) >= 2


def test_fp32_is_not_rounded_to_tf32(device: str) -> None:
    module = nn.Linear(512, 64, bias=False).to(device)
    x = torch.randn(4, 512, device=device)
    with torch.no_grad():
        ours = torch.compile(module, backend="mpk", options=STRICT)(x).double()
    exact = x.double() @ module.weight.double().T
    assert (ours - exact).norm() <= 1e-6 * exact.norm()  # tf32 would leave 3e-4
    programs(device)


def test_one_mlp_of_a_model(device: str) -> None:
    model = build("llama", device=device)
    plain = copy.deepcopy(model)
    model.model.layers[1].mlp.compile(backend="mpk", options=STRICT)
    ids = torch.randint(3, 200, (1, 5), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        assert_near(model(ids).logits, plain(ids).logits)
        assert_near(model(ids[:, :1]).logits, plain(ids[:, :1]).logits)
    assert programs(device) >= 1


def test_several_compiled_modules_in_one_model(device: str) -> None:
    model = build("qwen3", device=device)
    plain = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.compile(backend="mpk", options=STRICT)
    model.lm_head = torch.compile(model.lm_head, backend="mpk", options=STRICT)
    ids = torch.randint(3, 200, (2, 3), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        assert_near(model(ids).logits, plain(ids).logits)
    assert programs(device) >= 2


def test_several_models_in_one_process(device: str) -> None:
    models = [build("llama", device=device), build("gpt2", device=device), mlp().to(device)]
    token = torch.full((1, 1), 7, device=device)
    inputs = [token, token, torch.ones(1, 64, device=device)]
    compiled = [torch.compile(m, backend="mpk", options=STRICT) for m in models]
    with torch.no_grad():
        for _ in range(2):
            for model, ours, x in zip(models, compiled, inputs, strict=True):
                a, b = ours(x), model(x)
                assert_near(getattr(a, "logits", a), getattr(b, "logits", b))
    assert programs(device) == 3


def test_decoder_layer_alone(device: str) -> None:
    """Attention over keys that the program itself computes: one token, and several."""
    model = build("llama", device=device)
    layer = model.model.layers[0]
    compiled = torch.compile(layer, backend="mpk", options=STRICT)
    with torch.no_grad():
        for tokens in (1, 6):
            x = torch.randn(1, tokens, 128, dtype=torch.bfloat16, device=device)
            rotary = model.model.rotary_emb(x, torch.arange(tokens, device=device)[None])
            assert_near(compiled(x, position_embeddings=rotary), layer(x, position_embeddings=rotary))
    programs(device)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_encoder(device: str, implementation: str, dtype: torch.dtype) -> None:
    """Bidirectional attention without a cache, up to sixteen rows, with padding and without."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=100, attn_implementation=implementation)
    model = transformers.BertModel(config).eval().to(device, dtype)
    compiled = torch.compile(model, backend="mpk", options=STRICT)
    ids = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        for given in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}):
            assert_near(compiled(**given).last_hidden_state, model(**given).last_hidden_state)
    programs(device)


@pytest.mark.parametrize("masks", ["none", "source", "padding", "both"])
@pytest.mark.parametrize(("norm_first", "activation"), [(True, "gelu"), (False, "relu")])
def test_encoder_of_pytorch(device: str, masks: str, norm_first: bool, activation: str) -> None:
    """torch.nn's own, which hands a whole layer to one operator. Judged by the CPU's: CUDA's takes GELU by its tanh
    form whatever the module asks for, 4e-5 off."""
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first, activation=activation)
    module.to(device).eval()
    x, given = torch.randn(2, 7, 64, device=device), {}
    if masks in ("source", "both"):
        given["src_mask"] = torch.ones(7, 7, dtype=torch.bool, device=device).triu(1)
    if masks in ("padding", "both"):
        given["src_key_padding_mask"] = torch.arange(7, device=device) >= torch.tensor([[7], [5]], device=device)
    compiled = torch.compile(module, backend="mpk", options=STRICT)
    reference = copy.deepcopy(module).cpu()
    with torch.no_grad():
        expected = reference(x.cpu(), **{name: mask.cpu() for name, mask in given.items()})
        assert_near(compiled(x, **given), expected.to(device))
    assert programs(device) == 1


def test_a_few_tokens_into_a_static_cache(device: str) -> None:
    """A short prompt, or the check of drafted tokens: a causal mask among the new tokens, and rows of the cache."""
    model = build("llama", torch.float32, device=device)
    compiled = torch.compile(model, backend="mpk", options=STRICT)
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    ours, theirs = (transformers.StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    with torch.no_grad():
        for cache in (ours, theirs):
            model(ids[:, :4], past_key_values=cache)
        assert_near(compiled(ids[:, 4:], past_key_values=ours).logits, model(ids[:, 4:], past_key_values=theirs).logits)
        for mine, other in zip(ours.layers, theirs.layers):
            assert_near(mine.keys, other.keys)
            assert_near(mine.values, other.values)
    programs(device)


def both(function: Callable[..., Any], *args: torch.Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...], Any, Any]:
    """Results of the compiled function and of the plain one, and the arguments of either afterwards."""
    mine, theirs = ([a.clone() for a in args] for _ in range(2))
    compiled = torch.compile(function, backend="mpk", options=STRICT, fullgraph=True)
    with torch.no_grad():
        return compiled(*mine), function(*theirs), mine, theirs


def places(results: tuple[torch.Tensor, ...], args: list[torch.Tensor]) -> list[list[Any]]:
    """For each pair of results and arguments that share memory, how far apart they start; for each, its strides."""
    everything = [*results, *args]
    out = []
    for a in everything:
        for b in everything:
            same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
            out.append([a is b, same and a.data_ptr() - b.data_ptr(), a.shape])
    return out


def updated_and_viewed(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y.add_(x)
    return y, y.view(-1), x[1:], x, x.t(), y[:, 1]


def views_of_a_result(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    made = x * 2
    return made, made.view(-1), made[1], made.t(), made[::2, 1:]


def view_without_its_base(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    made = F.silu(x)
    return made[1], made[2:] + 1


def written_through_a_view(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    row = x[1]
    row.mul_(3)
    return row, x.sum(), x.view(-1)[2:4]


def nothing_but_a_view(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.view(2, 8), x[1:]


@pytest.mark.parametrize(
    "function",
    [
        nothing_but_a_view,
        updated_and_viewed,
        views_of_a_result,
        view_without_its_base,
        written_through_a_view,
    ],
)
def test_results_alias_what_they_do_in_eager(device: str, function: Callable[..., Any]) -> None:
    count = function.__code__.co_argcount
    args = [torch.randn(4, 4, generator=torch.Generator().manual_seed(k)).to(device) for k in range(count)]
    ours, theirs, mine, other = both(function, *args)
    for a, b in zip([*ours, *mine], [*theirs, *other], strict=True):
        torch.testing.assert_close(a, b)
    assert places(ours, mine) == places(theirs, other)
    programs(device)
