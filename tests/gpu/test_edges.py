"""The table of pointwise operators on the device at the edges of every type, against torch on the same device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, gpu
from test_edge_values import FURTHER, OVERFLOWS, REPEATS, assert_all_alike, edges, further, pairs, plain
from test_pointwise import ALL, BINARY, UNARY

import mpk_dynamo

pytestmark = [*gpu, pytest.mark.usefixtures("fresh_backend")]
PARTS = 3


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("operands", [1, 2], ids=["unary", "binary"])
def test_edges(operands: int, dtype: torch.dtype, part: int) -> None:
    """A third of the operators in one program: a program of each would be a compilation of each."""
    torch._dynamo.reset()
    mpk_dynamo.clear_reports()
    table = {name: f for name, (f, dtypes) in (UNARY, BINARY)[operands - 1].items() if dtype in dtypes}
    names = list(table)[part::PARTS]
    if not names:
        pytest.skip("no operator takes this type")
    unary = (edges(dtype).repeat_interleave(REPEATS),)
    inputs = {name: tuple(x.to(DEVICE) for x in (unary if operands == 1 else pairs(name, dtype))) for name in names}

    def model(given: dict[str, tuple[torch.Tensor, ...]]) -> dict[str, Any]:
        return {name: table[name](*xs) for name, xs in given.items()}

    with torch.no_grad():
        ours = torch.compile(model, backend="mpk", fullgraph=True, options={"fallback": "error"})(inputs)
        theirs = model(inputs) | {name: plain(UNARY[name][0], *inputs[name]) for name in OVERFLOWS & inputs.keys()}
    assert [r.outcome for r in mpk_dynamo.reports()] == ["kernel" if ON_GPU else "reference"]
    assert_all_alike(ours, theirs)


def test_further_types() -> None:
    torch._dynamo.reset()
    inputs = {name: x.to(DEVICE) for name, (_, x) in FURTHER.items()}
    ours = torch.compile(further, backend="mpk", fullgraph=True, options={"fallback": "error"})(inputs)
    assert_all_alike(ours, further(inputs))
