"""Products of computed tensors; attention that is written out with them becomes an Attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capturing import run, same

from mpk_dynamo.ir.graph import Attention, RowMap

B, H, G, S, D = 2, 6, 2, 9, 16
LOWEST = torch.finfo(torch.float32).min


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    b, g, s, d = x.shape
    return x[:, :, None].expand(b, g, times, s, d).reshape(b, g * times, s, d)


def plain(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.3 + mask
    return torch.matmul(torch.softmax(scores, -1), v)


def capped(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(D) / 0.5) * 0.5 + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def filled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = (q @ k.mT / 4).masked_fill(mask < -1, LOWEST)
    return torch.nn.functional.softmax(scores.float(), dim=-1).type_as(v) @ v


def chosen(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return torch.where(mask >= -1, 0.3 * (q @ k.mT), -math.inf).softmax(-1) @ v


def unmasked(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return ((q * 0.3) @ k.mT).softmax(-1) @ v


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=generator) for s in ((B, H, 1, D), (B, G, S, D), (B, G, S, D)))
    mask = torch.zeros(B, 1, 1, S)
    mask[0, ..., :2], mask[1, ..., 6:] = LOWEST, LOWEST
    return tuple(t.to(dtype) for t in (q, k, v)) + (mask.clamp(min=torch.finfo(dtype).min).to(dtype),)


@pytest.mark.parametrize(
    ("function", "cap"), [(plain, None), (capped, 0.5), (filled, None), (chosen, None), (unmasked, None)]
)
def test_written_out_attention(function: Callable[..., Any], cap: float | None) -> None:
    def grouped(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return function(q, repeat_kv(k, H // G), repeat_kv(v, H // G), mask)

    ours, theirs, found, *_ = run(grouped, *tensors())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (node,) = [n for n in found.graph.nodes if isinstance(n, Attention)]
    assert node.g.size == G and (node.softcap is None or math.isclose(node.softcap, cap or 0))
    assert (node.softcap is None) == (cap is None)
    assert (node.mask is None) == (function is unmasked)
    assert not any(n.name.startswith(("matmul", "softmax")) for n in found.graph.nodes if isinstance(n, RowMap))


def test_it_is_as_close_to_f32_as_eager_is() -> None:
    narrow = tensors(torch.bfloat16)
    wide = tuple(t.float() for t in narrow)
    ours, theirs, found, *_ = run(capped, *(repeat_kv(t, 3) if t.shape[1] == G else t for t in narrow))
    exact = capped(*(repeat_kv(t, 3) if t.shape[1] == G else t for t in wide))
    assert any(isinstance(n, Attention) for n in found.graph.nodes)
    assert (ours.float() - exact).norm() <= 1.1 * (theirs.float() - exact).norm()


def test_what_else_reads_the_weights_still_gets_them() -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    q, k, v, _ = tensors()
    ours, theirs, found, *_ = run(function, q[:, :G], k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert any(isinstance(n, Attention) for n in found.graph.nodes)


@pytest.mark.parametrize("what", ["keys written between", "another dimension", "two products added", "scores squared"])
def test_what_is_no_attention_runs_as_it_stands(what: str) -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        scores = q @ k.mT
        if what == "keys written between":
            k.zero_()
        if what == "two products added":
            scores = scores + q @ v.mT
        if what == "scores squared":
            scores = scores * scores
        return scores.softmax(1 if what == "another dimension" else -1) @ v

    q, k, v, _ = tensors()
    ours, theirs, found, *_ = run(function, q[:, :G], k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(n, Attention) for n in found.graph.nodes)


def test_small_products() -> None:
    x, y = torch.randn(3, 1, 4, 5), torch.randn(2, 5, 7)
    same(lambda a, b: (a + 1) @ (b * 2), x.round(), y.round())
    same(lambda a, b: torch.bmm(a.abs(), b.neg()), y.round(), y.mT.round().contiguous())
