"""`backend="mpk"` through torch.compile and generate(): right results, one graph, and no silent fallback."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import CompileConfig, LlamaConfig, Qwen2Config, Qwen3Config, StaticCache

import mpk_dynamo
from mpk_dynamo.tools.accuracy import accuracy, reference_logits
from mpk_dynamo.tools.decoder import Decoder

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
STRICT = {"fallback": "error"}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def make(name: str, tied: bool = False) -> Any:
    torch.manual_seed(1)
    config = CONFIGS[name](**SIZES, tie_word_embeddings=tied)
    return Auto.from_config(config, dtype=torch.bfloat16).eval()


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within roundings to bf16: no element far off, and 1 % in the norm."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    a, b = ours.float(), theirs.float()
    assert (a - b).norm() <= 0.01 * b.norm() and (a - b).abs().max() <= 0.02 * b.abs().max()


def assert_same_text(ours: Any, theirs: Any) -> None:
    """Near logits and equal tokens at each step; a row ends where two tokens of a random model are as good as tied."""
    going = list(range(theirs.sequences.shape[0]))
    start = theirs.sequences.shape[1] - len(theirs.logits)
    for i, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert_near(a[going], b[going])
        top = b.float().topk(2).values
        tied = (top[:, 0] - top[:, 1]) <= 0.02 * b.abs().max()
        for row in list(going):
            if ours.sequences[row, start + i] != theirs.sequences[row, start + i]:
                assert tied[row], f"step {i} of row {row}"
                going.remove(row)
    assert i >= 5 and going, "every row ended early: choose other weights"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    yield


@pytest.fixture(scope="module")
def qwen3() -> Any:
    return make("qwen3")


@pytest.mark.parametrize(
    ("name", "tied", "batch"), [("llama", False, 1), ("llama", True, 3), ("qwen2", True, 2), ("qwen3", False, 16)]
)
def test_decode_step_is_as_accurate_as_eager(name: str, tied: bool, batch: int):
    model = make(name, tied)
    shape = {"batch": batch, "prompt": 9, "max_cache": 24, "steps": 6}
    reference, decoder = reference_logits(model, **shape), Decoder(model, **shape)
    eager = accuracy(reference, decoder.logits(model))
    kept = copy.deepcopy(decoder.cache)
    compiled = torch.compile(model, backend="mpk", fullgraph=True, dynamic=False, options=STRICT)
    ours = accuracy(reference, decoder.logits(compiled))
    assert ours.excess(eager) == ""
    for mine, theirs in zip(decoder.cache.layers, kept.layers):
        assert torch.equal(mine.cumulative_length, theirs.cumulative_length)
        assert_near(mine.keys, theirs.keys)
        assert_near(mine.values, theirs.values)
    (report,) = mpk_dynamo.reports()
    assert report.outcome == "reference" and report.calls == shape["steps"] and not report.reason
    assert report.tasks > report.graph_nodes > 0 and report.node_kinds["Attention"] == 2


def test_mask_made_inside_the_graph(qwen3: Any):
    """A direct call without a mask: the graph computes it from the cache's length."""
    compiled = torch.compile(qwen3, backend="mpk", fullgraph=True, options=STRICT)
    tokens = ids(2, 8)
    ours, theirs = (StaticCache(config=qwen3.config, max_cache_len=12) for _ in range(2))
    with torch.no_grad():
        for cache in (ours, theirs):
            qwen3(tokens[:, :5], past_key_values=cache)
        for i in range(5, 8):
            a = compiled(tokens[:, i : i + 1], past_key_values=ours).logits
            b = qwen3(tokens[:, i : i + 1], past_key_values=theirs).logits
            assert_near(a, b)
    assert len(mpk_dynamo.reports()) == 1


def test_generate_through_compile_config_with_padding(qwen3: Any):
    prompt, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    prompt[0, :3], mask[0, :3] = 0, 0
    how = {**GREEDY, "attention_mask": mask, "cache_implementation": "static"}
    eager = qwen3.generate(prompt, **how)
    config = CompileConfig(backend="mpk", mode=None, fullgraph=True, options=STRICT)
    config._compile_all_devices = True
    assert_same_text(qwen3.generate(prompt, **how, compile_config=config), eager)
    (report,) = mpk_dynamo.reports()
    assert report.outcome == "reference" and report.calls == 5


def test_enable_makes_plain_generate_use_it_and_disable_undoes_it():
    model = make("llama", tied=True)
    before = model.generation_config.to_dict()
    prompt = ids(1, 5)
    eager = model.generate(prompt, **GREEDY)
    assert mpk_dynamo.enable(model, max_cache_len=20, **STRICT) is model
    assert_same_text(model.generate(prompt, **GREEDY), eager)
    model.generate(ids(1, 9), **GREEDY)
    assert len(mpk_dynamo.reports()) == 1, "another prompt length must not compile again: max_cache_len is fixed"
    assert mpk_dynamo.reports()[0].calls == 10
    mpk_dynamo.enable(model, workers=3)  # twice: replaces, and one disable still restores the original
    assert model.generation_config.max_cache_len is None
    mpk_dynamo.disable(model)
    assert model.generation_config.to_dict() == before
    calls = [r.calls for r in mpk_dynamo.reports()]
    assert torch.equal(model.generate(prompt, **GREEDY).sequences, eager.sequences)
    assert [r.calls for r in mpk_dynamo.reports()] == calls
    mpk_dynamo.disable(model)  # harmless


@pytest.mark.parametrize("bad", [{"max_cache_len": 0}, {"max_cache_len": "64"}, {"worker": 3}])
def test_enable_refuses_mistakes_at_once(qwen3: Any, bad: dict[str, Any]):
    before = qwen3.generation_config.to_dict()
    with pytest.raises(mpk_dynamo.OptionError):
        mpk_dynamo.enable(qwen3, **bad)
    assert qwen3.generation_config.to_dict() == before


def test_other_sizes_get_their_own_program_and_old_ones_come_back(qwen3: Any):
    """Dynamo turns a size that changed into a symbol; programs are for fixed sizes, and looked up."""
    compiled = torch.compile(qwen3, backend="mpk", options=STRICT)
    counts = []
    with torch.no_grad():
        for batch, length in ((1, 8), (2, 8), (3, 12), (2, 8), (1, 8)):
            tokens = ids(batch, 5, seed=batch)
            ours, theirs = (StaticCache(config=qwen3.config, max_cache_len=length) for _ in range(2))
            for cache in (ours, theirs):
                qwen3(tokens[:, :4], past_key_values=cache)
            a = compiled(tokens[:, 4:], past_key_values=ours).logits
            b = qwen3(tokens[:, 4:], past_key_values=theirs).logits
            assert_near(a, b)
            counts.append(len(mpk_dynamo.reports()))
    # the third graph has both sizes as symbols; the second's program for (2, 8) is made again for it
    assert counts == [1, 2, 3, 4, 4]


def test_changed_and_replaced_weights_are_used():
    model = make("qwen3")
    decoder = Decoder(model, batch=1, prompt=4, max_cache=8, steps=2)
    compiled = torch.compile(model, backend="mpk", fullgraph=True, dynamic=False, options=STRICT)
    before = decoder.logits(compiled)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        assert_near(decoder.logits(compiled), 2 * before)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone() * 2)
        assert_near(decoder.logits(compiled), 4 * before)
    assert len(mpk_dynamo.reports()) == 1


def test_what_cannot_be_captured_falls_back_and_says_why(caplog: pytest.LogCaptureFixture):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(self.inner(x))

    model, x = Model(), torch.eye(4)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "mpk_dynamo"):
        torch.testing.assert_close(torch.compile(model, backend="mpk")(x), model(x))
    (report,) = mpk_dynamo.reports()
    assert report.outcome == "fallback to eager" and "linalg_inv" in report.reason and report.origin
    assert "linalg_inv" in caplog.text
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="linalg_inv"):
        torch.compile(model, backend="mpk", options=STRICT)(x)
    assert mpk_dynamo.reports()[1].outcome == ""


def test_prefill_falls_back_to_what_the_option_says(qwen3: Any, monkeypatch: pytest.MonkeyPatch):
    """Many query tokens are not for this kernel. Inductor is the choice on CUDA, and here when asked for."""
    seen: list[int] = []

    def inductor(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(len(inputs))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", inductor)
    tokens = ids(3, 9)
    with torch.no_grad():
        for options in ({}, {"fallback": "inductor"}):
            torch._dynamo.reset()
            compiled = torch.compile(qwen3, backend="mpk", options=options)
            for _ in range(2):  # the first call of a graph for one length is not worth compiling it
                ours, theirs = (StaticCache(config=qwen3.config, max_cache_len=12) for _ in range(2))
                for cache in (ours, theirs):
                    qwen3(tokens[:, :3], past_key_values=cache)
                assert not seen
                a, b = compiled(tokens[:, 3:], past_key_values=ours), qwen3(tokens[:, 3:], past_key_values=theirs)
                assert_near(a.logits, b.logits)  # under compile PyTorch makes another mask
    assert [r.outcome for r in mpk_dynamo.reports()] == ["fallback to eager", "fallback to inductor"]
    assert all("scaled_dot_product_attention" in r.reason and "layers.0" in r.origin for r in mpk_dynamo.reports())
    assert len(seen) == 1


@pytest.mark.slow
def test_inductor_itself_as_fallback():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Softmax(-1))
    compiled = torch.compile(layer, backend="mpk", options={"fallback": "inductor"})
    torch.testing.assert_close(compiled(torch.ones(1, 4)), layer(torch.ones(1, 4)))
    assert mpk_dynamo.reports()[0].outcome == "fallback to inductor"


def test_training_falls_back_with_advice_and_still_trains(caplog: pytest.LogCaptureFixture):
    layer = torch.nn.Linear(4, 4)
    with caplog.at_level(logging.WARNING, "mpk_dynamo"):
        torch.compile(layer, backend="mpk")(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert "torch.no_grad()" in caplog.text and "gradients" in mpk_dynamo.reports()[0].reason


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"worker": 3}, "did you mean 'workers'"), ({"fallback": "none"}, "valid values"), ({"device": "cuda"}, "on cpu")],
)
def test_option_mistakes_reach_the_user(options: dict[str, Any], wanted: str):
    with torch.no_grad(), pytest.raises(Exception, match=wanted):
        torch.compile(torch.nn.Linear(4, 4), backend="mpk", options=options)(torch.ones(1, 4))


def test_dump_writes_every_stage(tmp_path: Path):
    layer = torch.nn.Linear(32, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.compile(layer, backend="mpk", options={"dump_dir": str(tmp_path)})(
            torch.ones(1, 32, dtype=torch.bfloat16)
        )
    (folder,) = tmp_path.iterdir()
    names = {p.name for p in folder.iterdir()}
    stages = {"0-dynamo.py", "1-captured.txt", "2-graph.txt", "3-tasks.txt", "4-schedule.txt"}
    assert names == {*stages, "README.txt", "report.json", "repro.py"}
    assert all((folder / name).stat().st_size for name in names)


def test_profile_without_a_kernel_warns_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    layer = torch.nn.Linear(16, 16).eval()
    x = torch.randn(1, 16)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "mpk_dynamo"):
        plain = torch.compile(layer, backend="mpk", options=STRICT)(x)
        torch._dynamo.reset()
        profiled = torch.compile(layer, backend="mpk", options={**STRICT, "profile": str(tmp_path), "profile_call": 1})
        assert torch.equal(profiled(x), plain)
    assert "option 'profile' records kernels" in caplog.text and not list(tmp_path.iterdir())
