"""The range of live keys of a mask that is added to the scores."""

from __future__ import annotations

from dataclasses import replace

import graphs
import interpreter
import pytest
import torch

from mpk_dynamo.ir import expr as E
from mpk_dynamo.ir.graph import Attention, Output
from mpk_dynamo.ir.types import BufferKind, DType
from mpk_dynamo.passes.graph.find_live_keys import find_live_keys

KEYS, LOWEST = 13, torch.finfo(torch.float32).min


def ranges(mask: torch.Tensor) -> list[list[int]]:
    """[first, last) per sequence, after checking that results are the same."""
    g = graphs.Builder()
    batch = mask.shape[0]
    q = g.caller("q", (batch, 4, 1, 8), DType.F32, BufferKind.INPUT)
    k, v = (g.caller(x, (batch, 4, KEYS, 8), DType.F32, BufferKind.INPUT) for x in "kv")
    added = g.caller("mask", (batch, 1, 1, KEYS), DType.F32, BufferKind.INPUT)
    out = g.attention(q, k, v, added, 0.5)
    before = g.graph(out)
    after = find_live_keys(before)
    inputs = {**interpreter.random_memory(before), "mask": mask}
    assert torch.equal(interpreter.run(before, inputs)[0][0], interpreter.run(after, inputs)[0][0])
    (node,) = [n for n in after.nodes if isinstance(n, Attention)]
    assert isinstance(node.first, E.Load)
    returned = replace(after, outputs=(*after.outputs, Output(node.first.buffer)))
    return interpreter.run(returned, inputs)[0][1].tolist()


@pytest.mark.parametrize("lowest", [LOWEST, -torch.inf])
def test_added_masks(lowest: float) -> None:
    mask = torch.zeros(3, 1, 1, KEYS)
    mask[0, ..., :4], mask[1, ..., 7:], mask[2, ..., 5] = lowest, lowest, lowest
    assert ranges(mask) == [[4, KEYS], [0, 7], [0, KEYS]]


def test_a_bias_keeps_all_keys_and_so_does_a_mask_of_all_keys() -> None:
    mask = torch.linspace(-1e4, 0, KEYS).expand(2, 1, 1, KEYS).clone()
    mask[1] = LOWEST
    assert ranges(mask) == [[0, KEYS], [0, KEYS]]
