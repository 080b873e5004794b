"""Whether tokens are drawn as often as torch's probabilities say: what the tests of both devices share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mpk_dynamo.ir.graph import Graph, Node
from mpk_dynamo.ir.types import DType
from mpk_dynamo.ops.choice import Choice
from mpk_dynamo.ops.sampling import Sample

ROWS, VOCABULARY, LAUNCHES = 256, 300, 10
TOP_K, TOP_P, MIN_P = 20, 0.9, 0.02


def choice(rows: int, vocabulary: int, dtype: DType, *stages: str) -> tuple[Node, Graph]:
    s = Sample()
    x, numbers = s.input("x", dtype, rows, vocabulary), s.input("numbers", DType.F64, 5)
    key, step = s.input("key", DType.I64, 1), s.input("step", DType.I64)
    sequence, out = s.input("sequences", DType.I64, rows), s.output("out", DType.I64, rows)
    return s.graph(Choice("choice", x, numbers, key, step, sequence, out, **dict.fromkeys(stages, True)))


def check_frequencies(
    run: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]], stages: tuple[str, ...], device: str
) -> None:
    """`run` executes `choice(ROWS, VOCABULARY, F32, *stages)`, all rows of which get the same scores. The draws are of
    one key, so the test is the same each time."""
    scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(7))
    warpers = {"top_k": TopKLogitsWarper(TOP_K), "top_p": TopPLogitsWarper(TOP_P), "min_p": MinPLogitsWarper(MIN_P)}
    kept = scores
    for stage in stages:
        kept = warpers[stage](None, kept)
    want = kept.softmax(-1)[0] * (ROWS * LAUNCHES)
    tensors = {
        "x": scores.expand(ROWS, VOCABULARY).contiguous(),
        "numbers": torch.tensor([1.0, TOP_K, TOP_P, MIN_P, 1.0], dtype=torch.float64),
        "key": torch.tensor([99]),
        "sequences": torch.arange(ROWS) * 3,
    }
    tensors = {name: t.to(device) for name, t in tensors.items()}
    found = torch.zeros(VOCABULARY)
    for step in range(LAUNCHES):
        drawn = run({**tensors, "step": torch.tensor(step, device=device)})["out"].cpu()
        found += torch.bincount(drawn, minlength=VOCABULARY)
    check_counts(found, want)


def check_counts(found: torch.Tensor, want: torch.Tensor) -> None:
    """Chi-square of how often each token was drawn, and how often it should have been; rare ones count as one."""
    assert found[want == 0].sum() == 0
    often = want >= 5
    pairs = [(f, w) for f, w in zip(found[often].tolist(), want[often].tolist(), strict=True)]
    if (rare := want[~often].sum().item()) > 0:
        pairs.append((found[~often].sum().item(), rare))
    chi2, freedom = sum((f - w) ** 2 / w for f, w in pairs), len(pairs) - 1
    # the Wilson-Hilferty approximation of the 0.999 quantile
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < bound, (chi2, bound)
