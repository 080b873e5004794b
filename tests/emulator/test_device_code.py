"""The device code itself, on the host: every sample of every operator, linears at widths of real models, and models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from agreement import assert_equals
from device_forms import REFUSED, SAMPLES
from host_kernel import COMPILER, EmulatedDevice, artifact_for, compile_for_host

from mpk_dynamo import codegen, pipeline
from mpk_dynamo.codegen import geometry
from mpk_dynamo.dump import Dump
from mpk_dynamo.ir.graph import writes
from mpk_dynamo.ir.program import Program
from mpk_dynamo.ir.types import BufferKind
from mpk_dynamo.ops import operator_of
from mpk_dynamo.ops.sampling import sample_tensors
from mpk_dynamo.passes import graph as passes
from mpk_dynamo.reference.memory import allocate, fresh_outputs
from mpk_dynamo.report import Report
from mpk_dynamo.runtime import DeviceCallable, Executable
from mpk_dynamo.targets import known
from mpk_dynamo.verify import verify_program

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ compiles the kernel for the host; there is none")
TARGET = known("h200")
WORKERS = 3
USUAL = ("linear-5-", "linear-24-", "attention-9-", "attention-12-")
"""Samples of the default run: each body, odd sizes, heads of 256 whose warps share keys."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


def executable(program: Program, folder: Path, seed: int = 0) -> Executable:
    verify_program(program, TARGET)
    device = EmulatedDevice(compile_for_host(program, folder), seed)
    return Executable(artifact_for(program), program, TARGET, 0, timeout_ns=60_000_000_000, device=device)


@pytest.mark.parametrize(
    "name",
    [n if n.startswith(USUAL) else pytest.param(n, marks=pytest.mark.slow) for n in SAMPLES if n not in REFUSED],
)
def test_equals_the_oracle(name: str, folder: Path) -> None:
    node, graph = SAMPLES[name]
    with mock.patch.object(passes, "PASSES", ()):
        made = pipeline.lower(graph, WORKERS, TARGET, Report(), Dump("", None, Report()))
    run = executable(codegen.generate(made, TARGET), folder)
    for seed in (11, 12):
        given = sample_tensors(node, graph, seed)
        ours, theirs = ({k: _like(t) for k, t in given.items()} for _ in range(2))
        outputs = {n: b for n, b in made.tasks.buffers.items() if b.kind is BufferKind.OUTPUT}
        fresh = fresh_outputs(outputs, torch.device("cpu"), poison=True)
        memory = {**ours, **{made.tasks.buffers[n].storage: t for n, t in fresh.items()}}
        run.launch([memory[n].data_ptr() for n in run.program.bindings])
        run.check_fault()
        wanted = allocate(graph.buffers, theirs, poison=True)
        operator_of(node).oracle(node, graph.buffers, wanted)
        for written in writes(node):
            buffer = graph.buffers[written]
            if buffer.kind is BufferKind.STATE:
                assert torch.equal(ours[buffer.storage], theirs[buffer.storage]), f"{written} differs"
            else:
                assert_equals(memory[buffer.storage], wanted[written], written)


def _like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)


def emulated(folder: Path, seed: int = 0) -> Callable[..., Any]:
    """A backend whose kernels run on the host."""

    def backend(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        report, dump = Report(), Dump("", None, Report())
        captured = pipeline.capture_graph(gm, inputs, report, dump)
        program = pipeline.emit(pipeline.lower(captured.graph, WORKERS, TARGET, report, dump), TARGET, report, dump)
        run = executable(program, folder, seed)
        return DeviceCallable(run, program.schedule.tasks.graph, captured.arguments, captured.constants)

    return backend


class Gated(torch.nn.Module):
    """A norm, two projections that share their input, a product of both, a projection back and a residual."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(width)
        self.gate, self.up = (torch.nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize(
    ("width", "inner"),
    [
        (2560, 72),
        pytest.param(1024, 3072, marks=pytest.mark.slow),
        pytest.param(72, 12288, marks=pytest.mark.slow),
        pytest.param(4096, 1536, marks=pytest.mark.slow),
        pytest.param(896, 4864, marks=pytest.mark.slow),
        pytest.param(128, 14336, marks=pytest.mark.slow),
        pytest.param(2048, 200, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_one_token_at_real_widths(width: int, inner: int, dtype: torch.dtype, folder: Path) -> None:
    """Rows of a slot, warps of a row, pieces of a row and last blocks that are not full, each as the width has it."""
    check_gated(1, width, inner, dtype, folder)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 8, 11, 16])
@pytest.mark.parametrize(("width", "inner"), [(2048, 200), (1000, 2560), (2560, 72), (200, 5200), (576, 1536)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_tokens_at_real_widths(tokens: int, width: int, inner: int, dtype: torch.dtype, folder: Path) -> None:
    """Norms in the prologue and before it, whole rows and chunks of them, chunks and last tiles that are not full."""
    check_gated(tokens, width, inner, dtype, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "width", "inner"), [(11, 200, 5200), (16, 4096, 200), (9, 3584, 72)])
def test_larger_blocks_of_rows(tokens: int, width: int, inner: int, folder: Path) -> None:
    """As where a Linear has thousands of rows: x comes in pieces, and sums of more tiles are kept."""
    with mock.patch.object(geometry, "LONG_ROWS", 0):
        check_gated(tokens, width, inner, torch.bfloat16, folder)


def check_gated(tokens: int, width: int, inner: int, dtype: torch.dtype, folder: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(width)
    model = Gated(width, inner).to(dtype)
    x = torch.randn(tokens, width, dtype=dtype)
    with torch.no_grad():
        got = torch.compile(model, backend=emulated(folder), dynamic=False)(x)
        eager = model(x)
        wanted = model.double()(x.double())
    size = (wanted - x.double()).norm()
    error, of_eager = ((y.double() - wanted).norm() / size for y in (got, eager))
    assert error < 1.5 * of_eager + 1e-6


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_decode_of_a_model(batch: int, folder: Path) -> None:
    """Steps of a decoder: the kernel is launched again and again, and each step needs what the one before left."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320, "head_dim": 64}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (batch, 8))
    step = torch.compile(model, backend=emulated(folder), dynamic=False, fullgraph=True)
    logits = []
    for call in (model, step):
        cache = StaticCache(config, max_cache_len=64)
        with torch.no_grad():
            model(ids[:, :4], past_key_values=cache, use_cache=True)
            each = []
            for i in range(4, 8):
                positions = torch.full((batch, 1), i)
                mask = (torch.arange(64) <= i).expand(batch, 1, 1, 64)
                out = call(
                    input_ids=ids[:, i : i + 1].contiguous(),
                    position_ids=positions,
                    attention_mask=mask.contiguous(),
                    past_key_values=cache,
                    use_cache=True,
                )
                each.append(out.logits.float())
        logits.append(torch.cat(each, dim=1))
    eager, ours = logits
    assert (ours - eager).norm() < 2e-2 * eager.norm()
