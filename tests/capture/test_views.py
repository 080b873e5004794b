"""Rearrangements, gathers, reductions and products against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import Grab, same

from mpk_dynamo.capture.values import points
from mpk_dynamo.capture.views import regroup
from mpk_dynamo.ir.expr import Const, Op, Var

X = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()

VIEWS: dict[str, Any] = {
    "view": lambda x: (x.view(6, 24), x.view(2, 12, 6), x.view(-1), x.view(2, 3, 2, 2, 3, 2), x.view(3, 2, 24)),
    "reshape, transposed": lambda x: (x.transpose(1, 2).reshape(2, 72), x.permute(3, 0, 2, 1).reshape(4, 36)),
    "squeeze, unsqueeze": lambda x: (x[:, :1].squeeze(1), x[:1, :1].squeeze(), x.unsqueeze(2), x[None, :, None]),
    "transpose, permute, t": lambda x: (x.transpose(-1, 0), x.permute(2, 0, 3, 1), x[0, 0].t(), x.mT, x.swapaxes(1, 2)),
    "movedim": lambda x: (x.movedim(0, -1), torch.movedim(x, (0, 1), (2, 0))),
    "expand": lambda x: (x[:, :1].expand(2, 5, 4, 6), x[0, 0].expand(3, -1, -1), x[0, 0].expand_as(x)),
    "slice": lambda x: (x[:, 1:], x[..., ::2], x[..., 1::3], x[:, -2:], x[1:, :2, 1:3, 5:], x.narrow(1, 1, 2)),
    "select": lambda x: (x[1], x[:, -1], x[0, 1, 2, 3], x.select(2, 1)),
    "split": lambda x: (*x.split(2, dim=1), *x.chunk(4, -1), *x.split([1, 3, 2], -1), *x.unbind(1), *x.tensor_split(2)),
    "flatten": lambda x: (x.flatten(1), x.flatten(0, 1), x.flatten(), x.unflatten(3, (2, 3)), x.unflatten(-1, (-1, 2))),
    "cat": lambda x: (torch.cat([x, x * 2, x[:, :1]], 1), torch.cat([x[..., 3:], -x[..., :3]], -1)),
    "stack": lambda x: (torch.stack([x, x], 2), torch.stack([x[0], x[1] * 2], -1)),
    "cat of one": lambda x: (torch.cat([x]), torch.cat([torch.empty(0), x], 0)),
    "roll, flip": lambda x: (x.roll(1, 1), x.roll((-1, 2), (0, 3)), x.roll(5), x.flip(-1), x.flip((0, 2))),
    "repeat": lambda x: (x.repeat(1, 2, 1, 3), x[0].repeat(2, 1, 1, 1), x.repeat_interleave(3, dim=1), x.tile(2)),
    "repeat_kv": lambda x: x[:, :, None].expand(2, 3, 2, 4, 6).reshape(2, 6, 4, 6),
    "diagonal": lambda x: (x.diagonal(0, 2, 3), x.diagonal(1, 1, 2), x.diagonal(-1, 2, 3)),
    "pad": lambda x: (F.pad(x, (1, 2)), F.pad(x, (0, 1, 2, 0), value=3.0), F.pad(x, (-1, -1))),
    "interleaved rotary": lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2),
    "rotary halves": lambda x: torch.cat((-x[..., 3:], x[..., :3]), dim=-1),
    "indexing": lambda x: (x[:, None, 1:2, ..., 0], x[..., None]),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[:1, :1]),
}
REDUCTIONS: dict[str, Any] = {
    "sum": lambda x: (x.sum(-1), x.sum((1, 3), keepdim=True), x.sum(), x.sum(0, dtype=torch.float64), (x > 3).sum(1)),
    "mean": lambda x: (x.mean(-1, keepdim=True), x.mean((0, 2)), x.mean()),
    "extremes": lambda x: (x.amax(-1), x.amin((0, 1)), x.max(), x.min(), x.max(1).values, x.min(-1, keepdim=True)[0]),
    "truth": lambda x: ((x > 30).any(-1), (x > 30).all(1, keepdim=True), (x > 3).any(), (x < 0).all()),
    "softmax": lambda x: (x.softmax(-1), x.softmax(1), F.log_softmax(x, 2), F.softmax(x, -1, dtype=torch.float32)),
    "logsumexp": lambda x: (x.logsumexp(-1), x.logsumexp((1, 2), keepdim=True)),
    "variance": lambda x: (x.var(-1), x.std(1, correction=0), x.var((0, 2), unbiased=False, keepdim=True), x.var()),
    "layer_norm": lambda x: (F.layer_norm(x, (6,), x[0, 0, 0], x[0, 0, 1]), F.layer_norm(x, (4, 6), eps=1e-3)),
    "rms_norm": lambda x: (F.rms_norm(x, (6,), x[0, 0, 0]), F.rms_norm(x, (4, 6), eps=1e-3)),
    "cumsum": lambda x: (x.cumsum(-1), x.cumsum(1), (x > 9).long().cumsum(-1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_rearrangement(name: str) -> None:
    function = VIEWS[name]
    # + 0.5: the elements are read through the view, and returned as a new tensor
    same(lambda x: [y + 0.5 for y in (lambda r: r if isinstance(r, (tuple, list)) else [r])(function(x))], X)
    torch._dynamo.reset()
    strided = X if name == "view" else X.transpose(0, 1).contiguous().transpose(0, 1)
    same(lambda x: function(x * 2), strided)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_reduction(name: str, dtype: torch.dtype) -> None:
    same(REDUCTIONS[name], (torch.sin(X) * 3 + X / 40).to(dtype), ulps=2 if dtype is torch.bfloat16 else 40)


def test_a_reshape_mixes_only_dimensions_that_it_must() -> None:
    index = regroup((2, 3, 4, 6), (6, 1, 4, 2, 3), points((6, 1, 4, 2, 3)))
    assert [repr(e) for e in index] == ["floordiv(i0, 3)", "mod(i0, 3)", "i2", "add(mul(i3, 3), i4)"]
    assert all(isinstance(e, (Var, Op, Const)) for e in index)


def test_gathers() -> None:
    table, ids = torch.randn(9, 5), torch.tensor([[1, 8, 0], [4, 4, 2]])
    same(lambda w, i: (F.embedding(i, w), w[i], w.index_select(0, i[0]), w.index_select(1, i[1])), table, ids)
    torch._dynamo.reset()
    same(lambda w, i: (w[:, i[0] % 5], w[i[0], i[1]], w[i[0] - 5], w[i.int()]), table, ids)
    torch._dynamo.reset()
    cube = torch.randn(4, 5, 6)
    same(lambda w, i: (w[:, i[:, :2], 0], w[i[0, :2], :, i[1, :2]], w[:, i, i]), cube, ids % 4)
    torch._dynamo.reset()
    same(lambda w, i: (w.gather(1, i % 5), w.gather(0, i)), table, ids)


def test_products() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(8, 6)
            self.weight = torch.nn.Parameter(torch.randn(6, 8))
            self.other = torch.nn.Parameter(torch.randn(8, 6))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            flat = x.flatten(0, -2)
            return (
                self.a(x), F.linear(x, self.weight), x @ self.weight.t(), x @ self.other,
                torch.addmm(self.a.bias, flat, self.other), torch.mm(flat, self.weight.T),
                x[..., :1].unsqueeze(-1) @ x[..., None, :3], torch.bmm(flat[:, :, None], flat[:, None]),
            )  # fmt: skip

    found = same(Layer(), torch.randn(2, 3, 8), ulps=16)
    linears = [n for n in found.graph.nodes if type(n).__name__ == "Linear"]
    assert len(linears) == 4, "weights [rows, depth] are streamed"
    assert sum("plain reduction" in line for line in found.report) == 2


@pytest.mark.parametrize("case", ["plain", "gqa", "repeated", "mask", "float mask", "causal", "scale"])
def test_attention(case: str) -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def wide(x: torch.Tensor) -> torch.Tensor:
            return x[:, :, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8)

        if case == "gqa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if case == "repeated":
            return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        if case == "mask":
            mask = torch.arange(5)[None, None, None] < 3
            return F.scaled_dot_product_attention(q, wide(k), wide(v), attn_mask=mask.expand(2, -1, 1, -1))
        if case == "float mask":
            return F.scaled_dot_product_attention(q, wide(k), wide(v), attn_mask=k[:, :1, :, :1].transpose(2, 3))
        if case == "causal":
            return F.scaled_dot_product_attention(q, wide(k), wide(v), is_causal=True)
        if case == "scale":
            k, v = (x[:, :1].expand(2, 4, 5, 8) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=0.7)
        return F.scaled_dot_product_attention(q, torch.cat([k, v], 1), torch.cat([v, k], 1))

    found = same(function, q, k, v, ulps=16)
    (node,) = [n for n in found.graph.nodes if type(n).__name__ == "Attention"]
    assert node.g.size == {"plain": 4, "scale": 1}.get(case, 2)


def test_tensors_made_from_numbers_in_the_model() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x[:, torch.tensor([2, 0])] * torch.tensor([[1.5], [2.5]]) + torch.tensor(3)

    found = same(function, torch.randn(2, 3))
    assert [t.numel() for t in found.constants.values()] == [2, 2], "the single number is folded"


def test_tensors_held_by_the_graph_are_bound_as_constants() -> None:
    held = torch.randn(3)
    gm = torch.fx.symbolic_trace(lambda x: x)
    graph = torch.fx.Graph()
    gm.register_buffer("held", held)
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.mul, (x, graph.get_attr("held"))),))
    gm.graph = graph
    grab = Grab()
    x = torch.randn(2, 3)
    (out,) = grab(gm, [x])(x)
    assert torch.equal(out, x * held)
    assert list(grab.found[0].constants) == ["held"] and list(grab.found[0].arguments) == ["x"]
