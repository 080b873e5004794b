"""The command line, on a machine without a GPU."""

from __future__ import annotations

import ctypes
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpk_dynamo import codegen
from mpk_dynamo.tools.cli import main
from mpk_dynamo.tools.decoder import Decoder, step_bytes
from mpk_dynamo.tools.models import SHAPES, load

TINY = str(Path(__file__).resolve().parents[1] / "examples" / "tiny_model" / "model")

PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
}
"""As the published checkpoints have them."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_number_of_parameters(name: str):
    assert load(name, device="meta").num_parameters() == PARAMETERS[name]


def test_step_bytes_counts_the_embedding_once_when_tied_and_by_rows_when_not():
    tied, untied = load("qwen3-0.6b", device="meta"), load("qwen3-8b", device="meta")
    cache = 2 * 28 * 8 * 128 * 101 * 2
    assert step_bytes(tied, batch=1, position=100) == 2 * PARAMETERS["qwen3-0.6b"] + cache
    rows_left_out = 151936 - 2
    cache = 2 * 36 * 2 * 8 * 128 * 1 * 2
    assert step_bytes(untied, batch=2, position=0) == 2 * (PARAMETERS["qwen3-8b"] - rows_left_out * 4096) + cache


def test_decoder_makes_the_inputs_of_generate():
    """The same position, mask and logits as a run of the whole sequence."""
    model = load(TINY, dtype=torch.float32)
    decoder = Decoder(model, batch=2, prompt=5, max_cache=12, steps=3)
    seen = [int(step["position_ids"][0, 0]) for step in decoder.steps]
    masks = [step["attention_mask"]["full_attention"][0, 0, 0].tolist() for step in decoder.steps]
    assert seen == [5, 6, 7]
    assert masks == [[True] * (p + 1) + [False] * (11 - p) for p in seen]
    stepped = decoder.logits(model)
    assert torch.equal(stepped, decoder.logits(model)), "rewinding the cache must give the same again"
    ids = torch.cat([decoder.cache_ids, *(s["input_ids"] for s in decoder.steps)], dim=1)
    with torch.no_grad():
        whole = model(ids).logits[:, 5:].transpose(0, 1)
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-4)


def test_explain_builds_for_a_target_without_weights_or_gpu(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of the bodies one is compiled by itself, and none: all of them take half a minute when no cache has them."""
    every = codegen.isolated
    few = ("row_map:0", "")
    monkeypatch.setattr(codegen, "isolated", lambda program: {k: p for k, p in every(program).items() if k in few})
    command = ["explain", "--model", "smollm2-135m", "--layers", "1", "--target", "sm_90a", "--prompt", "16"]
    assert main([*command, "--max-cache", "32", "--dump", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    wanted = "captured, Attention, workers, 132, roofline, sm_90a:, row_map:0, registers, no body".split(", ")
    assert [w for w in wanted if w not in text] == []
    dumped = {p.name for p in (tmp_path / "compile-000").iterdir()}
    assert {"0-dynamo.py", "2-graph.txt", "3-tasks.txt", "4-schedule.txt", "5-program.cu", "README.txt"} <= dumped


def test_explain_names_what_is_missing_and_where():
    from mpk_dynamo import explain

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x) + 1

    found = explain(Model(), torch.eye(3))
    assert "linalg_inv_ex" in str(found) or "linalg_inv" in str(found)
    assert "not captured" in str(found) and found.graphs[0].missing


def test_bench_on_cpu_compares_but_claims_no_times(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "figures.json"
    command = ["bench", "--model", TINY, "--device", "cpu", "--against", "--prompt", "16", "--batch", "2"]
    status = main([*command, "--max-cache", "48", "--steps", "24", "--json", str(file)])
    figures = json.loads(file.read_text())
    assert status == 0 and set(figures["results"]) == {"eager", "mpk"}
    assert figures["results"]["mpk"]["times"] is None and figures["results"]["mpk"]["failed"] == ""
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["bench", "--model", TINY, "--device", "cpu", "--against", "inductr"], "inductr"),
        (["bench", "--model", "qwen3-06b", "--device", "cpu"], "did you mean 'qwen3-0.6b'"),
        (["explain", "--model", TINY, "--target", "sm_9a"], "unknown target 'sm_9a'"),
        (["bench", "--e2e", "--model", TINY, "--device", "cpu"], "say nothing"),
        (["generate", "--model", "qwen3-0.6b", "--prompt", "a"], "give a local folder"),
        (["generate", "--model", TINY, "--prompt", "a", "b", "--stream", "--device", "cpu"], "one prompt at a time"),
        (["generate", "--model", TINY, "--prompt", "a", "--temperature", "0", "--device", "cpu"], "greedy decoding"),
        (["generate", "--model", TINY, "--prompt", "a", "--top-p", "1.5", "--device", "cpu"], "top_p is 1.5"),
        (["generate", "--model", TINY, "--prompt", "a", "--top-k", "-1", "--device", "cpu"], "top_k is -1"),
        (["generate", "--model", TINY, "--prompt", "a", "--steps", "-1", "--device", "cpu"], "--steps is -1"),
    ],
)
def test_mistakes_end_with_status_2_and_a_remedy(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--model", "smollm2-135m"]) == 2
    assert "nothing to time" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_answers_and_reports_its_speed(capsys: pytest.CaptureFixture[str]):
    question = "Question: What is the capital of France? Answer:"
    command = ["generate", "--model", TINY, "--device", "cpu", "--max-new-tokens", "6", "--prompt", question]
    for more in ([], ["--stream"], ["--top-k", "1", "--seed", "3"]):
        assert main([*command, *more]) == 0
        printed = capsys.readouterr()
        assert printed.out.strip() == "Paris."
        assert "tokens; first after" in printed.err and "ms per step" in printed.err


@pytest.mark.slow
def test_end_to_end_times_each_alternative(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The measurement itself, without a GPU: what it measures there means nothing."""
    from mpk_dynamo.tools import end_to_end
    from mpk_dynamo.tools.models import load

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model = load(TINY)
    model.generation_config.eos_token_id = None
    arguments = Namespace(batch=1, prompt=8, new=40, repeats=1, sample=False, seconds=0.0)
    before = model.generation_config.to_dict()
    results = {n: end_to_end._one(n, model, arguments, 48, None, end_to_end._Clock()) for n in ("mpk", "eager")}
    said = capsys.readouterr().err
    assert "mpk: compile" in said and "compiled in" in said and "verify" in said and "eager: up to 1 x" in said
    assert {r.new for r in results.values()} == {32}, "no time for all"
    assert all(r.repeats == 1 and r.compile_s > 0 and r.token_ms > 0 and r.first_ms > 0 for r in results.values())
    assert model.generation_config.to_dict() == before
    arguments = Namespace(model=TINY, batch=1, prompt=8, new=40, sample=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    figures = end_to_end._figures(arguments, 48, 0.5, results)
    assert "over kernel us" in end_to_end._table(figures, results) and json.dumps(figures)


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from mpk_dynamo.tools import generate

    def interrupted(arguments: Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupted)
    assert main(["generate", "--model", TINY, "--prompt", "a"]) == 130
    assert "interrupted" in capsys.readouterr().err


class Nvml:
    """The library's functions that are used; each second read is 250 J more."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.reads, self.uuid = status, 0, b""
        self.nvmlErrorString = lambda status: b"Not Supported" if status == 3 else b"Uninitialized"

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, handle: Any) -> int:
        self.uuid, handle._obj.value = uuid.value, 4321
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, energy: Any) -> int:
        assert handle.value == 4321
        self.reads += 1
        energy._obj.value = (1 << 40) + 250_000 * self.reads
        return self.status


def test_energy_is_read_from_the_driver_s_counter(monkeypatch: pytest.MonkeyPatch):
    from mpk_dynamo.tools import end_to_end
    from mpk_dynamo.tools.energy import EnergyMeter

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Namespace(uuid=f"12-{index}"))
    for status, missing in ((0, ""), (3, "NVML: nvmlDeviceGetTotalEnergyConsumption: Not Supported")):
        library = Nvml(status)
        monkeypatch.setattr(ctypes, "CDLL", lambda _, library=library: library)
        meter = EnergyMeter("cuda:1")
        assert meter.missing == missing and library.uuid == b"GPU-12-1"
    library.status = 0
    before = meter.joules()
    assert meter.joules() - before == 250.0
    now = iter(range(0, 1000, 8))  # seconds: a call of generate() takes eight
    monkeypatch.setattr(end_to_end.time, "perf_counter", lambda: next(now))
    joules, watts = end_to_end._energy(meter, lambda new: None, 50)
    assert (joules, watts) == (250.0 / 100, 250.0 / 24)


def test_without_the_driver_s_library_energy_is_missing(monkeypatch: pytest.MonkeyPatch):
    from mpk_dynamo.tools.energy import EnergyMeter

    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "cannot be loaded" in EnergyMeter().missing


def test_options_prints_the_table(capsys: pytest.CaptureFixture[str]):
    assert main(["options"]) == 0
    assert "`fallback`" in capsys.readouterr().out


def test_gate_refuses_wrong_logits_and_nan():
    from mpk_dynamo.tools.accuracy import accuracy

    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(4, 2, 50, generator=generator)
    eager = accuracy(reference, reference + 0.01 * torch.randn(4, 2, 50, generator=generator))
    good = accuracy(reference, reference + 0.01 * torch.randn(4, 2, 50, generator=generator))
    shifted = accuracy(reference, reference.roll(1, -1))
    one_step = reference.clone()
    one_step[2, 1, 7] = float("nan")
    one_token = reference + 0.01 * torch.randn(4, 2, 50, generator=generator)
    one_token[2, 1] = one_token[2, 1].roll(1)
    assert good.excess(eager) == ""
    assert "KL" in shifted.excess(eager)
    assert accuracy(reference, one_step).excess(eager) != ""
    assert "greatest" in accuracy(reference, one_token).excess(eager)
    assert set(SHAPES) >= set(PARAMETERS)


@pytest.mark.slow
def test_explain_shows_edges_beside_those_of_a_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    figures, command = tmp_path / "f.json", ["--model", "smollm2-135m", "--layers", "2", "--prompt", "16"]
    assert main(["profile", "--predict", *command, "--json", str(figures)]) == 0
    assert main(["explain", *command, "--target", "h200", "--profile", str(figures)]) == 2
    assert "its times are predicted" in capsys.readouterr().err
    held = json.loads(figures.read_text())
    held |= {"times": "measured", "makespan_us": 1234.0}
    edge = next(e for e in held["edges"] if e["to"] == "layers.*.mlp.down_proj")
    edge["median_latency_us"] = 7.5
    figures.write_text(json.dumps(held))
    assert main(["explain", *command, "--target", "h200", "--profile", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "ms predicted, 1.234 ms measured" in printed
    line = next(x for x in printed.splitlines() if "to layers.*.mlp.down_proj, flagged, 2 times" in x)
    assert "7.50 us measured" in line and "us predicted" in line


def test_profile_without_a_gpu_predicts_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    trace, figures = tmp_path / "t.json", tmp_path / "f.json"
    command = ["profile", "--predict", "--model", "smollm2-135m", "--layers", "2", "--prompt", "16"]
    assert main([*command, "--target", "h200", "--out", str(trace), "--json", str(figures)]) == 0
    printed = capsys.readouterr()
    assert "PREDICTED for h200" in printed.err and "us predicted" in printed.out
    assert "layers.*.mlp.down_proj" in printed.out and "critical path" in printed.out
    assert json.loads(figures.read_text())["times"] == "predicted"
    names = {e["name"] for e in json.loads(trace.read_text())["traceEvents"]}
    assert {"layers.1.mlp.down_proj[17]", "layers.0.self_attn.q_proj+k_proj+v_proj[3]", "stream"} <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "at least one"),
        (["--model", "no-such-model"], "no model 'no-such-model'"),
        (["--max-cache", "100"], "too small"),
        (["--target", "h2000"], "did you mean 'h200'"),
    ],
)
def test_mistakes_of_profile(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["profile", "--predict", "--model", "smollm2-135m", "--layers", "1", *words]) == 2
    assert message in capsys.readouterr().err
